"""The record of a walk-through against plain numpy, the formulas and planted faults; its words; its terminal
and HTML renderings."""

import dataclasses
import io
import threading
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from shardwise.core.collective import CollectiveKind, Origin
from shardwise.core.errors import OptionError, RunError
from shardwise.core.placement import Partial
from shardwise.core.plan import Style
from shardwise.core.walkthrough import Content, Matrix, Phase, Role, Step, StepKind, Transfer, Walkthrough
from shardwise.parallel import collectives, exchanges, ownership
from shardwise.parallel.axis import Axis
from shardwise.parallel.context import ring
from shardwise.parallel.embedding import EmbeddingShard
from shardwise.parallel.experts import combined
from shardwise.parallel.kinds import kind_of
from shardwise.parallel.parameters import PartialGradients
from shardwise.parallel.stages import Stage
from shardwise.parallel.styles import experts, routed, rowwise
from shardwise.parallel.watch import show
from shardwise.report.walkthrough.html import walkthrough_html
from shardwise.report.walkthrough.terminal import format_value, render_walkthrough
from shardwise.walkthrough.record import record_walkthrough
from shardwise.walkthrough.subject import subject_of, subjects
from shardwise.walkthrough.thread_ranks import on_threads
from shardwise.walkthrough.words import explain_walkthrough, formula_bytes
from tests.unit.comparison_example import HOSTILE_MARKUP

Array = NDArray[np.float64]
FORWARD, BACKWARD = Phase.FORWARD, Phase.BACKWARD
EMBEDDINGS = [subject for subject in subjects() if subject.startswith("embedding/")]
ROUTED = ("embedding/routed", "embedding/routed-interleaved")
BY_DATA = (*ROUTED, "experts/experts")


def values(matrix: Matrix) -> Array:
    return np.array([row.values for row in matrix.rows], dtype=np.float64)


def matrix_of(step: Step, rank: int | None, content: Content) -> Matrix:
    panel = step.of_rank(rank)
    return next(matrix for matrix in (*panel.holds, *panel.gets) if matrix.content is content)


def per_rank(walkthrough: Walkthrough, kind: StepKind, phase: Phase, content: Content) -> list[Matrix]:
    step = walkthrough.step(kind, phase)
    return [matrix_of(step, rank, content) for rank in range(walkthrough.sizes.ranks)]


def whole(matrices: Sequence[Matrix]) -> Array:
    """The tensor that the ranks' parts make: put together by what their rows and columns say that they
    are."""
    first = matrices[0]
    width = max((max(matrix.columns) + 1 for matrix in matrices), default=0)
    by_token = first.rows[0].token is not None
    keys = {row.token if by_token else row.item for matrix in matrices for row in matrix.rows}
    out = np.full((len(keys), width), np.nan)
    for matrix in matrices:
        for row in matrix.rows:
            key = row.token if by_token else row.item
            out[0 if key is None else key, list(matrix.columns)] = row.values
    assert not np.isnan(out).any()
    return out


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("subject", EMBEDDINGS)
def test_an_embedding_gives_the_rows_of_its_ids_and_adds_up_their_gradients(subject: str, ranks: int) -> None:
    record = record_walkthrough(subject, ranks=ranks)
    table = whole(per_rank(record, StepKind.CUT, FORWARD, Content.PARAMETER))
    ids = values(per_rank(record, StepKind.INPUT, FORWARD, Content.IDS)[0]).astype(int).ravel()
    given = whole(per_rank(record, StepKind.GRADIENT_IN, BACKWARD, Content.OUTPUT_GRADIENT))
    expected = np.zeros_like(table)
    np.add.at(expected, ids, given)
    assert np.array_equal(table[5], 50 + np.arange(table.shape[1]))
    assert np.array_equal(whole(per_rank(record, StepKind.RESULT, FORWARD, Content.OUTPUT)), table[ids])
    assert np.array_equal(whole(per_rank(record, StepKind.GRADIENT, BACKWARD, Content.GRADIENT)), expected)
    assert np.array_equal(
        values(matrix_of(record.step(StepKind.GRADIENT, BACKWARD), None, Content.GRADIENT)), expected
    )
    assert all(step.difference.largest == 0 for step in record.steps if step.difference is not None)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("subject", ["linear/colwise", "linear/rowwise"])
