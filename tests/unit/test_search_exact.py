"""A search's answer is what trying everything gives: on spaces small enough, with real pieces and predict."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest

from shardwise.core.case import Case
from shardwise.core.machine import Machine
from shardwise.core.mesh import Mesh
from shardwise.core.pipeline import recomputed_spans
from shardwise.core.prediction import Prediction, Setup
from shardwise.core.program import Program
from shardwise.core.search import SEQUENCE, Candidate, Group, can_be
from shardwise.predict.machines import load_machine
from shardwise.predict.predict import predict
from shardwise.search.bounds import Bounds
from shardwise.search.costs import Costs, waits_s
from shardwise.search.ends import LIGHTER
from shardwise.search.piece import Piece, Traced, Unfit, piece_of
from shardwise.search.problem import Outcome, Problem
from shardwise.search.queue import Node
from shardwise.search.solve import Solver
from shardwise.search.tipping import CONSTANTS
from shardwise.verbs.search.pieces import AskFacts, AskGroups, AskProgram, Facts, answer
from shardwise.verbs.search.space import Choices, Wanted, candidates, restricted

MACHINE = load_machine("h100-sxm-80gb")
GIB = 2**30


@cache
def traced(case: Case, piece: Piece) -> Traced:
    told = answer(AskProgram(case, piece, "cuda"))
    assert isinstance(told, Program | Unfit)
    return told


@cache
def facts(case: Case) -> Facts:
    told = answer(AskFacts(case))
    assert isinstance(told, Facts)
    return told


@cache
def groups(case: Case, tp: int) -> tuple[Group, ...]:
    told = answer(AskGroups(case, Mesh((("tp", tp),))))
    assert isinstance(told, tuple)
    return told


def case_of(model: str) -> Case:
    return Case.of(model=model, mesh="tp=1", dtype="bfloat16", seq=64, batch=8, random_ids=True)


def problem_of(
    case: Case,
    devices: int,
    fix: Sequence[str],
    memory_bytes: float = math.inf,
    recompute: tuple[str, ...] = ("none", "full"),
    *,
    partly: bool = False,
    machine: Machine = MACHINE,
) -> Problem:
    wanted, layers = Wanted.of(fix, ()), facts(case).layers
    free = [each for each in range(1, devices + 1) if devices % each == 0]
    degrees = {axis: wanted.degrees(axis, free, devices) for axis in ("pp", "dp", "fsdp", "tp")}
    degrees |= {axis: wanted.degrees(axis, (1,), devices) for axis in ("cp", "ep")}
    by_tp = {tp: restricted(groups(case, tp), wanted) for tp in degrees["tp"]}
    sizes = tuple(map(int, wanted.allowed("micro-batch", ("1", "2"))))
    choices = Choices(devices, 8, degrees, sizes, (1,), (True,), case.step.batch, layers, False)
    return Problem(
        machine,
        Setup(),
        tuple(candidates(choices, by_tp, Counter())),
        lambda candidate: by_tp[candidate.mesh.tp],
        recompute,
        layers,
        memory_bytes,
        partly=partly,
    )


def solved(case: Case, problem: Problem, top: int = 3) -> Outcome:
    def trace(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Traced]]:
        yield from ((piece, traced(case, piece)) for piece in pieces)

    return Solver(problem, trace, 1).run(top)


def every(problem: Problem) -> Iterator[Candidate]:
    """All candidates of a space: every style of each group, every recompute."""
    for base in dict.fromkeys(replace(each, styles=()) for each in problem.candidates):
        own = problem.groups(base)
        for options in product(*(group.options for group in own)):
            styles = tuple(zip((group.name for group in own), options, strict=True))
            if can_be(dict(styles)):
                for kind in problem.recompute:
                    least = 1 if problem.partly else problem.layers
                    for layers in (0,) if kind == "none" else range(least, problem.layers + 1):
                        yield replace(base, styles=styles, recompute=kind, recomputed=layers)


@cache
def predicted(case: Case, candidate: Candidate, layers: int, machine: Machine) -> Prediction | None:
    """None where it can't be. Memory is simulated, which takes longer than anything else here."""
    program = traced(case, piece_of(candidate, layers))
    if not isinstance(program, Program):
        return None
    return predict(program, machine, Setup(candidate.mesh, candidate.micro_batches))


def tried(case: Case, problem: Problem) -> dict[Candidate, Prediction]:
    """All that fit, by predict."""
    machine = problem.machine
    every_one = {each: predicted(case, each, problem.layers, machine) for each in every(problem)}
    limit = problem.memory_bytes
    return {
        each: found
        for each, found in every_one.items()
        if found is not None and found.memory.device_bytes <= limit
    }


