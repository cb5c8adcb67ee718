"""shardwise.watch() on real ranks: right runs of every kind of sharding are left alone, and what is planted
is named: on which rank, along which axis, at which step."""

import json

import pytest

from shardwise.launch import run_ranks

TELLS_DRIFT = (
    "Look for a gradient that isn't summed over {}, an optimizer that isn't the same there, or a faulty "
    "device, where one rank alone differs."
)
BUILD = "Build it from one seed on all ranks, or load one checkpoint, before it is sharded."
INPUT = (
    "Give the ranks along tp the same batch: which part a rank reads is said by its place on the mesh's "
    "other "
    "axes; or name the axes whose ranks see the same in same_input=."
)
RANKS = "isn't the same on all ranks"
Outcomes = list[dict[str, object]]


def outcomes(world_size: int) -> Outcomes:
    results = run_ranks(
        "tests.distributed.watch_workers:run", b"", world_size=world_size, device_type="cpu", timeout_s=60
    )
    return [json.loads(result) for result in results]


@pytest.fixture(scope="module")
def two() -> Outcomes:
    return outcomes(2)


@pytest.fixture(scope="module")
def four() -> Outcomes:
    return outcomes(4)


@pytest.mark.parametrize(
    "case",
    [
        "a_native_plan",
        "native_with_dropout_seeded_apart",
        "torchs_styles",
        "torchs_styles_with_dropout_seeded_alike",
        "ddp_with_running_statistics",
        "plain_modules_by_hand",
        "plain_modules_said_to_be_parts",
        "fsdp_alone",
        "after_close_nothing_is_looked_at",
    ],
)
def test_of_a_right_run_nothing_is_told(two: Outcomes, case: str) -> None:
    assert [outcome[case] for outcome in two] == [[]] * 2


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (
            "native_with_another_seed_on_each_rank",
            f"DriftError: step 1: weight down.bias {RANKS} along tp: rank 0 against rank 1. {BUILD}",
        ),
        (
            "native_with_other_ids_on_each_rank",
            f"DriftError: step 1: input 0 {RANKS} along tp: rank 0 against rank 1. {INPUT}",
        ),
        (
            "a_check_by_hand",
            f"DriftError: step 1: weight down.bias {RANKS} along tp: rank 0 against rank 1. {BUILD}",
        ),
        (
            "an_axis_that_the_mesh_has_not",
            'MeshError: watch: same_input names an axis "tensor". The mesh has "tp".',
        ),
        (
            "forwards_that_train_nothing_are_no_steps",
            ["3", "watches 3 weights, 1 buffer, the input every 100 steps"],
        ),
        (
            "warnings_of_each_thing_once",
            [f"step 1: weight down.bias {RANKS} along tp: rank 0 against rank 1. {BUILD}"],
        ),
        (
            "torchs_styles_with_plain_weights_apart",
            [
                f"step 1: weight table.weight {RANKS} along model: rank 0 against rank 1. {BUILD} If its "
                f"ranks "
                "hold parts of their own, say so with replicated=, or make it a DTensor."
            ],
        ),
        (
            "torchs_styles_with_dropout_seeded_apart",
            [
                f"step 1: random state {RANKS} along tp: rank 0 against rank 1. Seed the ranks along tp "
                f"alike, "
                "or dropout takes other elements of what they hold alike; random=False leaves this out."
            ],
        ),
        (
            "ddp_with_a_flipped_bit_in_a_buffer",
            [
                f"step 5: buffer module.scale {RANKS}: rank 0 against rank 1. "
                f"{TELLS_DRIFT.format('all ranks')}"
            ],
        ),
        (
            "plain_modules_whose_gradients_nobody_sums",
            [
                f"step 3: weight table.weight {RANKS}: rank 0 against rank 1, and 7 more. "
                f"{TELLS_DRIFT.format('all ranks')}"
            ],
        ),
        (
            "steps_are_the_optimizers_where_it_is_given",
            [f"step 3: weight norm.bias {RANKS} along tp: rank 0 against rank 1. {TELLS_DRIFT.format('tp')}"],
        ),
    ],
)
def test_what_two_ranks_do_not_hold_alike_is_told(two: Outcomes, case: str, told: object) -> None:
    assert [outcome[case] for outcome in two] == [told] * 2


def test_a_flipped_bit_in_one_weight_on_one_rank_is_named_within_one_interval(two: Outcomes) -> None:
    """Checks come before steps 1, 5 and 9, and the bit is flipped after step 2."""
    named = f"weight norm.weight {RANKS} along tp: rank 0 against rank 1. {TELLS_DRIFT.format('tp')}"
    for outcome in two:
        assert outcome["a_flipped_bit"] == [f"step {step}: {named}" for step in (5, 9)]


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("fsdp_and_tp", []),
        (
            "fsdp_and_tp_with_a_flipped_bit_in_a_shard",
            [
                f"step 5: weight norm.weight {RANKS} along tp: rank 2 against rank 3. "
                f"{TELLS_DRIFT.format('tp')}"
            ],
        ),
        (
            "fsdp_and_tp_with_ids_of_the_whole_mesh",
            [f"step 1: input 0 {RANKS} along tp: rank 0 against rank 1. {INPUT}"],
        ),
        (
            "a_copy_of_each_shard",
            [
                f"step 5: weight norm.bias {RANKS} along copies: rank 0 against rank 2. "
                f"{TELLS_DRIFT.format('copies')}"
            ],
        ),
        (
            "styles_whose_other_axis_is_by_hand",
            [
                f"step 2: weight table.weight {RANKS} along dp: ranks 0, 1 against ranks 2, 3, and 7 more. "
                f"{TELLS_DRIFT.format('dp')}"
            ],
        ),
        (
            "called_before_fully_shard",
            "ModelError: watch: up.weight is cut in another way than when watch() was called. Call it last, "
            "after all that replaces parameters.",
        ),
    ],
)
def test_what_four_ranks_do_not_hold_alike_is_told(four: Outcomes, case: str, told: object) -> None:
    assert [outcome[case] for outcome in four] == [told] * 4