def test_a_linear_gives_its_product_and_both_gradients(subject: str, ranks: int) -> None:
    record = record_walkthrough(subject, ranks=ranks)
    weight = whole(per_rank(record, StepKind.CUT, FORWARD, Content.PARAMETER))
    x = whole(per_rank(record, StepKind.INPUT, FORWARD, Content.INPUT))
    given = whole(per_rank(record, StepKind.GRADIENT_IN, BACKWARD, Content.OUTPUT_GRADIENT))
    assert np.array_equal(whole(per_rank(record, StepKind.RESULT, FORWARD, Content.OUTPUT)), x @ weight.T)
    assert np.array_equal(
        whole(per_rank(record, StepKind.INPUT_GRADIENT, BACKWARD, Content.INPUT_GRADIENT)), given @ weight
    )
    assert np.array_equal(whole(per_rank(record, StepKind.GRADIENT, BACKWARD, Content.GRADIENT)), given.T @ x)
    assert record.agrees


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_norm_gives_its_formula_and_the_summed_gradient_of_its_weight(ranks: int) -> None:
    record = record_walkthrough("norm/sequence_parallel", ranks=ranks)
    weight = values(per_rank(record, StepKind.CUT, FORWARD, Content.PARAMETER)[0])[0]
    x = whole(per_rank(record, StepKind.INPUT, FORWARD, Content.INPUT))
    given = whole(per_rank(record, StepKind.GRADIENT_IN, BACKWARD, Content.OUTPUT_GRADIENT))
    normed = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
    assert np.allclose(
        whole(per_rank(record, StepKind.RESULT, FORWARD, Content.OUTPUT)), normed * weight, rtol=1e-5
    )
    for gradient in per_rank(record, StepKind.GRADIENT, BACKWARD, Content.GRADIENT):
        assert np.allclose(values(gradient)[0], (given * normed).sum(0), rtol=1e-4)
    assert record.agrees


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_loss_is_the_mean_cross_entropy_of_the_labels_that_count(ranks: int) -> None:
    record = record_walkthrough("loss/vocab_parallel", ranks=ranks)
    logits = whole(per_rank(record, StepKind.CUT, FORWARD, Content.PARAMETER))
    labels = [row.item for row in per_rank(record, StepKind.OWNERS, FORWARD, Content.LOCAL_ROWS)[0].rows]
    exponentials = np.exp(logits)
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    counted = [(token, label) for token, label in enumerate(labels) if label is not None]
    expected = np.zeros_like(logits)
    for token, label in counted:
        expected[token] = probabilities[token] / len(counted)
        expected[token, label] -= 1 / len(counted)
    loss = -np.mean([np.log(probabilities[token, label]) for token, label in counted])
    assert 0 < len(counted) < len(labels)
    for output in per_rank(record, StepKind.RESULT, FORWARD, Content.OUTPUT):
        assert np.allclose(values(output), loss, rtol=1e-5)
    assert np.allclose(
        whole(per_rank(record, StepKind.GRADIENT, BACKWARD, Content.GRADIENT)), expected, atol=1e-6
    )
    assert record.agrees


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    "subject", [subject for subject in subjects() if subject not in (*BY_DATA, "layers/pipeline")]
)
def test_every_rank_sends_what_the_formula_says(subject: str, ranks: int) -> None:
    record = record_walkthrough(subject, ranks=ranks)
    for phase, formula in zip(Phase, formula_bytes(record), strict=True):
        assert {record.sent_bytes(rank, phase) for rank in range(ranks)} == {formula.bytes}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("subject", ROUTED)
def test_routed_sends_each_distinct_row_once_to_each_rank_that_needs_it(subject: str, ranks: int) -> None:
    record = record_walkthrough(subject, ranks=ranks)
    ids = values(per_rank(record, StepKind.INPUT, FORWARD, Content.IDS)[0]).astype(int).ravel()
    owned = [
        {row.item for row in matrix.rows}
        for matrix in per_rank(record, StepKind.CUT, FORWARD, Content.PARAMETER)
    ]
    row_bytes = record.sizes.hidden * record.sizes.element_bytes
    for transfer, back in zip(sent(record, FORWARD), sent(record, BACKWARD), strict=True):
        needed = set(np.split(ids, ranks)[transfer.destination]) & owned[transfer.source]
        wanted_back = set(np.split(ids, ranks)[back.source]) & owned[back.destination]
        assert (transfer.rows, transfer.bytes) == (len(needed), len(needed) * row_bytes)
        assert (back.rows, back.bytes) == (len(wanted_back), len(wanted_back) * row_bytes)
    bound = formula_bytes(record)[0]
    assert bound.is_bound
    assert max(record.sent_bytes(rank, FORWARD) for rank in range(ranks)) <= bound.bytes


