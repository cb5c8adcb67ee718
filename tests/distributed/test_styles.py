"""Every native style, and the dtensor engine's plans, on 1 to 4 real ranks: equal to the unsharded model in
float64, forward and every gradient. One launch per number of ranks runs all cases; planted faults show that
the comparison sees."""

import pytest

from tests.distributed.style_answers import TOLERANCE, assert_as_expected, part
from tests.distributed.style_cases import MESHES, Case, cases, is_telling
from tests.distributed.style_faults import FAULTS, PART_FAULTS, Fault
from tests.matrix import thinned

WORLD_SIZES = (1, 2, 3, 4)


def sizes(name: str, *world_sizes: int) -> list[object]:
    """Numbers of ranks on which a part runs; in `make test`, where it is telling."""
    return thinned(world_sizes, lambda world_size: is_telling(name, world_size))


ALL_CASES = [(world_size, case) for world_size in WORLD_SIZES for case in cases(world_size)]


@pytest.mark.parametrize(
    ("world_size", "case"),
    thinned(ALL_CASES, lambda _, case: case.is_telling),
    ids=[f"{world_size} ranks, {case.name}" for world_size, case in ALL_CASES],
)
def test_a_sharded_model_equals_the_unsharded_one(world_size: int, case: Case) -> None:
    assert_as_expected(case, part(world_size, "cases", telling=case.is_telling)[case.name])


@pytest.mark.parametrize(
    ("world_size", "telling", "expected"),
    thinned(
        [
            (1, True, 8),
            (2, True, 52),
            (3, True, 31),
            (1, False, 129),
            (2, False, 110),
            (3, False, 106),
            (4, False, 142),
        ],
        lambda _, telling, __: telling,
    ),
)
def test_no_case_is_lost(world_size: int, telling: bool, expected: int) -> None:
    names = [case.name for case in cases(world_size) if case.is_telling == telling]
    assert list(part(world_size, "cases", telling=telling)) == names
    assert len(names) == expected


@pytest.mark.parametrize(
    "fault", thinned(FAULTS, lambda fault: fault.is_telling), ids=lambda fault: fault.name
)
def test_the_comparison_sees_planted_faults(fault: Fault) -> None:
    outcome = part(2, "faults", telling=fault.is_telling)[fault.name]
    by_subject = {finding["subject"]: finding for finding in outcome["findings"]}
    named = set(by_subject) - {"loss", "output"}
    assert fault.found_in <= named
    if fault.only:
        assert named == fault.found_in
    assert by_subject.keys().isdisjoint({"loss", "output"}) == fault.loss_exact
    for subject in fault.found_in:
        finding = by_subject[subject]
        # a wrong reduction is no rounding
        assert finding["relative_error"] is None or finding["relative_error"] > 1e-3
    assert any(fault.says in finding["reason"] for finding in outcome["findings"])


def test_each_native_style_has_a_planted_fault() -> None:
    styles = (
        "rowwise embedding",
        "colwise embedding",
        "routed embedding",
        "routed interleaved embedding",
        "replicated embedding",
    )
    others = (
        "colwise linear",
        "rowwise linear",
        "sequence_parallel norm",
        "replicate norm",
        "gather_input",
        "loss",
    )
    for style in (*styles, *others):
        assert any(fault.name.startswith(style) and fault.is_telling for fault in FAULTS), style


@pytest.mark.parametrize("world_size", sizes("laws", 2, 3, 4))
def test_collectives_undo_and_make_up_one_another(world_size: int) -> None:
    differences = part(world_size, "laws")
    assert len(differences) == 7
    assert {law: difference for law, difference in differences.items() if difference > 1e-12} == {}


@pytest.mark.parametrize("world_size", sizes("clip", *WORLD_SIZES))
def test_clipping_equals_torchs_on_the_unsharded_model(world_size: int) -> None:
    errors = part(world_size, "clip")
    assert len(errors) == 8
    assert {plan: error for plan, error in errors.items() if error > TOLERANCE} == {}


@pytest.mark.parametrize(
    ("world_size", "mesh"),
    thinned(
        [(world_size, mesh) for world_size, meshes in MESHES.items() for mesh in meshes],
        lambda world_size, mesh: is_telling(f"steps {mesh}", world_size),
    ),
)
def test_three_training_steps_equal_those_of_the_unsharded_model_on_one_process(
    world_size: int, mesh: str
) -> None:
    errors = part(world_size, f"steps {mesh}")
    assert len(errors) == 5
    assert {plan: error for plan, error in errors.items() if error > TOLERANCE} == {}


@pytest.mark.parametrize("world_size", sizes("state_dict", *WORLD_SIZES))
def test_checkpoints_hold_rows_in_the_order_of_their_ids_and_load_bit_for_bit(world_size: int) -> None:
    differing = part(world_size, "state_dict")
    assert len(differing) == 7
    assert {plan: count for plan, count in differing.items() if count} == {}


@pytest.mark.parametrize(
    ("world_size", "rows"),
    thinned(
        [(1, list(range(10))), (2, [0, 2, 4, 6, 8]), (3, [0, 3, 6, 8]), (4, [0, 4, 7])],
        lambda world_size, _: is_telling("interleaved", world_size),
    ),
)
def test_an_interleaved_table_deals_its_rows_round_robin(world_size: int, rows: list[int]) -> None:
    assert part(world_size, "interleaved") == rows


