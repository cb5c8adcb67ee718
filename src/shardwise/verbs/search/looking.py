"""search: a model and a machine -> Search: the best plan, its runners-up, why they lose, and the proof of
the best."""

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.machine import Machine
from shardwise.core.mesh import NAMES, STAGES_AXIS, TENSOR_AXIS, Mesh, Role
from shardwise.core.plan import ContextAttention
from shardwise.core.prediction import Setup
from shardwise.core.program import Program
from shardwise.core.search import Candidate, Considered, Found, Group, Known, Refused, Search, Space, Tipping
from shardwise.predict.contrast import facts_of
from shardwise.search.piece import piece_of
from shardwise.search.problem import Answer, Outcome, Problem
from shardwise.search.solve import BY_HAND, Solver
from shardwise.search.tipping import tippings
from shardwise.verbs.predict import MACHINE, SEQ
from shardwise.verbs.programs import set_up
from shardwise.verbs.progress import Progress, silent, so_far
from shardwise.verbs.search.exported import exported
from shardwise.verbs.search.options import SearchOptions
from shardwise.verbs.search.pieces import PRELOAD, Ask, Facts, Told, answer
from shardwise.verbs.search.proof import PROOF_STOPPED, proof_mesh, proved
from shardwise.verbs.search.space import (
    CHUNKS,
    RESHARD,
    Choices,
    Wanted,
    candidates,
    free_degrees,
    of_recompute,
    restricted,
    within_node,
)
from shardwise.verbs.search.tracing import Tracing
from shardwise.workers.processes import Processes

MICRO_BATCHES = (1, 2, 4, 8)
TOKENS = 2**20
"""Of a step, at least, where no batch is given; and a sequence for each device."""
TIES = 0.01
"""Plans whose steps differ by less are ties on any machine."""
MOST_SHOWN = 5000
"""Of the candidates that only bounds are known of, so many are kept for the picture."""
_RUNNER_UP = "only the best is proved"
_KILLED = "a process of the search was killed: out of memory? Search a smaller space, by --fix."


