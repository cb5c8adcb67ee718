"""assert_trains_like_one_rank on real ranks: right loops of every kind pass, and each planted fault is named
first, with what to do."""

import json

import pytest

from shardwise.core.errors import OptionError
from shardwise.launch import run_ranks
from shardwise.testing import assert_trains_like_one_rank
from tests.distributed import loops

SUMS = (
    "in FSDP2 set_gradient_divide_factor(1.0) and set_force_sum_reduction_for_comms(True); in DDP multiply "
    "the "
    "loss by the number of ranks."
)
LOCAL_TOKENS = (
    "- all gradients: they are the mean of what the ranks' own losses give: each rank divides by the "
    "tokens of "
    "its own part of the batch, and the parts have other numbers of them (16.5 % off). Divide each rank's "
    "sum by "
    f"the whole batch's number of labels (valid= in shardwise.loss_of), and have gradients summed: {SUMS}"
)
SCALED = (
    "those of one process: the loss is scaled, summed or averaged in another way ({} % off). Look at what "
    "the "
    "loss is divided by, and at who averages gradients: FSDP2 and DDP do, over their ranks."
)
GROUPS = "Sort parameters into groups by what sharding doesn't change, and step schedules on all ranks."
TOLD = {
    "divided by local tokens, FSDP2": LOCAL_TOKENS,
    "divided by local tokens, DDP": LOCAL_TOKENS,
    "averaged once too often": f"- all gradients: they are 1/2 of {SCALED.format(50)}",
    "summed by nobody": "- all gradients: each rank along dp keeps the gradients of its own part of the "
    "batch, "
    "and nothing sums them (108 % off). Sum gradients over dp after the backward, as DDP and FSDP2 do.",
    "a loss of all ranks": f"- all gradients: they are 2 times {SCALED.format(100)}",
    "clipped by the local norm": "- gradient norm: gradients are right after the backward, and are then "
    "scaled by "
    "0.2108 to 0.2113 on the ranks, on one process by 0.1566: they are clipped by another norm, that of "
    "what each "
    "rank alone holds (34.7 % off). Take the norm of the whole gradients, each element once: "
    "torch.nn.utils.clip_grad_norm_ does where all parameters are DTensors of one mesh; else sum the "
    "squares over "
    "the ranks that hold other parts.",
    "other ids": "- input 0: at step 1 it isn't the same on all ranks along tp: rank 0 against rank 1. "
    "Give the "
    "ranks along tp the same batch: which part a rank reads is said by its place on the mesh's other axes.",
    "decay of another group": "- optimizer's weight_decay: at step 1 the weight_decay of up.weight and of "
    "3 more is "
    f"0.0, and 0.1 on one process. {GROUPS}",
    "an optimizer made early": "- optimizer: it holds 8 parameters that aren't the sharded model's, so "
    "those are "
    "never trained: it was made before the model was sharded. Make it after all that replaces parameters: "
    "parallelize(), fully_shard(), DTensor.",
    "a schedule on rank 0": "- optimizer's lr: at step 2 the lr of table.weight and of 7 more is 0.1 on "
    "rank 1, and "
    f"0.05 on one process. {GROUPS}",
    "nothing zeroed": "- zero_grad: as the backward of step 2 begins, 8 parameters still have gradients of "
    "the step "
    "before, on one process too: nobody zeroed them. Call optimizer.zero_grad(), of the optimizer that "
    "holds the "
    "sharded parameters.",
    "dropout seeded apart": "- dropout: once dropout is on, weight table.weight is no longer the same "
    "along tp: "
    "ranks drop other elements of what they hold alike. Seed the ranks along tp alike, by their place on the "
    "mesh's other axes, before the first step.",
    "a weight nudged on rank 1": "- weight norm.weight: at step 2 it isn't the same on all ranks along tp: "
    "rank 0 "
    "against rank 1. Look for a gradient that isn't summed over tp, an optimizer that isn't the same "
    "there, or a "
    "faulty device, where one rank alone differs.",
    "a third of the loss": "- loss: step 1 returns 1.27797 on rank 0, and 3.83392 on one process (66.7 % "
    "off).",
    "a slope that nobody sums": "- slope: each of 2 ranks computes a part of its gradient, and nothing "
    "sums them ",
    "a forward of other halves": "- loss: step 1 returns ",
    "logits that nobody gathers": "the step doesn't train as one process does: on rank ",
    "tokens counted by each rank": "- tokens: after 3 steps this buffer isn't the one process's (50 % off).",
    "axes that nobody knows": "data: nobody knows over which of the axes rows, columns the batch is cut. "
    "Name those "
    'whose ranks see other sequences: data=("replicas",).',
    "nothing that shards": "Net: nothing shards it. Have the factory take a mesh=None, and shard its model "
    "over it; "
    "or give a plan.",
}
Outcomes = list[dict[str, str]]


