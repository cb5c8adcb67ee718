"""A search that is stopped: by Ctrl-C after few traces, and by its seconds."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from shardwise.core.case import Case
from shardwise.core.prediction import Prediction
from shardwise.search.costs import Costs
from shardwise.search.piece import Piece, Traced
from shardwise.search.problem import Outcome, Problem
from shardwise.search.queue import Node
from shardwise.search.solve import BY_HAND, Solver
from tests.matrix import FULL
from tests.unit.test_search_exact import FEW_WORDS, SMALL, case_of, problem_of, solved, traced

CASE = case_of("llama3-debug")
_, DEVICES, FIX = SMALL


def stopped_after(problem: Problem, traces: int, case: Case = CASE) -> tuple[Outcome, list[Piece]]:
    """And what was traced."""
    done: list[Piece] = []

    def trace(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Traced]]:
        for piece in pieces:
            if len(done) == traces:
                raise KeyboardInterrupt
            done.append(piece)
            yield piece, traced(case, piece)

    return Solver(problem, trace, 1).run(3), done


def test_a_search_that_is_stopped_after_its_first_trace_has_a_plan_and_says_what_it_left() -> None:
    problem = problem_of(CASE, DEVICES, FIX)
    outcome, _ = stopped_after(problem, 1)
    assert outcome.stopped == BY_HAND
    (answer,) = outcome.answers
    assert answer.candidate in problem.candidates
    assert (outcome.predicted, outcome.traces) == (1, 1)
    assert outcome.gap == float("inf")  # not all have a bound
    assert outcome.unlooked > 0
    assert outcome.unlooked + outcome.ruled_out + 1 == len(problem.candidates)


@FULL
def test_where_nothing_fits_as_it_is_one_with_all_layers_run_again_is_traced_early() -> None:
    case = Case.of(model=FEW_WORDS, mesh="tp=1", dtype="bfloat16", seq=8192, batch=8, random_ids=True)
    unlimited = problem_of(case, DEVICES, ("fsdp=2", "micro-batch=2"))
    (plain,) = unlimited.candidates
    whole = replace(plain, recompute="full", recomputed=unlimited.layers)
    costs = Costs(unlimited, Outcome())
    costs.pieces |= {piece: traced(case, piece) for piece in map(unlimited.piece_of, (plain, whole))}
    found, again = costs.foreseen(plain), costs.foreseen(whole)
    assert isinstance(found, Prediction)
    assert isinstance(again, Prediction)
    limit = costs.reserving(whole, again).memory.device_bytes
    assert limit < found.memory.device_bytes
    outcome, done = stopped_after(replace(unlimited, memory_bytes=limit), 2, case)
    (answer,) = outcome.answers
    assert answer.candidate == whole
    assert done == [unlimited.piece_of(plain), unlimited.piece_of(whole)]


def test_a_search_whose_seconds_are_over_before_all_have_a_bound_has_a_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each look at the clock is a second later."""
    seconds = iter(range(10**6))
    monkeypatch.setattr("time.monotonic", lambda: float(next(seconds)))

    def trace(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Traced]]:
        yield from ((piece, traced(CASE, piece)) for piece in pieces)

    outcome = Solver(problem_of(CASE, DEVICES, FIX), trace, 1).run(3, seconds=2)
    assert outcome.stopped == "2 seconds were over"
    assert outcome.answers
    assert outcome.unlooked > 0


def test_what_was_being_looked_at_when_a_search_was_stopped_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the gap would not count it."""

    def trace(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Traced]]:
        yield from ((piece, traced(CASE, piece)) for piece in pieces)

    solver = Solver(problem_of(CASE, DEVICES, FIX), trace, 1)
    bounds = []

    def stopped(bound: float, node: Node) -> None:
        bounds.append(bound)
        raise KeyboardInterrupt

    monkeypatch.setattr(solver, "_look", stopped)
    outcome = solver.run(3)
    assert solver.queue.least() <= bounds[0]
    best_s = outcome.answers[0].prediction.step_s
    assert outcome.gap == pytest.approx(max(0.0, 1 - solver.queue.least() / best_s))
    assert outcome.unlooked > 0


@FULL
def test_nothing_is_left_of_a_search_that_is_proved() -> None:
    problem = problem_of(CASE, DEVICES, FIX)
    outcome = solved(CASE, problem)
    assert outcome.gap == 0
    assert outcome.unlooked == 0
    assert 0 <= outcome.ruled_out < len(problem.candidates)
