"""parallelize() in a user's own loop: one process, tensor parallel, FSDP2 above it; checkpoints, optimizers,
the meta device; refusals."""

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from shardwise.core.errors import PlanError
from shardwise.launch import run_ranks
from shardwise.parallel.resolve import resolve
from tests.distributed.user_loop_workers import (
    CHECKPOINTS,
    EMBEDDINGS,
    UNDER_FSDP,
    Weights,
    is_telling,
    plan,
    writer,
)
from tests.matrix import FULL, thinned

# rounding stays below 1e-12; a gradient that is summed, averaged or clipped wrongly starts at 1e-3
TOLERANCE = 1e-10

Outcomes = list[dict[str, object]]
Launched = Callable[[int, bool], Outcomes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that one process wrote of unsharded models."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for weights in CHECKPOINTS:
        with one_process():
            dcp.save(writer(weights).state_dict(), checkpoint_id=folder / f"whole-{weights}", no_dist=True)
    return folder


@pytest.fixture(scope="module")
def launched(folder: Path) -> Launched:
    """What so many ranks give, of the telling pairs of embedding and weights and all else, or of the other
    pairs; on two ranks with these what `make test-all` alone asks, of all pairs."""

    @cache
    def outcomes(world_size: int, telling: bool) -> Outcomes:
        worker = {2: "on_two_ranks", 4: "on_four_ranks"}[world_size]
        results = run_ranks(
            f"tests.distributed.user_loop_workers:{worker}",
            json.dumps({"folder": str(folder), "telling": telling}).encode(),
            world_size=world_size,
            device_type="cpu",
            timeout_s=60,
        )
        return [json.loads(result) for result in results]

    return outcomes


@pytest.fixture(scope="module")
def two(launched: Launched) -> Outcomes:
    return launched(2, True)


@pytest.fixture(scope="module")
def four(launched: Launched) -> Outcomes:
    return launched(4, True)


def pairs(embeddings: Sequence[str], checkpoints: Sequence[Weights] = CHECKPOINTS) -> pytest.MarkDecorator:
    """Parametrizes a test by embedding and weights; pairs that aren't telling run in `make test-all`."""
    made = list(product(embeddings, checkpoints))
    return pytest.mark.parametrize(
        ("embedding", "weights"), thinned(made, is_telling), ids=[f"{e}-{w}" for e, w in made]
    )


def one_process() -> AbstractContextManager[object]:
    """torch.distributed.checkpoint warns that there is no process group, which is meant."""
    return warnings.catch_warnings(action="ignore")


def assert_agrees(outcomes: Outcomes, case: str, tolerance: float = TOLERANCE) -> None:
    for rank, outcome in enumerate(outcomes):
        differences = outcome[case]
        assert isinstance(differences, dict)
        assert max(differences.values()) <= tolerance, (rank, differences)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("tied", ["", " tied"])
def test_a_users_loop_on_tp_trains_as_one_process_does(two: Outcomes, embedding: str, tied: str) -> None:
    assert_agrees(two, f"loop {embedding}{tied}")


@pytest.mark.parametrize("kind", ["fused", "foreach", "one by one"])
def test_every_kind_of_adamw_takes_the_parameters(two: Outcomes, kind: str) -> None:
    assert_agrees(two, f"loop {kind}")


@pytest.mark.parametrize("case", ["rowwise", "replicated", "counted"])
def test_gradients_accumulate_over_backwards(two: Outcomes, case: str) -> None:
    assert_agrees(two, f"accumulate {case}")


@FULL
@pairs(UNDER_FSDP, (CHECKPOINTS[0], CHECKPOINTS[2]))
def test_fsdp_may_average_parts_that_have_as_many_labels(
    launched: Launched, embedding: str, weights: Weights
) -> None:
    assert_agrees(launched(4, is_telling(embedding, weights)), f"averaged {embedding} {weights}")


@FULL
@pairs(UNDER_FSDP, CHECKPOINTS[1:])
def test_fsdp_sums_parts_that_are_divided_by_the_whole_batchs_labels(
    launched: Launched, embedding: str, weights: Weights
) -> None:
    assert_agrees(launched(4, is_telling(embedding, weights)), f"summed {embedding} {weights}")


@FULL
@pytest.mark.parametrize("case", ["accumulated", "held back", "held back, replicated"])
def test_gradients_accumulate_under_fsdp(four: Outcomes, case: str) -> None:
    assert_agrees(four, f"averaged, {case}")


@FULL
@pytest.mark.parametrize("embedding", UNDER_FSDP)
@pytest.mark.parametrize("mesh", ["fsdp=2,tp=2", "dp=2,tp=2"])
def test_the_training_step_agrees_with_one_process(four: Outcomes, embedding: str, mesh: str) -> None:
    assert_agrees(four, f"step {embedding} {mesh}")


@FULL
def test_the_training_step_takes_interleaved_rows_in_whole_replicas(four: Outcomes) -> None:
    assert_agrees(four, "step routed-interleaved dp=2,tp=2")


def reads_back(folder: Path, weights: Weights) -> bool:
    """Whether a checkpoint that ranks wrote gives one process, bit for bit, what one process had written."""
    model, want = writer(Weights(weights.vocabulary, weights.tied, seed=2)), writer(weights).state_dict()
    state = model.state_dict()
    with one_process():
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state)
    return state.keys() == want.keys() and all(
        torch.equal(model.state_dict()[name], want[name]) for name in want
    )