def search(
    case: Case,
    options: SearchOptions | None = None,
    progress: Progress = silent,
    *,
    workers: int | None = None,
) -> Search:
    """The best plans of the case's model on its machine; its plans and mesh don't count. batch by default:
    a million tokens, and a sequence for each device; seq: 8192. A KeyboardInterrupt ends it with the best
    so far. Raises InputErrors of the model and the options, and RunError."""
    from shardwise.predict.machines import load_machine

    options, started = options or SearchOptions(), time.perf_counter()
    machine = load_machine(case.machine or MACHINE)
    devices = options.devices or machine.devices_per_node
    _check_devices(machine, devices)
    step = replace(case.step, seq=case.step.seq or SEQ, accumulation=1)
    step = replace(step, batch=step.batch or devices * -(-TOKENS // (step.seq * devices)))
    case = replace(case, step=step, plans=(), mesh=Mesh(()))
    options = replace(options, devices=devices)
    progress("starting")
    count = workers or os.cpu_count() or 1
    with Processes[Ask, Told](answer, count, _KILLED, PRELOAD, set_up) as processes:
        tracing = Tracing(case, machine.device, processes)
        looking = _Looking(case, options, machine, devices, tracing, progress, count)
        found = looking.search(started)
    found = looking.proved(found) if options.verify else found
    return exported(found, case, options, progress) if options.export is not None else found


def problem_of(
    case: Case,
    machine: Machine,
    setup: Setup,
    space: Space,
    found: Sequence[Candidate],
    groups: Mapping[int, tuple[Group, ...]],
    layers: int,
) -> Problem:
    """What the solver is given. found: all candidates; groups: by tp; layers: of the model."""
    return Problem(
        machine,
        setup,
        tuple(found),
        lambda candidate: groups[candidate.mesh.tp],
        space.recompute,
        layers,
        space.memory_bytes,
        gathers_keys=case.context_attention == ContextAttention.GATHER,
    )


def _check_devices(machine: Machine, devices: int) -> None:
    from shardwise.predict.check import check_devices
    from shardwise.verbs.sweep import MOST_DEVICES

    if devices > MOST_DEVICES:
        raise OptionError(f"--devices {devices}: use 1 to {MOST_DEVICES:,}.")
    check_devices(machine, Mesh.of({Role.CUTS_TENSORS: devices}))


class _Looking:
    """One search."""

    def __init__(
        self,
        case: Case,
        options: SearchOptions,
        machine: Machine,
        devices: int,
        tracing: Tracing,
        progress: Progress,
        workers: int,
    ) -> None:
        self.case, self.options, self.machine, self.devices = case, options, machine, devices
        self.tracing, self.progress, self.workers = tracing, progress, workers
        self.setup = options.setup(None, case.step)
        self.wanted = Wanted.of(options.fix, options.forbid)
        self.seconds: dict[str, float] = {}
        given = options.memory * 2**30 if options.memory is not None else machine.memory_bytes
        self.memory_bytes = given
        self.twin_plans: list[str | None] = []

    def search(self, started: float) -> Search:
        facts = self._facts()
        space, choices, groups, refused = self._space(facts)
        found = list(candidates(choices, groups, refused))
        problem = problem_of(self.case, self.machine, self.setup, space, found, groups, facts.layers)
        self.seconds["reading the model"] = time.perf_counter() - started
        solver = Solver(problem, self.tracing.traced, self.workers, self._says)
        began = time.perf_counter()
        outcome = solver.run(self.options.given_out, self.options.seconds, began - started)
        self.seconds["tracing and predicting"] = time.perf_counter() - began
        outcome.refused.update(refused)
        self._check_found(outcome)
        answers = self._found(outcome, facts.layers)
        began = time.perf_counter()
        tipped: tuple[Tipping, ...] = ()
        if outcome.stopped != BY_HAND:
            self.progress("asking what decides")
            tipped = tippings(self.machine, self._with_programs(outcome, facts.layers), self.memory_bytes)
        self.seconds["what decides"] = time.perf_counter() - began
        shown = [*outcome.considered, *_some(solver.queue.unlooked())]
        return Search(
            self.case.model,
            facts_of(self.machine),
            space,
            self.case.step,
            answers,
            tuple(shown),
            tuple(Refused(reason, count) for reason, count in outcome.refused.most_common()),
            tipped,
            outcome.gap,
            self.machine.error,
            len(found),
            outcome.predicted,
            outcome.composed,
            outcome.traces,
            tuple(self.seconds.items()),
            outcome.stopped,
            ruled_out=outcome.ruled_out,
            unlooked=outcome.unlooked,
        )

    def _with_programs(self, outcome: Outcome, layers: int) -> list[tuple[Answer, Program]]:
        found = []
        for each in outcome.answers:
            program = self.tracing.programs[piece_of(each.candidate, layers)]
            assert isinstance(program, Program)
            found.append((each, program))
        return found

    def proved(self, found: Search) -> Search:
        """With the proof of what is recommended, as far as the user lets it go."""
        if found.stopped == BY_HAND or not found.found:
            stopped = tuple(replace(each, why_unproved="the search was stopped") for each in found.found)
            return replace(found, found=stopped)
        began = time.perf_counter()
        pairs = zip(found.found, self.twin_plans, strict=False)
        tried: list[Found] = []
        for each, plan in pairs:
            try:
                tried.append(proved(self.case, each, plan, self.progress))
            except KeyboardInterrupt:
                tried.append(replace(each, why_unproved=PROOF_STOPPED))
                break
        seconds = (*found.seconds, ("proving the best", time.perf_counter() - began))
        return replace(found, found=(*tried, *found.found[len(tried) :]), seconds=seconds)

    def _facts(self) -> Facts:
        facts = self.tracing.facts()
        if facts.max_seq is not None and self.case.step.seq > facts.max_seq:
            raise OptionError(
                f"--seq {self.case.step.seq}: {self.case.model} has positions for {facts.max_seq}. Use --seq "
                f"{facts.max_seq}."
            )
        return facts

    def _space(self, facts: Facts) -> tuple[Space, Choices, dict[int, tuple[Group, ...]], Counter[str]]:
        refused: Counter[str] = Counter()
        per_node, step = self.machine.devices_per_node, self.case.step
        free = free_degrees(self.devices, facts.layers, facts.experts, step.seq)
        if facts.why_no_stages is not None:
            free[STAGES_AXIS] = (1,)
            refused[f"no stages: {facts.why_no_stages}"] += 1
        degrees = {
            axis: self.wanted.degrees(axis, free.get(axis, ()) or _divisors(self.devices), self.devices)
            for axis in NAMES
        }
        wanted_tp = degrees[TENSOR_AXIS]
        degrees[TENSOR_AXIS] = within_node(wanted_tp, self.devices, per_node)
        cutting = [tp for tp in degrees[TENSOR_AXIS] if tp > 1]
        groups = self.tracing.groups(cutting or within_node(free[TENSOR_AXIS], self.devices, per_node))
        self.wanted.check_names([group.name for each in groups.values() for group in each])
        self.wanted.check_ranks(self.devices)
        groups = {
            tp: restricted(each, self.wanted) for tp, each in groups.items() if tp in degrees[TENSOR_AXIS]
        }
        for tp in degrees[TENSOR_AXIS]:
            groups.setdefault(tp, ())
        sizes = self.wanted.allowed("micro-batch", [str(size) for size in self._sizes()])
        chunks = self.wanted.allowed("chunks", [str(each) for each in CHUNKS])
        reshard = self.wanted.allowed("reshard", list(RESHARD))
        choices = Choices(
            self.devices,
            per_node,
            degrees | {TENSOR_AXIS: wanted_tp},
            tuple(map(int, sizes)),
            tuple(map(int, chunks)),
            tuple(RESHARD[each] for each in reshard),
            step.batch,
            facts.layers,
            step.param_dtype is not None or step.reduce_dtype is not None,
        )
        largest = max(groups.values(), key=len, default=())
        space = Space(
            self.devices,
            tuple(degrees.items()),
            largest,
            choices.micro_batches,
            of_recompute(self.wanted),
            choices.chunks,
            choices.reshard,
            self.memory_bytes,
            self.options.fix,
            self.options.forbid,
        )
        return space, choices, groups, refused

    def _sizes(self) -> Sequence[int]:
        given = self.wanted.fixed.get("micro-batch", ())
        for size in given:
            if not size.isdecimal() or not int(size):
                raise OptionError(f"--fix micro-batch={size}: is no number of sequences. Use 1 or more.")
        return tuple(map(int, given)) or MICRO_BATCHES

    def _says(self, best: Answer | None, left: int, traces: int) -> None:
        now = f"{traces:,} pieces traced, {left:,} candidates left"
        if best is not None:
            now = so_far(now, f"{best.candidate.label}, {best.prediction.step_s:.4g} s a step")
        self.progress(now)

    def _check_found(self, outcome: Outcome) -> None:
        """Raises OptionError where nothing can be."""
        if outcome.answers or outcome.stopped is not None:
            return
        if math.isfinite(outcome.needed_bytes):
            gib = outcome.needed_bytes / 2**30
            raise OptionError(
                f"no plan fits in {self.memory_bytes / 2**30:.4g} GiB on {self.devices} devices: the "
                f"least that any needs is {math.ceil(gib * 10) / 10:g} GiB or more. Use more devices, a "
                "smaller batch, or --memory."
            )
        reasons = "; ".join(f"{reason} ({n:,})" for reason, n in outcome.refused.most_common(3))
        raise OptionError(f"no plan can be on {self.devices} devices: {reasons or 'nothing is left'}.")

    def _found(self, outcome: Outcome, layers: int) -> tuple[Found, ...]:
        answers = outcome.answers
        if self.options.verify:
            self.twin_plans = [
                self._twin_plan(each.candidate, layers) for each in answers[: self.options.recommended]
            ]
        best = answers[0].prediction if answers else None
        found = []
        for each in answers:
            assert best is not None
            candidate, prediction = each.candidate, each.prediction
            more = [(term, seconds - dict(best.terms)[term]) for term, seconds in prediction.terms]
            costs = sorted((pair for pair in more if pair[1] > 0), key=lambda pair: -pair[1])
            tie = prediction.step_s / best.step_s - 1 <= max(TIES, self.machine.error or 0.0)
            found.append(
                Found(
                    candidate,
                    self.tracing.plan(piece_of(candidate, layers)),
                    self._settings(candidate, layers),
                    prediction.setup,
                    prediction.tokens,
                    prediction.step_s,
                    each.composed_s,
                    prediction.terms,
                    prediction.memory,
                    tuple(costs) if each is not answers[0] else (),
                    tie and each is not answers[0],
                    why_unproved="--no-verify" if not self.options.verify else _RUNNER_UP,
                )
            )
        return tuple(found)

    def _twin_plan(self, candidate: Candidate, layers: int) -> str | None:
        axes = proof_mesh(candidate.mesh).axes
        return self.tracing.plan(replace(piece_of(candidate, layers), axes=axes))

    def _settings(self, candidate: Candidate, layers: int) -> StepSettings:
        return replace(
            self.case.step,
            accumulation=candidate.micro_batches,
            recompute=candidate.recompute if candidate.recomputed else "none",
            recompute_layers=candidate.recomputed if 0 < candidate.recomputed < layers else None,
            reshard_after_forward=candidate.reshard,
            chunks=candidate.chunks,
        )


def _some(left: Iterator[tuple[Candidate, float]]) -> Iterator[Considered]:
    """Spread over all that only bounds are known of."""
    every = sorted(left, key=lambda pair: pair[1])
    for candidate, bound in every[:: max(1, len(every) // MOST_SHOWN)]:
        yield Considered(candidate, bound, math.nan, Known.BOUND, True)


def _divisors(number: int) -> tuple[int, ...]:
    return tuple(each for each in range(1, number + 1) if number % each == 0)