def sent(record: Walkthrough, phase: Phase) -> tuple[Transfer, ...]:
    exchange = record.step(StepKind.EXCHANGE, phase).exchange
    assert exchange is not None
    return exchange.transfers


@pytest.mark.parametrize("subject", list(subjects()))
def test_a_transfer_carries_the_block_that_its_source_holds_and_its_destination_gets(subject: str) -> None:
    record = record_walkthrough(subject, ranks=3)
    for step in record.steps:
        if step.exchange is None or step.exchange.collective is CollectiveKind.ALL_REDUCE:
            continue
        for transfer in step.exchange.transfers:
            holds = step.of_rank(transfer.source).holds
            left = next(matrix for matrix in holds if matrix.peer in (transfer.destination, None))
            came = next(
                matrix
                for matrix in step.of_rank(transfer.destination).gets
                if matrix.content is Content.RECEIVED and matrix.peer == transfer.source
            )
            assert [row.values for row in left.rows] == [row.values for row in came.rows]
            assert transfer.rows == len(came.rows)
            assert transfer.zero_rows == sum(not any(row.values) for row in came.rows)
            assert transfer.bytes == sum(len(row.values) for row in came.rows) * record.sizes.element_bytes


def test_the_mask_leaves_zero_rows_where_another_rank_owns_the_id() -> None:
    record = record_walkthrough("embedding/rowwise")
    for rank in range(2):
        for block in record.step(StepKind.COMPUTE, FORWARD).of_rank(rank).holds:
            for row in block.rows:
                assert (row.role is Role.ZERO) == (row.owner != rank) == (not any(row.values))


def unmasked(shard: EmbeddingShard, weight: Tensor, ids: Tensor) -> Tensor:
    """A rowwise look-up that forgot its mask."""
    rows = shard.ownership.local(ids)
    show("own_rows", torch.where(shard.ownership.owner(ids) == shard.site.axis.rank, rows, -1))
    return torch.nn.functional.embedding(rows, weight)


def test_a_forgotten_mask_is_seen_in_the_record_and_in_every_rendering(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rowwise, "look_up_own", unmasked)
    record = record_walkthrough("embedding/rowwise")
    result = record.step(StepKind.RESULT, FORWARD)
    assert result.difference is not None
    # token 0 wants row 50 of rank 1, and rank 0 added its own row 10
    assert matrix_of(result, 0, Content.OUTPUT).rows[0].values[0] == 60
    # and to token 1, of its own row 20, rank 1 added its row 63 in the last column
    assert result.difference.largest == 63
    assert not record.agrees
    explained = explain_walkthrough(record)
    said = "NOT equal to the unsharded module: the largest difference is 63."
    assert [step.agreement for step in explained.steps if step.kind is StepKind.RESULT] == [said]
    assert said in printed(record, 90)
    assert f'class="agreement wrong">{said}' in walkthrough_html([explained])


def test_a_gradient_that_is_not_summed_is_seen_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    real = exchanges.swap_rows_now

    def loses_a_row(*arguments: object, by_data: bool = False, **_: object) -> Tensor:
        rows = real(*arguments, by_data=by_data)  # type: ignore[arg-type]
        if torch._C._current_graph_task_id() != -1:
            rows[0] = 0
        return rows

    monkeypatch.setattr(collectives, "swap_rows_now", loses_a_row)
    record = record_walkthrough("embedding/routed")
    gradient = record.step(StepKind.GRADIENT, BACKWARD).difference
    assert record.step(StepKind.RESULT, FORWARD).difference == dataclasses.replace(
        record.step(StepKind.RESULT, FORWARD).difference or pytest.fail("no difference"), largest=0.0
    )
    assert gradient is not None
    assert not gradient.agrees