@FULL
@pairs(EMBEDDINGS)
def test_a_checkpoint_of_one_process_loads_at_tp_and_comes_back_bit_for_bit(
    launched: Launched, folder: Path, embedding: str, weights: Weights
) -> None:
    outcomes = launched(2, False) + launched(4, is_telling(embedding, weights))
    assert all(outcome[f"checkpoint {embedding} {weights}"] for outcome in outcomes)
    assert reads_back(folder / f"tp2-{embedding}-{weights}", weights)
    assert reads_back(folder / f"tp4-{embedding}-{weights}", weights)


@FULL
@pairs(UNDER_FSDP)
def test_a_checkpoint_of_one_process_loads_under_fsdp_and_comes_back_bit_for_bit(
    launched: Launched, folder: Path, embedding: str, weights: Weights
) -> None:
    outcomes = launched(4, is_telling(embedding, weights))
    assert all(outcome[f"checkpoint fsdp {embedding} {weights}"] for outcome in outcomes)
    assert reads_back(folder / f"fsdp2-tp2-{embedding}-{weights}", weights)


@FULL
@pairs(EMBEDDINGS)
def test_load_state_dict_takes_plain_whole_tensors(
    launched: Launched, embedding: str, weights: Weights
) -> None:
    under_fsdp = launched(4, is_telling(embedding, weights)) if embedding in UNDER_FSDP else []
    outcomes = launched(2, False) + under_fsdp
    assert all(outcome[f"whole tensors {embedding} {weights}"] for outcome in outcomes)


@pairs(EMBEDDINGS, CHECKPOINTS[1:])
def test_load_state_dict_may_assign_whole_tensors(
    launched: Launched, embedding: str, weights: Weights
) -> None:
    outcomes = launched(2, is_telling(embedding, weights))
    assert all(outcome[f"assigned {embedding} {weights}"] for outcome in outcomes)


@pytest.mark.parametrize("embedding", ["rowwise", "routed-interleaved"])
def test_training_resumed_with_its_optimizer_goes_on_bit_for_bit(two: Outcomes, embedding: str) -> None:
    assert_agrees(two, f"resumed {embedding}", tolerance=0.0)


@FULL
def test_training_under_fsdp_resumed_with_its_optimizer_goes_on_bit_for_bit(four: Outcomes) -> None:
    assert_agrees(four, "resumed rowwise", tolerance=0.0)


@FULL
@pytest.mark.parametrize("embedding", UNDER_FSDP)
def test_ranks_go_on_with_the_optimizer_of_one_process(
    launched: Launched, four: Outcomes, embedding: str
) -> None:
    assert_agrees(launched(2, False), f"resumed from one process {embedding}")
    if embedding in ("rowwise", "colwise"):
        assert_agrees(four, f"resumed from one process {embedding}")


@pairs(EMBEDDINGS, CHECKPOINTS[1:])
def test_a_model_built_on_meta_trains_once_it_is_loaded(
    launched: Launched, embedding: str, weights: Weights
) -> None:
    assert_agrees(launched(2, is_telling(embedding, weights)), f"meta {embedding} {weights}")