BLOCKS_CUT = ("output=cut", "layers.*.attention=cut", "layers.*.feed_forward=cut")
SMALL = ("llama3-debug", 2, (*BLOCKS_CUT, "micro-batch=2", "sequence=cut"))
LARGER = (
    ("llama3-debug?n_layers=2", 2, ("tp=2", "output=cut", "micro-batch=1")),
    ("llama3-debug?n_layers=2", 4, ("tp=1,2", *BLOCKS_CUT)),
    ("gpt-debug?n_layers=2", 2, ("output=cut", "micro-batch=2")),
    ("moe-debug", 2, ("output=cut", "layers.*.attention=cut", "micro-batch=1")),
)
SPACES = [SMALL, *(pytest.param(*space, marks=pytest.mark.full) for space in LARGER)]


@pytest.mark.parametrize(("model", "devices", "fix"), SPACES)
def test_the_best_is_the_best_of_all_whatever_memory_there_is(
    model: str, devices: int, fix: tuple[str, ...]
) -> None:
    case = case_of(model)
    known = tried(case, problem_of(case, devices, fix))
    needed = sorted(each.memory.device_bytes for each in known.values())
    fastest = min(known.values(), key=lambda each: each.step_s).memory.device_bytes
    limits = [math.inf, fastest - 1, needed[len(needed) // 3], needed[0]]
    for limit in limits:
        problem = problem_of(case, devices, fix, limit)
        best = min(tried(case, problem).values(), key=lambda each: each.step_s)
        outcome = solved(case, problem)
        assert outcome.gap == 0
        assert outcome.answers[0].prediction.step_s == pytest.approx(best.step_s, rel=1e-9), limit
        assert outcome.answers[0].prediction.memory.device_bytes <= limit


def test_once_the_best_is_proved_no_runner_up_is_looked_at_when_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = case_of("llama3-debug")
    _, devices, fix = SMALL

    def trace(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Traced]]:
        yield from ((piece, traced(case, piece)) for piece in pieces)

    solver = Solver(problem_of(case, devices, fix), trace, 1)
    look = solver._look

    def look_before_the_proof(bound: float, node: Node) -> None:
        assert not solver.outcome.answers
        look(bound, node)

    monkeypatch.setattr(solver, "_look", look_before_the_proof)
    monkeypatch.setattr("time.monotonic", lambda: 1e9 if solver.outcome.answers else 0.0)
    outcome = solver.run(50, seconds=60)
    assert outcome.gap == 0
    assert len(outcome.answers) == 1
    assert outcome.stopped is None


def test_less_memory_than_any_plan_needs_is_answered_with_the_least_that_would_do() -> None:
    case = case_of("llama3-debug")
    _, devices, fix = SMALL
    least = min(each.memory.device_bytes for each in tried(case, problem_of(case, devices, fix)).values())
    outcome = solved(case, problem_of(case, devices, fix, least * 0.5))
    assert not outcome.answers
    assert outcome.needed_bytes <= least


def test_a_bound_that_is_too_high_loses_the_best_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: what the bounds are held by sees it."""
    case = case_of("llama3-debug")
    _, devices, fix = SMALL
    problem = problem_of(case, devices, fix)
    best = min(tried(case, problem).values(), key=lambda each: each.step_s)
    right = Bounds.step_s

    def too_high(self: Bounds, candidate: Candidate, **kwargs: Any) -> float:
        factor = 10.0 if candidate.axes == best.axes else 1.0
        return factor * right(self, candidate, **kwargs)

    monkeypatch.setattr(Bounds, "step_s", too_high)
    assert solved(case, problem).answers[0].prediction.step_s > best.step_s * (1 + 1e-9)


@pytest.mark.parametrize(("model", "devices", "fix"), SPACES)
def test_no_candidate_takes_less_than_its_bound_or_holds_less(
    model: str, devices: int, fix: tuple[str, ...]
) -> None:
    case = case_of(model)
    problem = problem_of(case, devices, fix)
    for candidate, found in tried(case, problem).items():
        first = {group.name: group.options[0] for group in problem.groups(candidate)}
        if any(option != first[name] for name, option in candidate.styles if name != SEQUENCE):
            continue
        own = piece_of(candidate, problem.layers)
        for piece, bounded in ((own.root, candidate), (own, candidate.without_recompute())):
            program = traced(case, piece)
            assert isinstance(program, Program)
            bounds = Bounds(program, MACHINE, Setup())
            assert bounds.step_s(bounded) <= found.step_s * (1 + 1e-9), candidate
            least = bounds.needs.device_bytes(candidate, candidate.recompute)
            assert least <= found.memory.device_bytes * (1 + 1e-9), candidate


def costs_of(case: Case, problem: Problem) -> Costs:
    """Who knows the roots and what tells FSDP's collectives, as a search does at its start."""
    costs = Costs(problem, Outcome())
    for candidate in problem.candidates:
        for piece in (problem.piece_of(candidate).root, costs.sharding_piece_of(candidate)):
            if piece is not None:
                costs.pieces[piece] = traced(case, piece)
    return costs


OTHER = ("output=cut", "tok_embeddings=rowwise", "micro-batch=2")


def kept_whole(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Those over FSDP's ranks, with parameters kept after the forward."""
    return (replace(each, reshard=False) for each in candidates if each.mesh.fsdp > 1)


FEW_WORDS = "llama3-debug?n_layers=4,vocab_size=512"
OTHERS = [
    (FEW_WORDS, 2, (*OTHER, "layers.*.attention=cut", "tp=2")),
    pytest.param(FEW_WORDS, 2, (*OTHER, "tp=2"), marks=pytest.mark.full),
    pytest.param(FEW_WORDS, 4, ("tp=1", "pp=1", "micro-batch=2"), marks=pytest.mark.full),
    pytest.param(FEW_WORDS, 4, (*OTHER, "tp=1,2", "pp=2", "dp=1,2"), marks=pytest.mark.full),
]


@pytest.mark.parametrize(("model", "devices", "fix"), OTHERS)
def test_no_other_styles_or_recompute_fit_with_less_than_they_are_said_to_need(
    model: str, devices: int, fix: tuple[str, ...]
) -> None:
    """Layers that must run again, and seconds, at the limit in which a candidate's tensors just fit."""
    case = Case.of(model=model, mesh="tp=1", dtype="bfloat16", seq=8192, batch=8, random_ids=True)
    kinds = ("none", "selective-ops", "full")
    everything = problem_of(case, devices, fix, math.inf, kinds, partly=True)
    costs = costs_of(case, everything)
    seen = Counter[str]()
    for candidate in (*every(everything), *kept_whole(every(everything))):
        program = traced(case, piece_of(candidate, everything.layers))
        assert isinstance(program, Program)
        found = predict(program, MACHINE, everything.setup_of(candidate), replays=False)
        problem = replace(everything, memory_bytes=found.memory.device_bytes)
        costs.problem = problem
        plain = candidate.without_recompute()
        needs = costs.needs(plain)
        assert needs.device_bytes(candidate, candidate.recompute) <= found.memory.device_bytes, candidate
        if candidate.recomputed:
            few = needs.fewest_layers(plain, candidate.recompute, problem.memory_bytes)
            spans = problem.setup_of(candidate).pipeline().spans(problem.layers)
            again = sum(span.count for span in recomputed_spans(spans, candidate.recomputed))
            assert few is not None, candidate
            assert few <= again, candidate
            seen["some layers are needed"] += few > 1
        least_s = None if problem.is_default(candidate) else costs.restyled_s(problem.with_defaults(plain))
        if least_s is not None:
            assert least_s <= found.step_s * (1 + 1e-9), candidate
            seen["with recompute"] += candidate.recomputed > 0
    assert min(seen.values()) > 0


@pytest.mark.parametrize("words", [64, 64_000])
def test_no_stage_of_a_pipeline_takes_less_than_its_bound_whichever_is_the_busiest(words: int) -> None:
    """Of 1, 2, 2 and 1 layers: those in the middle are, or the last, with its head."""
    case = case_of(f"llama3-debug?n_layers=6,vocab_size={words}")
    for stages, chunks, micro_batches in ((4, 1, 4), (4, 1, 16), (2, 2, 8)):
        for recomputed in (0, 1, 4, 6):
            kind = "full" if recomputed else "none"
            axes = Mesh.parse(f"pp={stages}").axes
            candidate = Candidate(axes, (), 2, micro_batches, kind, recomputed, chunks=chunks)
            own = piece_of(candidate, 6)
            root, program = (traced(case, piece) for piece in (own.root, own))
            assert isinstance(root, Program)
            assert isinstance(program, Program)
            found = predict(program, MACHINE, Setup(candidate.mesh, micro_batches, chunks), replays=False)
            least_s = Bounds(root, MACHINE, Setup()).step_s(candidate)
            assert found.step_s / 2 < least_s <= found.step_s * (1 + 1e-9), candidate


def test_keys_that_go_round_a_ring_are_waited_for_by_no_bound() -> None:
    case = Case.of(model="llama3-8b", mesh="tp=1", dtype="bfloat16", seq=8192, random_ids=True)
    program = traced(case, Piece((("tp", 1),), (), 1))
    assert isinstance(program, Program)
    gathered_s, ring_s = (
        Bounds(program, MACHINE, Setup(), gathers=gathers).step_s(
            Candidate(Mesh.parse("cp=8").axes, (), 1, 4)
        )
        for gathers in (True, False)
    )
    assert ring_s < gathered_s


@pytest.mark.full
def test_other_ends_beside_a_part_of_the_layers_run_again_are_not_lost() -> None:
    """Look-ups are tried with answers alone: the best of all is found all the same, whatever fits. Limits lie
    as far from what plans need as a search tells memory apart."""
    case = case_of("llama3-debug?n_layers=4")
    fix = ("tp=2", "output=cut", "layers.*.attention=cut", "micro-batch=2", "sequence=cut")
    everything = problem_of(case, 2, fix, partly=True)
    known = tried(case, everything)
    needed = sorted(each.memory.device_bytes * (1 + LIGHTER) for each in known.values())
    for limit in (needed[0], needed[len(needed) // 4], needed[len(needed) // 2], math.inf):
        problem = problem_of(case, 2, fix, limit, partly=True)
        best = min(tried(case, problem).values(), key=lambda each: each.step_s)
        outcome = solved(case, problem)
        assert outcome.gap == 0
        assert outcome.answers[0].prediction.step_s == pytest.approx(best.step_s, rel=1e-9), limit
        assert outcome.answers[0].prediction.memory.device_bytes <= limit
        assert outcome.traces < len({piece_of(each, problem.layers) for each in known})


PARTLY = [
    ("llama3-debug?n_layers=4", 2, (*BLOCKS_CUT, "micro-batch=2", "fsdp=2")),
    pytest.param("llama3-debug", 2, (*BLOCKS_CUT, "micro-batch=2", "fsdp=2"), marks=pytest.mark.full),
    pytest.param("llama3-debug", 4, (*BLOCKS_CUT, "micro-batch=1", "pp=2", "fsdp=2"), marks=pytest.mark.full),
]


@pytest.mark.parametrize(("model", "devices", "fix"), PARTLY)
def test_as_few_layers_as_make_it_fit_run_again(model: str, devices: int, fix: tuple[str, ...]) -> None:
    case = case_of(model)
    known = tried(case, problem_of(case, devices, fix, partly=True))
    needed = {each.recomputed: found.memory.device_bytes for each, found in known.items()}
    for layers in (1, facts(case).layers // 2):
        problem = problem_of(case, devices, fix, needed[layers], partly=True)
        best = min(tried(case, problem).values(), key=lambda each: each.step_s)
        answer = solved(case, problem).answers[0]
        assert answer.prediction.step_s == pytest.approx(best.step_s, rel=1e-9)
        stages = answer.candidate.mesh.stages  # as many of each run again: what is left over is rounded up
        assert 0 < answer.candidate.recomputed <= -(-layers // stages) * stages
        assert answer.composed_s == pytest.approx(
            best.step_s, rel=0.01
        )  # what its pieces gave, beside predict


@pytest.mark.full
@pytest.mark.parametrize("fix", [("fsdp=2",), ("tp=1", "pp=1")])
def test_recomputing_that_hides_behind_fsdp_s_exchange_costs_no_bound(fix: tuple[str, ...]) -> None:
    """On links so slow that a step waits for them: what layers run again hides all of that, or a part."""
    machine = CONSTANTS["rate of the link within a node"](MACHINE, 0.01)
    case = Case.of(
        model="llama3-debug?n_layers=4", mesh="tp=1", dtype="bfloat16", seq=4096, batch=8, random_ids=True
    )

    def problem(limit: float = math.inf) -> Problem:
        kinds = ("none", "selective-ops", "full")
        return problem_of(case, 2, fix, limit, kinds, partly=True, machine=machine)

    known = tried(case, problem())
    needed = sorted({each.memory.device_bytes * (1 + LIGHTER) for each in known.values()})
    most = max(known.values(), key=lambda each: each.memory.device_bytes)
    assert waits_s(most) > most.step_s / 2
    for limit in [*needed[:: max(1, len(needed) // 8)], math.inf]:
        best = min(tried(case, problem(limit)).values(), key=lambda each: each.step_s)
        outcome = solved(case, problem(limit), top=1)
        assert outcome.gap == 0
        assert outcome.answers[0].prediction.step_s == pytest.approx(best.step_s, rel=1e-9), limit