def test_a_style_that_issues_other_collectives_is_refused_and_not_described(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PartialGradients, "_reduce", lambda *_: None)
    with pytest.raises(RunError, match="rank 0 issued none in backward, where one all_reduce was expected"):
        record_walkthrough("norm/sequence_parallel")


def test_a_rank_that_fails_ends_the_others_and_its_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(ids_BS: Tensor, ownership: object, rank: int) -> object:
        raise ZeroDivisionError(f"rank {rank}")

    real = ownership.route
    monkeypatch.setattr(
        routed, "route", lambda ids, ownership, rank: (fails if rank == 1 else real)(ids, ownership, rank)
    )
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="rank 1"):
        record_walkthrough("embedding/routed")
    assert threading.active_count() == before


def test_ranks_that_issue_different_collectives_are_told_so() -> None:
    def work(rank: int, mesh: object, log: object) -> None:
        from shardwise.core.collective import Origin
        from shardwise.core.placement import Partial, Replicate
        from shardwise.parallel.axis import Axis

        axis = Axis.of(mesh, "tp")  # type: ignore[arg-type]
        origin = Origin("module", None, Partial(), Replicate())
        if rank == 0:
            exchanges.sum_now(torch.ones(2), axis, origin)
        else:
            exchanges.gather_now(torch.ones(2), 0, axis, 4, origin)

    with pytest.raises(
        RunError, match="ranks issued different collectives at one time: all_reduce, all_gather"
    ):
        on_threads(2, work)


def test_recording_leaves_nothing_behind_and_heeds_nothing_around_it() -> None:
    state = torch.get_rng_state()
    groups = dict(torch.distributed.distributed_c10d._world.pg_map)
    before = threading.active_count()
    expected = record_walkthrough("embedding/replicated")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            assert record_walkthrough("embedding/replicated") == expected
            assert record_walkthrough("loss/vocab_parallel").agrees
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert threading.active_count() == before
    assert dict(torch.distributed.distributed_c10d._world.pg_map) == groups


def test_interleaved_ownership_lets_the_hot_rank_send_less() -> None:
    hot, dealt = (record_walkthrough(subject) for subject in ROUTED)
    assert max(hot.sent_bytes(rank, FORWARD) for rank in range(2)) > max(
        dealt.sent_bytes(rank, FORWARD) for rank in range(2)
    )