@FULL
@pytest.mark.parametrize("embedding", ["rowwise", "replicated"])
def test_a_model_built_on_meta_trains_under_fsdp_once_it_is_loaded(four: Outcomes, embedding: str) -> None:
    assert_agrees(four, f"meta {embedding} {CHECKPOINTS[2]}")


@pytest.mark.parametrize(
    "change",
    [
        "to another dtype and back",
        "unfreezing",
        "load_state_dict(assign=True)",
        "torch.autograd.grad",
        "reentrant checkpoints",
        "checkpoints",
    ],
)
def test_gradients_are_summed_after(two: Outcomes, change: str) -> None:
    assert_agrees(two, f"after {change}")


def test_parameters_beside_fsdp_units_are_summed_too(two: Outcomes) -> None:
    assert_agrees(two, "gradients beside FSDP units")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "twice",
            'PlanError: plan "writer": the model is sharded already. Build a fresh one for another plan.',
        ),
        (
            "after fully_shard",
            'PlanError: plan "writer": words.weight is a DTensor already. Call parallelize() before '
            "fully_shard().",
        ),
        ("no tp axis", "MeshError: parallelize: the mesh has axes ('fsdp',). Name one of them \"tp\"."),
        (
            "untied",
            "ModelError: words.weight and head.weight were one parameter when the model was sharded, and "
            "are several now, as load_state_dict(assign=True) leaves them. Tie them again: "
            "model.head.weight = model.words.weight.",
        ),
    ],
)
def test_on_tp_it_is_refused(two: Outcomes, case: str, message: str) -> None:
    assert [outcome[f"refused: {case}"] for outcome in two] == [message] * 2


@pytest.mark.parametrize("case", ["wrong size", "wrong size, interleaved"])
def test_tensors_of_a_wrong_size_get_pytorchs_own_message(two: Outcomes, case: str) -> None:
    for outcome in two:
        text = str(outcome[f"refused: {case}"])
        assert text.startswith("RuntimeError: Error(s) in loading state_dict for Writer:")
        assert "size mismatch for words.weight: copying a param with shape torch.Size([256, 16])" in text


@FULL
@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "interleaved",
            'PlanError: plan "writer": rule "words" (routed) interleaves the rows of words, and no '
            'checkpoint could tell their order once FSDP cuts them again. Use ownership = "contiguous", or '
            "no fsdp axis.",
        ),
        (
            "empty shard",
            'PlanError: plan "writer": rule "words" (rowwise) leaves a rank without rows of words (1 over '
            "tp=2), which FSDP can't shard "
            "further. Use tp of at most 1, or no fsdp axis.",
        ),
        (
            "interleaved state",
            'PlanError: words: rule "words" (routed) interleaves its rows, and FSDP has cut them again '
            'over a mesh of (2, 2), so no checkpoint can tell their order. Use ownership = "contiguous".',
        ),
        (
            "interleaved load",
            'PlanError: words: rule "words" (routed) interleaves its rows, and FSDP has cut them again '
            'over a mesh of (2, 2), so no checkpoint can tell their order. Use ownership = "contiguous".',
        ),
    ],
)
def test_with_an_fsdp_axis_it_is_refused(four: Outcomes, case: str, message: str) -> None:
    assert [outcome[f"refused: {case}"] for outcome in four] == [message] * 4


@FULL
def test_a_refused_model_is_as_it_was(four: Outcomes) -> None:
    assert all(outcome["untouched after a refusal"] == "True" for outcome in four)


def test_an_empty_shard_is_refused_with_an_fsdp_axis_and_taken_without() -> None:
    with torch.device("meta"):
        model = writer(Weights(5, False))
    assert resolve(model, plan("rowwise"), tp=4)
    with pytest.raises(PlanError, match=r"rows of words \(5 over tp=4\)"):
        resolve(model, plan("rowwise"), tp=4, fsdp=2)


def test_interleaved_rows_are_refused_with_an_fsdp_axis_and_taken_without() -> None:
    with torch.device("meta"):
        model = writer(Weights(256, False))
    assert resolve(model, plan("routed-interleaved"), tp=4)
    with pytest.raises(PlanError, match="interleaves the rows of words"):
        resolve(model, plan("routed-interleaved"), tp=4, fsdp=2)
