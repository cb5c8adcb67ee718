"""solve: the best candidates, best first, and the proof that nothing else is better.

Best first: of all candidates the one with the least bound is looked at next, and what is found out about
it raises its bound (its root's, its own piece's, predict's step). A candidate that comes up with its step
known is the best of all that are left: no other can take less than its own bound.

Of a candidate that doesn't fit without recompute, as few layers are recomputed as make it fit. Other styles
of a candidate are looked at where what they save at most would put it before those that are left; what
several change is the sum of what each does. Whatever was put together so is predicted by a Program of its
own before it is given out."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from shardwise.core.errors import InputError
from shardwise.core.pipeline import recomputed_spans
from shardwise.core.prediction import Prediction, Term
from shardwise.core.program import Program
from shardwise.core.search import SEQUENCE, Candidate, Known
from shardwise.predict.check import check_setup
from shardwise.predict.memory import forecast
from shardwise.predict.predict import predict
from shardwise.search.bounds import Bounds
from shardwise.search.composed import ALIKE, are_alike, fewest_layers, singles, styles_of_all
from shardwise.search.piece import Piece, Traced, Unfit
from shardwise.search.problem import Answer, Outcome, Problem
from shardwise.search.queue import Node, Queue, Stage
from shardwise.search.savings import Savings

FAR = 1.5
"""What takes so many times the best one's step isn't given out."""
SLACK = 0.005
"""A candidate that was put together may take so much less than its pieces give; tests hold it."""

BY_HAND = "it was stopped by Ctrl-C"
SURE = 1.05
"""What is put together of pieces, and so many times a device's memory, doesn't fit; its own plan isn't
traced."""

Tracer = Callable[[Sequence[Piece]], Iterator[tuple[Piece, Traced]]]
Says = Callable[["Answer | None", int, int], None]


class Solver:
    """One search. says: told the best so far, how many candidates are left, and how many traces were made."""

    def __init__(self, problem: Problem, trace: Tracer, workers: int, says: Says = lambda *_: None) -> None:
        self.problem, self.outcome = problem, Outcome()
        self._trace, self._workers, self._says = trace, workers, says
        self._pieces: dict[Piece, Traced] = {}
        self._bounds: dict[Piece, Bounds] = {}
        self._savings: dict[Piece, Savings] = {}
        self._predictions: dict[Candidate, Prediction | None] = {}
        self._reserved: dict[Candidate, Prediction] = {}
        self.queue = Queue()
        self._seen: set[Candidate] = set()
        self._known_ones: list[Answer] = []
        self._changes: dict[Candidate, dict[tuple[str, str], tuple[float, float]]] = {}
        self._best: Answer | None = None

    def run(self, top: int, seconds: float = math.inf) -> Outcome:
        """The best, proved, and the best others of those that need no further trace; where there is none,
        the next one. On KeyboardInterrupt, and after so many seconds, what was found by then. Raises what
        the tracer raises."""
        outcome, until = self.outcome, time.monotonic() + seconds
        try:
            self._start()
            while self.queue.is_left() and not (outcome.answers and len(self._ranked()) >= top):
                bound, node = self.queue.pop(self._best_s, in_order=bool(outcome.answers))
                if outcome.answers:
                    if bound > FAR * outcome.answers[0].prediction.step_s:
                        break
                    if len(self._ranked()) > 1 and self._missing(node):
                        continue
                self._look(bound, node)
                if time.monotonic() > until and not outcome.answers:
                    outcome.stopped = f"{seconds:g} seconds were over"
                    self.queue.push(bound, node)  # it may not be through
                    break
        except KeyboardInterrupt:
            outcome.stopped = BY_HAND
        best = self._best
        if outcome.answers:
            outcome.gap = 0.0
        elif best is not None:
            least = self.queue.least()
            outcome.gap = max(0.0, 1 - least / best.prediction.step_s)
        outcome.answers = self._ranked()[:top]
        return outcome

    @property
    def _best_s(self) -> float:
        return self._best.prediction.step_s if self._best is not None else math.inf

    def _ranked(self) -> list[Answer]:
        """All that are known and fit, best first, without those that are like a better one."""
        found: list[Answer] = []
        for answer in sorted(self._known_ones, key=lambda each: each.prediction.step_s):
            if not any(are_alike(answer, other) for other in found):
                found.append(answer)
        return found

    def _start(self) -> None:
        self._get(dict.fromkeys(self.problem.piece_of(each).root for each in self.problem.candidates))
        for candidate in self.problem.candidates:
            self._by_bounds(candidate, self.problem.piece_of(candidate).root, Stage.ROOT)

    def _look(self, bound: float, node: Node) -> None:
        missing = self._missing(node)
        if missing:
            self.queue.push(bound, node)
            self._get(self._with_others(missing, bound))
            return
        match node.stage:
            case Stage.ROOT:
                self._by_bounds(node.candidate, self.problem.piece_of(node.candidate), Stage.PIECE)
            case Stage.PIECE:
                self._by_prediction(node.candidate)
            case Stage.RECOMPUTED:
                self._recompute(node.candidate, bound)
            case Stage.RESTYLED:
                self._push_restyled(node.candidate)
            case Stage.STYLES:
                self._restyle(node.candidate)
            case Stage.COMPOSED:
                self._confirm(node)
            case Stage.KNOWN:
                assert node.prediction is not None
                self.outcome.answers.append(Answer(node.candidate, node.prediction, node.composed_s))

    # traces

    def _missing(self, node: Node) -> list[Piece]:
        """What must be traced before the node can be looked at."""
        needed = [] if node.stage is Stage.KNOWN else [node.candidate]
        if node.stage is Stage.RECOMPUTED:
            if not self.problem.is_default(node.candidate):  # it tells what the others hold at least
                default = self.problem.with_defaults(node.candidate)
                if self.problem.piece_of(default) not in self._pieces:
                    return [self.problem.piece_of(default)]
                if self._least_bytes(node.candidate, default) > self.problem.memory_bytes:
                    return []
            if self.problem.partly:
                needed.append(node.candidate.without_recompute())
        if node.stage is Stage.STYLES:
            needed += self._singles(node.candidate)
        pieces = dict.fromkeys(map(self.problem.piece_of, needed))
        return [piece for piece in pieces if piece not in self._pieces]

    def _with_others(self, missing: list[Piece], bound: float) -> list[Piece]:
        """With those that will be needed next, so that no process waits."""
        wanted = dict.fromkeys(missing)
        for near, node in self.queue.nearest(8 * self._workers):
            if len(wanted) >= self._workers or near > bound * (1 + 2 * ALIKE):
                break
            wanted |= dict.fromkeys(self._missing(node))
        return list(wanted)

    def _get(self, pieces: Iterable[Piece]) -> None:
        for piece, traced in self._trace(list(pieces)):
            self._pieces[piece] = traced
            self.outcome.traces += 1
            self._says(self._best, len(self.queue), self.outcome.traces)

    def _program(self, piece: Piece) -> Program | None:
        """None where it can't be traced."""
        found = self._pieces[piece]
        return None if isinstance(found, Unfit) else found

    # what is found out about a candidate

    def _by_bounds(self, candidate: Candidate, piece: Piece, stage: Stage) -> None:
        """By a piece's bounds: it is looked at with recompute, or without, or refused."""
        found = self._pieces[piece]
        if isinstance(found, Unfit):
            self.outcome.refused[found.reason] += 1
            return
        bounds, mesh, limit = self._bounds_of(piece), candidate.mesh, self.problem.memory_bytes
        step_s = bounds.step_s(mesh, candidate.micro_batches, candidate.chunks)
        needs, least = (
            bounds.device_bytes(mesh, candidate.micro_batches, recomputes=recomputes)
            for recomputes in (False, True)
        )
        if stage is Stage.ROOT and self.problem.is_default(candidate):
            saved_s = self._savings_of(piece, candidate).at_most_s(candidate)
            if saved_s > 0:
                self.queue.push(step_s - saved_s, Node(candidate, Stage.RESTYLED))
        if needs <= limit:
            self.queue.push(step_s, Node(candidate, stage))
        elif least <= limit and self._push_recomputed(candidate, step_s, needs):
            self.outcome.note(candidate, step_s, needs, Known.BOUND, fits=False)
        else:
            self.outcome.refuse_large(candidate, step_s, needs if needs <= least else least, Known.BOUND)

    def _by_prediction(self, candidate: Candidate) -> None:
        found = self._predicted(candidate)
        if found is None:
            return
        found = self._reserving(candidate, found)
        if self._fits(found):
            self._known(Answer(candidate, found))
        elif self._push_recomputed(candidate, found.step_s, found.memory.device_bytes):
            self.outcome.note(candidate, found.step_s, found.memory.device_bytes, Known.PREDICTED, fits=False)
        else:
            self.outcome.refuse_large(candidate, found.step_s, found.memory.device_bytes, Known.PREDICTED)

    def _push_recomputed(self, candidate: Candidate, least_s: float, needs: float) -> bool:
        """With all layers under each recompute. least_s, needs: seconds and bytes that it takes without,
        at least. False where there is none."""
        problem, layers = self.problem, self.problem.layers
        kinds = [kind for kind in problem.recompute if kind != "none"] if layers else []
        bounds = self._bounds_of(problem.piece_of(problem.with_defaults(candidate)).root)
        few = fewest_layers(needs - problem.memory_bytes, bounds.freed_bytes, layers)
        few = few if problem.partly else layers
        for kind in kinds:
            whole = replace(candidate, recompute=kind, recomputed=layers)
            more_s = bounds.again_s(candidate.mesh, candidate.micro_batches, kind, few)
            self.queue.push(least_s + more_s, Node(whole, Stage.RECOMPUTED))
        return bool(kinds)

    def _recompute(self, candidate: Candidate, bound: float) -> None:
        """candidate: with all of its layers recomputed. Of fewer, as few as fit."""
        if not self.problem.is_default(candidate):
            least = self._least_bytes(candidate, self.problem.with_defaults(candidate))
            if least > self.problem.memory_bytes:
                self.outcome.refuse_large(candidate, bound, least, Known.BOUND)
                return
        whole = self._predicted(candidate)
        if whole is None:
            return
        whole = self._reserving(candidate, whole)
        if not self._fits(whole):
            self.outcome.refuse_large(candidate, whole.step_s, whole.memory.device_bytes, Known.PREDICTED)
            return
        self._known(Answer(candidate, whole))
        none = self._predicted(candidate.without_recompute()) if self.problem.partly else None
        if none and not self._fits(none := self._reserving(candidate.without_recompute(), none)):
            self._push_partly(candidate, 0, none)

    def _push_partly(self, candidate: Candidate, fewer: int, found: Prediction) -> None:
        """With so many layers recomputed as may make it fit, where `fewer` don't, which is `found`. What
        it takes lies between what none and all of them take."""
        layers = self.problem.layers
        over_bytes = found.memory.device_bytes - self.problem.memory_bytes
        freed_bytes = self._bounds_of(self.problem.piece_of(candidate.without_recompute())).freed_bytes
        recomputed = min(layers, fewer + fewest_layers(over_bytes, freed_bytes, layers))
        none, whole = (
            self._predicted(each)
            for each in (candidate.without_recompute(), replace(candidate, recomputed=layers))
        )
        assert none is not None
        assert whole is not None
        spans = self.problem.setup_of(candidate).pipeline().spans(layers)
        share = sum(span.count for span in recomputed_spans(spans, recomputed)) / layers
        step_s = none.step_s + share * (whole.step_s - none.step_s)
        self._push_composed(replace(candidate, recomputed=recomputed), step_s)

    def _push_restyled(self, candidate: Candidate) -> None:
        """Other styles, if they could save anything of what it is predicted to take."""
        found = self._predicted(candidate)
        if found is not None:
            saved_s = self._savings_of(self.problem.piece_of(candidate), candidate).at_most_s(candidate)
            if saved_s > 0:
                saved_s += dict(found.terms).get(Term.WAITING, 0.0)
                self.queue.push(found.step_s - saved_s, Node(candidate, Stage.STYLES))

    def _restyle(self, base: Candidate) -> None:
        """All other styles of a candidate: those that change one group by their own pieces, others by the
        sums of what these change."""
        first = self._predicted(base)
        assert first is not None
        changes = self._changes.setdefault(base, {})
        for candidate in self._singles(base):
            found = self._predicted(candidate)
            if found is not None:
                (changed,) = set(candidate.styles) - set(base.styles)
                more_bytes = found.memory.device_bytes - first.memory.device_bytes
                changes[changed] = found.step_s - first.step_s, more_bytes
        for candidate in self._singles(base):
            if self._predicted(candidate) is not None:
                self._by_prediction(candidate)
        for styles in styles_of_all(base.styles, tuple(changes)):
            candidate = replace(base, styles=styles)
            more = [changes[pair] for pair in set(styles) - set(base.styles)]
            step_s = first.step_s + sum(seconds for seconds, _ in more)
            needs = first.memory.device_bytes + sum(n_bytes for _, n_bytes in more)
            if needs > self.problem.memory_bytes * SURE and self._push_recomputed(
                candidate, step_s, needs / SURE
            ):
                self.outcome.note(candidate, step_s, needs, Known.COMPOSED, fits=False)
            else:
                self._push_composed(candidate, step_s)

    def _confirm(self, node: Node) -> None:
        """A candidate that was put together, by its own plan."""
        candidate, found = node.candidate, self._predicted(node.candidate)
        if found is None:
            return
        found = self._reserving(candidate, found)
        if self._fits(found):
            self._known(Answer(candidate, found, node.composed_s))
        elif candidate.recomputed in range(1, self.problem.layers):
            self._push_partly(candidate, candidate.recomputed, found)
        elif not self._push_recomputed(candidate, found.step_s, found.memory.device_bytes):
            self.outcome.refuse_large(candidate, found.step_s, found.memory.device_bytes, Known.PREDICTED)

    def _known(self, answer: Answer) -> None:
        if answer.candidate not in self._seen:
            self._seen.add(answer.candidate)
            found = answer.prediction
            self.outcome.note(
                answer.candidate, found.step_s, found.memory.device_bytes, Known.PREDICTED, fits=True
            )
            self._better(answer)
            self._known_ones.append(answer)
            self.queue.push(found.step_s, Node(answer.candidate, Stage.KNOWN, found, answer.composed_s))

    def _better(self, answer: Answer) -> None:
        if self._best is None or answer.prediction.step_s < self._best.prediction.step_s:
            self._best = answer
            self._says(self._best, len(self.queue), self.outcome.traces)

    # small things

    def _push_composed(self, candidate: Candidate, step_s: float) -> None:
        if candidate not in self._seen:
            self.outcome.composed += 1
            self.queue.push(step_s * (1 - SLACK), Node(candidate, Stage.COMPOSED, composed_s=step_s))

    def _fits(self, found: Prediction) -> bool:
        return found.memory.device_bytes <= self.problem.memory_bytes

    def _reserving(self, candidate: Candidate, found: Prediction) -> Prediction:
        """With what the allocator reserves, where that decides whether it fits: where tensors alone do."""
        if self._fits(found) and candidate not in self._reserved:
            traced = self._pieces[self.problem.piece_of(candidate)]
            assert not isinstance(traced, Unfit)
            memory = forecast(traced, self.problem.machine, self.problem.setup_of(candidate))
            self._reserved[candidate] = replace(found, memory=memory)
        return self._reserved.get(candidate, found)

    def _predicted(self, candidate: Candidate) -> Prediction | None:
        """Of its own piece, which is traced, with the memory that tensors take. None, and refused, where it
        can't be."""
        if candidate in self._predictions:
            return self._predictions[candidate]
        found, traced = None, self._pieces[self.problem.piece_of(candidate)]
        if isinstance(traced, Unfit):
            self.outcome.refused[traced.reason] += 1
        else:
            setup = self.problem.setup_of(candidate)
            try:
                check_setup(traced, self.problem.machine, setup)
                found = predict(traced, self.problem.machine, setup, replays=False)
                self.outcome.predicted += 1
            except InputError as error:
                self.outcome.refused[str(error)] += 1
        self._predictions[candidate] = found
        return found

    def _bounds_of(self, piece: Piece) -> Bounds:
        if piece not in self._bounds:
            program, problem = self._program(piece), self.problem
            assert program is not None
            self._bounds[piece] = Bounds(
                program, problem.machine, problem.setup, gathers=problem.gathers_keys
            )
        return self._bounds[piece]

    def _savings_of(self, piece: Piece, candidate: Candidate) -> Savings:
        if piece not in self._savings:
            program, groups = self._program(piece), self.problem.groups(candidate)
            assert program is not None
            setup = replace(self.problem.setup, mesh=None)
            is_cut = dict(candidate.styles).get(SEQUENCE) == "cut"
            self._savings[piece] = Savings(program, self.problem.machine, setup, groups, is_cut=is_cut)
        return self._savings[piece]

    def _singles(self, candidate: Candidate) -> list[Candidate]:
        """With another style of one group each, of those that could save anything."""
        savings = self._savings_of(self.problem.piece_of(candidate), candidate)
        groups = [group for group in self.problem.groups(candidate) if savings.is_worth(group)]
        found = singles(candidate.styles, groups)
        return [replace(candidate, styles=styles) for styles in found]

    def _least_bytes(self, candidate: Candidate, default: Candidate) -> float:
        """That it holds: what the default styles hold with the same recompute, and what its styles change
        without any, where that is known, else what they leave whole."""
        found, none = self._predicted(default), default.without_recompute()
        if found is None:
            return 0.0
        changed, known = set(candidate.styles) - set(default.styles), self._changes.get(none, {})
        if all(pair in known for pair in changed):
            more = sum(known[pair][1] for pair in changed)
            return (found.memory.device_bytes + more) / SURE
        root = self.problem.piece_of(none).root
        shards = self._bounds_of(root).shards(candidate.mesh) * candidate.mesh.stages
        return found.memory.device_bytes + self._savings_of(root, none).more_bytes(candidate.styles) / shards