# Llama with 2 layers on 2 ranks, batch 2, sequence 24, hidden 96, vocabulary 257, float64
ACTIVATION = 2 * 24 * 96 * 8
NORM_WEIGHTS = 5 * 96 * 8
LOSS_STATISTICS = 2 * 2 * 2 * 24 * 8  # two numbers per token, of both ranks
TABLE = 257 * 96 * 8


def collectives_by_hand(**changes: tuple[int, float]) -> dict[str, tuple[int, float]]:
    """Count and wire bytes of each kind and phase under sequence parallelism, without the embedding."""
    # forward: 2 gathers and 2 scatters a layer, a gather for the head; backward: the mirror
    by_hand = {
        "all_gather forward": (5 + 1, 5 * ACTIVATION / 2 + LOSS_STATISTICS / 2),
        "all_to_all forward": (4, 4 * ACTIVATION / 2),  # reduce-scatters, carried out pairwise on gloo
        "all_gather backward": (4, 4 * ACTIVATION / 2),
        "all_to_all backward": (5, 5 * ACTIVATION / 2),
        "all_reduce backward": (1, float(NORM_WEIGHTS)),
    }
    for key, (count, wire) in changes.items():
        kind = key.replace("__", " ")
        by_hand[kind] = (by_hand[kind][0] + count, by_hand[kind][1] + wire)
    return by_hand


WHOLE_BY_HAND = {
    # forward: an all-reduce for the embedding and 2 a layer; backward: 2 a layer and the head's
    "all_reduce forward": (5, 5.0 * ACTIVATION),
    "all_reduce backward": (5, 5.0 * ACTIVATION),
    "all_gather forward": (1, LOSS_STATISTICS / 2),
}


@pytest.mark.parametrize(
    ("plan", "by_hand"),
    [
        (
            "rowwise",
            collectives_by_hand(
                all_to_all__forward=(1, ACTIVATION / 2), all_gather__backward=(1, ACTIVATION / 2)
            ),
        ),
        # each rank's slice of the hidden dim for the other's half of the tokens
        (
            "colwise",
            collectives_by_hand(
                all_to_all__forward=(1, ACTIVATION / 4), all_to_all__backward=(1, ACTIVATION / 4)
            ),
        ),
        ("replicated", collectives_by_hand(all_reduce__backward=(0, TABLE))),
        ("rowwise (no sequence parallelism)", WHOLE_BY_HAND),
        (
            "colwise (no sequence parallelism)",
            WHOLE_BY_HAND
            | {
                "all_reduce forward": (4, 4.0 * ACTIVATION),
                "all_gather forward": (2, ACTIVATION / 2 + LOSS_STATISTICS / 2),
            },
        ),
        (
            "replicated (no sequence parallelism)",
            WHOLE_BY_HAND | {"all_reduce forward": (4, 4.0 * ACTIVATION)},
        ),
    ],
)
def test_the_recorder_counts_what_is_counted_by_hand(
    plan: str, by_hand: dict[str, tuple[int, float]]
) -> None:
    found = {f"{kind} {phase}": (count, wire) for kind, phase, count, wire in part(2, "recorded")[plan]}
    assert found == by_hand


@pytest.mark.parametrize("plan", ["routed", "routed-interleaved"])
def test_routed_sends_whole_rows_and_gets_their_gradients_back(plan: str) -> None:
    found = {f"{kind} {phase}": (count, wire) for kind, phase, count, wire in part(2, "recorded")[plan]}
    without = collectives_by_hand()
    for kind in ("all_to_all forward", "all_to_all backward"):
        count, wire = found.pop(kind)
        base_count, base_wire = without.pop(kind)
        assert count == base_count + 1
        rows, rest = divmod(wire - base_wire, 96 * 8)
        assert rest == 0
        assert 0 < rows <= 24  # no more than the other rank's half of 48 tokens
    assert found == without


@pytest.mark.parametrize("world_size", sizes("ranks", 2, 3, 4))
def test_tensors_that_differ_on_one_rank_are_named(world_size: int) -> None:
    found = part(world_size, "ranks")
    assert found["tensors"] == ["permuted on one rank", "other on one rank", "negative zero on one rank"]
    assert found["reasons"] == ["tensors are not equal on all tp ranks"] * 3
    assert found["healthy"] == []
    assert found["drifted"] == ["layers.1.ffn_norm.weight"]
    assert found["checked"] == sorted(
        ["norm.weight", *(f"layers.{n}.{kind}_norm.weight" for n in (0, 1) for kind in ("attention", "ffn"))]
    )


@pytest.mark.parametrize("name", PART_FAULTS)
def test_the_other_comparisons_see_planted_faults(name: str) -> None:
    part_name, _ = PART_FAULTS[name]
    healthy, spoilt = part(2, part_name), part(2, f"fault: {name}")
    if part_name == "ranks":
        assert "permuted on one rank" not in spoilt["tensors"]
        return
    assert list(spoilt) == list(healthy)[: 1 if part_name.startswith("steps") else None]
    assert max(healthy.values()) <= TOLERANCE
    assert max(spoilt.values()) > 1e-3