def tokens_of(matrices: Sequence[Matrix]) -> list[int]:
    return [row.token for matrix in matrices for row in matrix.rows if row.token is not None]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_tokens_go_to_the_expert_that_was_chosen_and_come_back_to_their_place(ranks: int) -> None:
    record = record_walkthrough("experts/experts", ranks=ranks)
    scale = whole(per_rank(record, StepKind.CUT, FORWARD, Content.PARAMETER))
    inputs = per_rank(record, StepKind.INPUT, FORWARD, Content.INPUT)
    x = whole(inputs)
    chosen = np.array([row.item for matrix in inputs for row in matrix.rows], dtype=np.int64)
    given = whole(per_rank(record, StepKind.GRADIENT_IN, BACKWARD, Content.OUTPUT_GRADIENT))
    expected = np.zeros_like(scale)
    np.add.at(expected, chosen, given * x)
    assert np.array_equal(
        whole(per_rank(record, StepKind.RESULT, FORWARD, Content.OUTPUT)), x * scale[chosen]
    )
    gradients = per_rank(record, StepKind.GRADIENT, BACKWARD, Content.GRADIENT)
    assert np.array_equal(whole(gradients), expected)
    of_inputs = per_rank(record, StepKind.INPUT_GRADIENT, BACKWARD, Content.INPUT_GRADIENT)
    assert np.array_equal(whole(of_inputs), given * scale[chosen])
    assert record.agrees
    made = per_rank(record, StepKind.COMPUTE, FORWARD, Content.MADE)
    for rank, matrix in enumerate(made):
        assert {row.item for row in matrix.rows} <= {2 * rank, 2 * rank + 1}
    assert sorted(tokens_of(made)) == list(range(3 * ranks))
    assert max(len(matrix.rows) for matrix in made) > min(len(matrix.rows) for matrix in made)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_experts_exchange_counts_and_each_token_whose_expert_is_elsewhere_there_and_back(ranks: int) -> None:
    record = record_walkthrough("experts/experts", ranks=ranks)
    moved = sum(
        row.owner != rank
        for rank, matrix in enumerate(per_rank(record, StepKind.INPUT, FORWARD, Content.INPUT))
        for row in matrix.rows
    )
    by_part = {
        (step.phase, step.part): sum(transfer.rows or 0 for transfer in step.exchange.transfers)
        for step in record.steps
        if step.exchange is not None
    }
    pairs = ranks * (ranks - 1)
    assert by_part == {(FORWARD, "counts"): pairs} | {
        (phase, part): moved for phase in Phase for part in ("there", "back")
    }
    forward, backward = formula_bytes(record)
    assert forward.is_bound
    for phase, bound in ((FORWARD, forward), (BACKWARD, backward)):
        assert sum(record.sent_bytes(rank, phase) for rank in range(ranks)) <= ranks * bound.bytes


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_ring_gives_the_mean_of_all_values_that_a_token_may_see(ranks: int) -> None:
    record = record_walkthrough("attention/ring", ranks=ranks)
    x = whole(per_rank(record, StepKind.INPUT, FORWARD, Content.INPUT))
    seen = np.tril(np.ones((2 * ranks, 2 * ranks))) / np.arange(1, 2 * ranks + 1)[:, None]
    output = whole(per_rank(record, StepKind.RESULT, FORWARD, Content.OUTPUT))
    assert np.allclose(output[:, 0], seen @ x[:, 1], rtol=1e-6)
    given = whole(per_rank(record, StepKind.GRADIENT_IN, BACKWARD, Content.OUTPUT_GRADIENT))
    gradient = whole(per_rank(record, StepKind.INPUT_GRADIENT, BACKWARD, Content.INPUT_GRADIENT))
    assert np.allclose(gradient[:, 1], seen.T @ given[:, 0], rtol=1e-6)
    assert not gradient[:, 0].any()
    assert record.agrees


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_on_a_ring_all_ranks_have_the_same_work_and_keys_go_all_the_way_round(ranks: int) -> None:
    record = record_walkthrough("attention/ring", ranks=ranks)
    meets = [values(matrix) for matrix in per_rank(record, StepKind.ROUTE, FORWARD, Content.MEETS)]
    assert len({int(np.isfinite(each).sum()) for each in meets}) == 1
    exchanges = [(step.phase, step.part, step.turn) for step in record.steps if step.exchange is not None]
    turns = range(1, ranks)
    assert sorted(exchanges) == sorted(
        [(FORWARD, "keys", turn) for turn in turns]
        + [(BACKWARD, part, turn) for part in ("keys", "gradients") for turn in turns]
    )
    for step in record.steps:
        if step.exchange is not None:
            ways = {(each.source, each.destination) for each in step.exchange.transfers}
            assert ways == {(rank, (rank + 1) % ranks) for rank in range(ranks)}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_pipeline_gives_the_product_of_its_layers_and_sends_to_neighbours_alone(ranks: int) -> None:
    record = record_walkthrough("layers/pipeline", ranks=ranks)
    scale = whole(per_rank(record, StepKind.CUT, FORWARD, Content.PARAMETER))
    result = record.step(StepKind.RESULT, FORWARD)
    x = np.arange(1, 2 * ranks + 1)[:, None].astype(np.float64)
    assert np.array_equal(values(matrix_of(result, ranks - 1, Content.OUTPUT)), x * scale.prod(0))
    given = np.arange(1, 2 * ranks + 1)[:, None].astype(np.float64)
    others = scale.prod(0) / scale
    gradients = whole(per_rank(record, StepKind.GRADIENT, BACKWARD, Content.GRADIENT))
    assert np.allclose(gradients, (given * x).sum() * others)
    assert record.agrees
    forward, backward = formula_bytes(record)
    assert [record.sent_bytes(rank, FORWARD) for rank in range(ranks)] == [forward.bytes] * (ranks - 1) + [0]
    assert [record.sent_bytes(rank, BACKWARD) for rank in range(ranks)] == [0] + [backward.bytes] * (
        ranks - 1
    )
    for step in record.steps:
        if step.exchange is not None:
            assert {abs(each.source - each.destination) for each in step.exchange.transfers} == {1}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_stage_runs_nothing_before_what_it_needs_and_the_bubble_is_the_schedules(ranks: int) -> None:
    record = record_walkthrough("layers/pipeline", ranks=ranks)
    lanes = [values(matrix) for matrix in per_rank(record, StepKind.ROUTE, FORWARD, Content.LANES)]
    assert {lane.shape for lane in lanes} == {(2, 2 * (2 * ranks - 1))}
    slot = {
        (stage, way, int(lane[way, at])): at
        for stage, lane in enumerate(lanes)
        for way in (0, 1)
        for at in np.flatnonzero(np.isfinite(lane[way]))
    }
    assert len(slot) == 2 * ranks * ranks
    for stage in range(ranks):
        for number in range(ranks):
            if stage:
                assert slot[stage - 1, 0, number] < slot[stage, 0, number]
                assert slot[stage, 1, number] < slot[stage - 1, 1, number]
        # no two at once, and never more micro-batches kept than stages behind it
        assert not np.isfinite(lanes[stage]).all(0).any()
        kept = np.cumsum(np.isfinite(lanes[stage][0])) - np.cumsum(np.isfinite(lanes[stage][1]))
        assert kept.max() == ranks - stage