def outcomes(world_size: int) -> Outcomes:
    results = run_ranks(
        "tests.distributed.own_step_workers:run", b"", world_size=world_size, device_type="cpu", timeout_s=120
    )
    return [json.loads(result) for result in results]


@pytest.fixture(scope="module")
def two() -> Outcomes:
    return outcomes(2)


@pytest.fixture(scope="module")
def four() -> Outcomes:
    return outcomes(4)


def first_of(told: str) -> str:
    """What is said to explain the rest."""
    lines = told.splitlines()
    return next((line for line in lines if line.startswith("- ")), told)


def test_right_loops_of_every_kind_train_like_one_rank(two: Outcomes) -> None:
    right = two[0].keys() - TOLD.keys()
    assert len(right) == 10
    assert {name: outcome[name] for outcome in two for name in right} == dict.fromkeys(right, "")


@pytest.mark.parametrize("case", TOLD)
def test_a_planted_fault_is_named_first_on_all_ranks(two: Outcomes, case: str) -> None:
    for outcome in two:
        assert first_of(outcome[case]).startswith(TOLD[case])


def test_a_forward_that_is_wrong_already_explains_gradients_that_no_fault_does(two: Outcomes) -> None:
    told = first_of(two[0]["a forward of other halves"])
    assert told.endswith(". shardwise verify names the module of the model where it begins."), told
    assert "the forward is another one already" in told


def test_what_only_follows_is_a_line_of_names(two: Outcomes) -> None:
    told = two[0]["other ids"].splitlines()
    assert told[0] == "the step doesn't train as one process does (mesh tp=2, 3 steps):"
    assert told[2:] == ["What follows: loss, table.weight, norm.weight, norm.bias and 6 more."]


def test_fsdp_over_tp_trains_like_one_rank(four: Outcomes) -> None:
    assert [outcome["FSDP2 over tp"] for outcome in four] == [""] * 4


def test_gradients_that_nobody_sums_over_the_other_axis_are_named(four: Outcomes) -> None:
    for outcome in four:
        assert first_of(outcome["tp alone of two axes"]).startswith(
            "- all gradients: each rank along dp keeps the gradients of its own part of the batch, and "
            "nothing "
            "sums them "
        )


def test_a_plain_process_starts_the_ranks_itself() -> None:
    assert_trains_like_one_rank(loops.plain, loops.all_dtensors, optimizer=loops.sgd, mesh="tp=2", steps=2)


def test_a_rank_that_raises_alone_is_told() -> None:
    with pytest.raises(AssertionError, match=r'rank 1 failed: ValueError: no such thing during "step 1'):
        assert_trains_like_one_rank(loops.raising, loops.by_torch)


def test_ranks_that_hang_are_told_with_what_they_were_at() -> None:
    with pytest.raises(AssertionError) as told:
        assert_trains_like_one_rank(loops.hanging, loops.by_torch, timeout_s=5)
    assert str(told.value) == (
        "the step doesn't train as one process does: nothing was heard from any rank for 5 s, so they were "
        "stopped "
        '(ranks 0, 1: last at "step 1 on the ranks"). If the work needs longer, raise the timeout.'
    )


def test_a_step_that_fails_on_one_process_says_so() -> None:
    with pytest.raises(AssertionError, match="on one process it raises ValueError: no such thing"):
        assert_trains_like_one_rank(loops.raising_alone, loops.by_torch)


def test_clipping_a_mixture_of_dtensors_and_plain_gradients_is_told_as_the_step_meets_it() -> None:
    with pytest.raises(AssertionError, match=r'got mixed torch.Tensor and DTensor.* during "step 1 on'):
        assert_trains_like_one_rank(loops.plain, loops.by_torch)


def test_a_function_without_a_name_is_refused() -> None:
    with pytest.raises(OptionError) as told:
        assert_trains_like_one_rank(lambda model, batch: None, loops.by_torch)
    assert str(told.value) == (
        "step: test_a_function_without_a_name_is_refused.<locals>.<lambda> has no name by which ranks "
        "could import "
        "it. Define it with def, at the top of a module."
    )