def test_a_stage_that_runs_its_layer_twice_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Stage.run

    def twice(stage: Stage, model: nn.Module, part: int, ids: Tensor, received: Tensor | None) -> Tensor:
        return 2 * run(stage, model, part, ids, received)

    monkeypatch.setattr(Stage, "run", twice)
    assert not record_walkthrough("layers/pipeline").agrees


def test_a_ring_whose_gradients_do_not_come_home_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    def stays(x: Tensor, axis: Axis, origin: Origin) -> exchanges.Shift:
        shift = exchanges.begin_shift(x, axis, origin)
        return dataclasses.replace(shift, received=x) if origin.before == Partial() else shift

    monkeypatch.setattr(ring, "begin_shift", stays)
    assert not record_walkthrough("attention/ring").agrees


def test_experts_whose_answers_come_back_to_another_place_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(rows: Tensor, expand: Tensor, weights: Tensor) -> Tensor:
        return combined(rows, expand.roll(1, 0), weights)

    monkeypatch.setattr(experts, "combined", elsewhere)
    assert not record_walkthrough("experts/experts").agrees


@pytest.mark.parametrize("subject", list(subjects()))
def test_a_record_survives_json(subject: str) -> None:
    record = record_walkthrough(subject, module="tok_embeddings")
    assert msgspec.json.decode(msgspec.json.encode(record), type=Walkthrough) == record


def test_an_unknown_subject_is_refused_with_what_there_is() -> None:
    with pytest.raises(OptionError) as raised:
        record_walkthrough("embedding/rowise")
    assert str(raised.value) == (
        'walk-through "embedding/rowise" is unknown. Did you mean "embedding/rowwise"? Allowed: '
        "embedding/rowwise, embedding/colwise, embedding/routed, embedding/routed-interleaved, "
        "embedding/replicated, linear/colwise, linear/rowwise, norm/sequence_parallel, loss/vocab_parallel, "
        "experts/experts, attention/ring, layers/pipeline."
    )


def test_a_number_of_ranks_that_is_no_toy_is_refused() -> None:
    with pytest.raises(OptionError) as raised:
        record_walkthrough("embedding/rowwise", ranks=8)
    assert str(raised.value) == "a walk-through on 8 ranks is not offered. Allowed: 2, 3, 4."


def test_a_matrix_with_rows_of_different_lengths_is_refused() -> None:
    record = record_walkthrough("embedding/rowwise")
    matrix = record.steps[0].panels[0].holds[0]
    with pytest.raises(ValueError, match=r"matrix parameter: rows have \[3, 4\] values"):
        dataclasses.replace(
            matrix, rows=(*matrix.rows, dataclasses.replace(matrix.rows[0], values=(1.0, 2.0, 3.0)))
        )


def test_words_say_the_numbers_of_the_record_and_no_others() -> None:
    record = record_walkthrough("embedding/rowwise")
    words = {step.kind: step.words for step in explain_walkthrough(record).steps if step.phase is BACKWARD}
    assert (
        "Id 5 stands at tokens 0 and 2, so its row gets the sum of their gradients: 100 + 300 = 400"
        in words[StepKind.GRADIENT]
    )
    steps = tuple(
        times_ten(step) if step.kind in (StepKind.GRADIENT_IN, StepKind.GRADIENT) else step
        for step in record.steps
    )
    changed = explain_walkthrough(dataclasses.replace(record, steps=steps))
    assert "1000 + 3000 = 4000" in changed.steps[-1].words


def times_ten(step: Step) -> Step:
    def scaled(matrix: Matrix) -> Matrix:
        rows = tuple(
            dataclasses.replace(row, values=tuple(10 * (value or 0) for value in row.values))
            for row in matrix.rows
        )
        return dataclasses.replace(matrix, rows=rows)

    return dataclasses.replace(
        step,
        panels=tuple(
            dataclasses.replace(panel, holds=tuple(map(scaled, panel.holds))) for panel in step.panels
        ),
    )


@pytest.mark.parametrize(("ranks", "width"), [(2, 80), (3, 100)])
@pytest.mark.parametrize("subject", list(subjects()))
def test_every_step_has_words_labels_and_a_place_in_the_terminal(
    subject: str, ranks: int, width: int
) -> None:
    record = record_walkthrough(subject, ranks=ranks)
    explained = explain_walkthrough(record)
    for step in explained.steps:
        assert step.title
        assert step.words
        for panel in step.panels:
            for matrix in (*panel.holds, *panel.gets):
                assert len(matrix.row_labels) == len(matrix.matrix.rows)
                assert len(matrix.column_labels) in (
                    0,
                    len(matrix.matrix.rows[0].values) if matrix.matrix.rows else len(matrix.column_labels),
                )
    text = printed(record, width)
    assert max(map(len, text.splitlines())) <= width
    assert all(step.title in text for step in explained.steps)
    assert all(f"Rank {rank}" in text for rank in range(ranks))


def printed(record: Walkthrough, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    render_walkthrough(explain_walkthrough(record), console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_without_colour_a_zero_of_another_ranks_row_is_a_dot() -> None:
    lines = printed(record_walkthrough("embedding/rowwise"), 90).splitlines()
    assert any(
        "token 0 · id 5  ·  ·  ·  ·" in line and "token 0 · id 5 50 51 52 53" in line for line in lines
    )


@pytest.mark.parametrize(
    "name", [HOSTILE_MARKUP, "</script><script>alert(1)</script>", "\x1b[31mred", "x" * 5000]
)
def test_a_hostile_module_name_stays_text(name: str) -> None:
    record = record_walkthrough("embedding/routed", module=name)
    page = walkthrough_html([explain_walkthrough(record)])
    assert page.count("<script") == page.count("</script") == 1
    assert "<img" not in page
    assert "\x1b" not in printed(record, 80)


def test_a_page_has_a_tab_for_each_walk_through_and_no_address_of_another_place() -> None:
    page = walkthrough_html([explain_walkthrough(record_walkthrough(subject)) for subject in subjects()])
    for subject in subjects():
        assert page.count(f'href="#{subject}/1"') == 1
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page
    assert len(page) < 400_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (50.0, "50"),
        (-0.0, "0"),
        (0.077, "0.077"),
        (-0.3051, "-0.305"),
        (6.1499, "6.15"),
        (62.512, "62.5"),
    ],
)
def test_a_number_is_short_enough_to_stand_among_others(value: float | None, text: str) -> None:
    assert format_value(value) == text


class Table(nn.Embedding):
    """A table of somebody else's."""


@pytest.mark.parametrize(
    ("module", "style", "subject"),
    [
        (nn.Linear(2, 2), {"style": "rowwise", "output": "replicate"}, "linear/rowwise"),
        (nn.Embedding(2, 2), "routed", "embedding/routed"),
        (Table(2, 2), {"style": "routed", "ownership": "interleaved"}, "embedding/routed-interleaved"),
        (nn.LayerNorm(2), "sequence_parallel", "norm/sequence_parallel"),
        (nn.Linear(2, 2), "gather_input", None),
        (nn.Conv2d(1, 1, 1), "rowwise", None),
    ],
)
def test_a_walk_through_is_looked_up_by_what_a_module_is_and_its_style_and_there_may_be_none(
    module: nn.Module, style: object, subject: str | None
) -> None:
    about = subject_of(kind_of(module), Style.from_value(style))
    assert (about and about.name) == subject
