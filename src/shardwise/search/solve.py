"""solve: the best candidates, best first, and the proof that nothing else is better.

Best first: of all candidates the one with the least bound is looked at next, and what is found out about
it raises its bound (its root's, its own piece's, predict's step). A candidate that comes up with its step
known is the best of all that are left: no other can take less than its own bound.

Of a candidate that doesn't fit without recompute, as few layers are recomputed as make it fit. Other styles
of a candidate are looked at where what they save at most would put it before those that are left; what
several change is the sum of what each does. Those of what lies outside the layers (ends.py) are looked at of
answers alone. Whatever was put together so is predicted by a Program of its own before it is given out."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from shardwise.core.prediction import Prediction, Term
from shardwise.core.search import Candidate, Known
from shardwise.search.composed import are_alike, fewest_layers, styles_of_all
from shardwise.search.costs import SLACK, SURE, Costs, added_s
from shardwise.search.early import Early, left_over
from shardwise.search.ends import LIGHTER, Styles, changes_of_ends, own_ends
from shardwise.search.piece import Piece, Traced, Unfit
from shardwise.search.problem import Answer, Outcome, Problem
from shardwise.search.queue import Node, Queue, Stage

FAR = 1.5
"""What takes so many times the best one's step isn't given out."""
AHEAD = 1.2
"""Where a process would wait, what takes so many times the least bound is traced ahead: it may be needed."""
LOOKING, RANKING = 0.86, 0.92
"""Of the seconds that a search may take, by when it ends to look, and to see what fits by what the allocator
reserves, which is simulated. What is left is for what decides."""

BY_HAND = "it was stopped by Ctrl-C"
Tracer = Callable[[Sequence[Piece]], Iterator[tuple[Piece, Traced]]]
Says = Callable[["Answer | None", int, int], None]


class Solver:
    """One search. says: told the best so far, how many candidates are left, and how many traces were made."""

    def __init__(self, problem: Problem, trace: Tracer, workers: int, says: Says = lambda *_: None) -> None:
        self.problem, self.outcome = problem, Outcome()
        self._trace, self._workers, self._says = trace, workers, says
        self.costs = Costs(problem, self.outcome)
        self.early = Early(self.costs)
        self.queue = Queue()
        self._seen: set[Candidate] = set()
        self._recomputed: set[Candidate] = set()
        self._given_out: set[Candidate] = set()
        self._known_ones: list[Answer] = []
        self._best: Answer | None = None
        self._end_of_look = self._until = math.inf
        self._bounded = 0

    def run(self, top: int, seconds: float = math.inf, spent_s: float = 0.0) -> Outcome:
        """The best, proved, and the best others of those that need no further trace; where there is none, the
        next one. On KeyboardInterrupt, and after so many seconds, of which some are spent, what there is."""
        outcome, began = self.outcome, time.monotonic() - spent_s
        self._end_of_look, self._until = began + LOOKING * seconds, began + RANKING * seconds
        over, at = f"{seconds:g} seconds were over", None
        try:
            if not self._start():
                outcome.stopped = over
            while not outcome.stopped and self._is_more(top):
                bound, node = at = self.queue.pop(self._best_s, in_order=bool(outcome.answers))
                if outcome.answers:
                    if bound > FAR * outcome.answers[0].prediction.step_s:
                        break
                    if len(self._ranked(2)) > 1 and self.costs.missing(node):
                        continue
                self._look(bound, node)
                if self._is_over():
                    if not outcome.answers:  # else only runners-up are left
                        outcome.stopped = over
                    break
        except KeyboardInterrupt:
            outcome.stopped = BY_HAND
        if outcome.stopped and at is not None:
            self.queue.push(*at)  # it may not be through
        if not outcome.answers:
            self._end_early()
        else:
            outcome.gap = 0.0
        may = self.queue.left_below(self._best_s)
        unbounded = len(self.problem.candidates) - self._bounded
        outcome.unlooked, outcome.ruled_out = left_over(self.costs, unbounded, may)
        outcome.answers = self._ranked(top)
        return outcome

    def _is_more(self, top: int) -> bool:
        return self.queue.is_left() and not (self.outcome.answers and len(self._ranked(top)) >= top)

    def _is_over(self) -> bool:
        return time.monotonic() > self._end_of_look

    def _end_early(self) -> None:
        """With what was foreseen, where nothing better is known; and how much better another may be, where
        each has a bound."""
        answer = self.early.answer
        if self.outcome.stopped and answer is not None and answer.prediction.step_s < self._best_s:
            self.costs.predicted(answer.candidate)  # which counts it
            self._known(answer)
        if self._best is not None and self._bounded == len(self.problem.candidates):
            self.outcome.gap = max(0.0, 1 - self.queue.least() / self._best_s)

    @property
    def _best_s(self) -> float:
        return self._best.prediction.step_s if self._best is not None else math.inf

    def _ranked(self, top: int) -> list[Answer]:
        """The best of those that are known and fit, without those that are like a better one."""
        found: list[Answer] = []
        for answer in sorted(self._known_ones, key=lambda each: each.prediction.step_s):
            if len(found) == top or (found and time.monotonic() > self._until):
                break
            if not any(are_alike(answer, other) for other in found):
                reserving = self.costs.reserving(answer.candidate, answer.prediction)
                if self.costs.fits(reserving):
                    found.append(replace(answer, prediction=reserving))
        return found

    def _start(self) -> bool:
        """All by the bounds of their roots: each as soon as what bounds it is traced, while others are.
        False where time is over before that, and there is a plan."""
        waiting = self.costs.at_first()
        wanted = dict.fromkeys(piece for pieces in waiting for piece in pieces)
        while True:
            left = [each for each in (*self.early.wanted, *wanted) if each not in self.costs.pieces]
            for piece in self._traced(left):
                for pieces in [each for each in waiting if self.costs.pieces.keys() >= set(each)]:
                    for candidate in waiting.pop(pieces):
                        self._by_bounds(candidate, self.problem.piece_of(candidate).root, Stage.ROOT)
                        self._bounded += 1
                wants_more = self.early.wants_more(piece)
                if self._is_over() and self.early.answer is not None:
                    return not waiting
                if wants_more:
                    break
            else:
                if not self.early.wants_one():
                    return True

    def _look(self, bound: float, node: Node) -> None:
        missing = self.costs.missing(node)
        if missing:
            self.queue.push(bound, node)
            deque(self._traced(self._with_others(missing, bound)), maxlen=0)
            return
        match node.stage:
            case Stage.ROOT:
                self._by_bounds(node.candidate, self.problem.piece_of(node.candidate), Stage.PIECE)
            case Stage.PIECE:
                self._by_prediction(node.candidate)
            case Stage.RECOMPUTED:
                least_s = self.costs.recomputed_s(node.candidate, node.without)
                if least_s > bound:
                    self.queue.push(least_s, node)
                else:
                    self._recompute(node.candidate, bound)
            case Stage.RESTYLED:
                self._push_restyled(node.candidate, bound)
            case Stage.STYLES:
                self._restyle(node.candidate)
            case Stage.COMPOSED:
                self._by_prediction(node.candidate, node.composed_s)
            case Stage.KNOWN:
                self._give_out(bound, node)

    # traces

    def _with_others(self, missing: list[Piece], bound: float) -> list[Piece]:
        """With those that will be needed next, so that no process waits."""
        wanted = dict.fromkeys(missing)
        for near, node in self.queue.nearest(8 * self._workers):
            if len(wanted) >= self._workers or near > bound * AHEAD:
                break
            wanted |= dict.fromkeys(self.costs.missing(node))
        return list(wanted)

    def _traced(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Each as it is known."""
        for piece, traced in self._trace(list(pieces)):
            self.costs.pieces[piece] = traced
            self.outcome.traces += 1
            self._says(self._best or self.early.answer, len(self.queue), self.outcome.traces)
            yield piece

    # what is found out about a candidate

    def _by_bounds(self, candidate: Candidate, piece: Piece, stage: Stage) -> None:
        """By a piece's bounds: it is looked at with recompute, or without, or refused."""
        found = self.costs.pieces[piece]
        if isinstance(found, Unfit):
            self.outcome.refused[found.reason] += 1
            return
        bounds = self.costs.bounds_of(piece)
        sharding = self.costs.sharding(candidate)
        step_s = bounds.step_s(candidate, sharding=sharding)
        needs = bounds.needs.device_bytes(candidate)
        if stage is Stage.ROOT and self.problem.is_default(candidate):
            restyled_s = self.costs.restyled_s(candidate)
            if restyled_s is not None:
                self.queue.push(restyled_s, Node(candidate, Stage.RESTYLED))
        if needs <= self.problem.memory_bytes:
            self.queue.push(step_s, Node(candidate, stage))
        elif self._push_recomputed(candidate, step_s):
            self.outcome.note(candidate, step_s, needs, Known.BOUND, fits=False)
        else:
            kinds = self.problem.recompute if self.problem.layers else ("none",)
            least = min(bounds.needs.device_bytes(candidate, kind) for kind in kinds)
            self.outcome.refuse_large(candidate, step_s, least, Known.BOUND)

    def _by_prediction(self, candidate: Candidate, composed_s: float | None = None) -> None:
        """By its own plan. What the allocator reserves takes long to simulate: of what would be the best now,
        of others when they are given out."""
        found = self.costs.predicted(candidate)
        if found is None:
            return
        if found.step_s < self._best_s:
            found = self.costs.reserving(candidate, found)
        if self.costs.fits(found):
            self._known(Answer(candidate, found, composed_s))
        else:
            self._too_large(candidate, found)

    def _too_large(self, candidate: Candidate, found: Prediction) -> None:
        """It goes on with more of its layers recomputed, where there are more."""
        needs = found.memory.device_bytes
        if candidate.recomputed in range(1, self.problem.layers):
            self._push_partly(candidate, candidate.recomputed, found)
        elif not candidate.recomputed and self._push_recomputed(candidate, found.step_s, found):
            self.outcome.note(candidate, found.step_s, needs, Known.PREDICTED, fits=False)
        else:
            self.outcome.refuse_large(candidate, found.step_s, needs, Known.PREDICTED)

    def _push_recomputed(
        self, candidate: Candidate, least_s: float, found: Prediction | None = None, more_bytes: float = 0.0
    ) -> bool:
        """With all layers under each recompute. least_s: seconds that it takes without, at least. found: of
        it without, or of the default styles, than which its own ones hold so many bytes more; None where it
        is known by bounds alone. False where there is none."""
        ways = self.costs.recomputes(candidate, self.costs.needs(candidate))
        for way in ways:
            few = way.recomputed
            if found is not None and self.problem.partly:
                few = max(few, self.costs.fewest_by(found, way, more_bytes))
            more_s = self.costs.again_s(way, few, found)
            whole = replace(way, recomputed=self.problem.layers)
            bound = least_s + more_s - self.costs.ends_save_s(whole)
            self.queue.push(bound, Node(whole, Stage.RECOMPUTED, without=(least_s, few)))
        return bool(ways)

    def _recompute(self, candidate: Candidate, bound: float) -> None:
        """candidate: with all of its layers recomputed. Of fewer, as few as fit."""
        if candidate in self._recomputed:
            return
        self._recomputed.add(candidate)
        if not self.problem.is_default(candidate):
            least = self.costs.least_bytes(candidate, self.problem.with_defaults(candidate))
            if least > self.problem.memory_bytes:
                self.outcome.refuse_large(candidate, bound, least, Known.BOUND)
                return
        self._by_prediction(candidate)
        whole = self.costs.predicted(candidate)
        if whole is None or not self.costs.fits(whole) or not self.problem.partly:
            return
        plain = candidate.without_recompute()
        none = self.costs.predicted(plain)
        if none and not self.costs.fits(none := self.costs.reserving(plain, none)):
            self._push_partly(candidate, 0, none)

    def _push_partly(self, candidate: Candidate, fewer: int, found: Prediction) -> None:
        """With so many layers recomputed as may make it fit, where `fewer` don't, which is `found`. What
        it takes lies between what none and all of them take."""
        layers = self.problem.layers
        none, whole = (
            self.costs.predicted(each)
            for each in (candidate.without_recompute(), replace(candidate, recomputed=layers))
        )
        assert none is not None
        assert whole is not None
        over_bytes = found.memory.device_bytes - self.problem.memory_bytes
        freed_bytes = self.costs.freed_bytes(candidate, none, whole)
        again = self.costs.run_again(candidate, fewer) + fewest_layers(over_bytes, freed_bytes, layers)
        recomputed = self.costs.asked_for(candidate, again)
        share = self.costs.run_again(candidate, recomputed) / layers
        step_s = none.step_s + share * (whole.step_s - none.step_s)
        least_s = none.step_s + added_s(none, whole, share)
        self._push_composed(replace(candidate, recomputed=recomputed), step_s, min(step_s, least_s))

    def _push_restyled(self, candidate: Candidate, bound: float) -> None:
        """Other styles, if they could save anything of what it is predicted to take."""
        found = self.costs.predicted(candidate)
        if found is not None:
            saved_s = self.costs.saved_s(candidate)
            if saved_s > 0:
                saved_s += dict(found.terms).get(Term.WAITING, 0.0)
                self.queue.push(max(bound, found.step_s - saved_s), Node(candidate, Stage.STYLES))

    def _restyle(self, base: Candidate) -> None:
        """All other styles of a candidate: those that change one group by their own pieces, others by the
        sums of what these change."""
        first = self.costs.predicted(base)
        assert first is not None
        changes = self.costs.changes.setdefault(base, {})
        for candidate in self.costs.singles(base):
            found = self.costs.predicted(candidate)
            if found is not None:
                (changed,) = set(candidate.styles) - set(base.styles)
                more_bytes = found.memory.device_bytes - first.memory.device_bytes
                changes[changed] = found.step_s - first.step_s, more_bytes
        ends = tuple(changes_of_ends(base.styles, changes))
        least_bytes = -LIGHTER * self.problem.memory_bytes
        self.costs.ends[base] = tuple(each for each in ends if each.n_bytes >= least_bytes)
        with_answers = {each.of(base.styles) for each in self.costs.ends[base]}
        for candidate in self.costs.singles(base):
            found = self.costs.predicted(candidate)
            if found is not None and (candidate.styles not in with_answers or self.costs.fits(found)):
                self._by_prediction(candidate)
        for styles in styles_of_all(base.styles, tuple(changes)):
            if own_ends(styles, base.styles) not in with_answers:
                self._push_restyled_by(base, first, styles)
        for answer in list(self._known_ones):
            if self.problem.with_defaults(answer.candidate).without_recompute() == base:
                self._push_known(answer)
        if not self.costs.fits(first) and self.costs.ends_save_s(base):
            self._push_recomputed(base, first.step_s, first)

    def _push_restyled_by(self, base: Candidate, first: Prediction, styles: Styles) -> None:
        """Styles of several groups, by the sums of what each changes. first: what the base takes."""
        candidate, changes = replace(base, styles=styles), self.costs.changes[base]
        more = [changes[pair] for pair in set(styles) - set(base.styles)]
        step_s = first.step_s + sum(seconds for seconds, _ in more)
        more_bytes = sum(n_bytes for _, n_bytes in more)
        needs = first.memory.device_bytes + more_bytes
        if needs > self.problem.memory_bytes * SURE and self._push_recomputed(
            candidate, step_s, first, more_bytes
        ):
            self.outcome.note(candidate, step_s, needs, Known.COMPOSED, fits=False)
        else:
            self._push_composed(candidate, step_s)

    def _push_with_ends(self, answer: Answer) -> None:
        """An answer with other styles of what lies outside its layers."""
        for change in self.costs.ends_of(answer.candidate):
            candidate = replace(answer.candidate, styles=change.of(answer.candidate.styles))
            self._push_composed(candidate, answer.prediction.step_s + change.seconds)

    def _known(self, answer: Answer) -> None:
        if answer.candidate not in self._seen:
            self._seen.add(answer.candidate)
            found = answer.prediction
            self.outcome.note(
                answer.candidate, found.step_s, found.memory.device_bytes, Known.PREDICTED, fits=True
            )
            self._better(answer)
            self._known_ones.append(answer)
            self._push_known(answer)

    def _push_known(self, answer: Answer) -> None:
        """With the best of its ends, first."""
        bound = answer.prediction.step_s - self.costs.ends_save_s(answer.candidate)
        node = Node(answer.candidate, Stage.KNOWN, answer.prediction, answer.composed_s)
        self.queue.push(bound, node)

    def _give_out(self, bound: float, node: Node) -> None:
        """An answer, where it fits by what the allocator reserves too; before that, its other ends."""
        if node.candidate in self._given_out:
            return
        assert node.prediction is not None
        found = self.costs.reserving(node.candidate, node.prediction)
        answer = Answer(node.candidate, found, node.composed_s)
        if self.costs.fits(answer.prediction) and bound < answer.prediction.step_s:
            self._push_with_ends(answer)
            self.queue.push(answer.prediction.step_s, node)
            return
        self._given_out.add(node.candidate)
        if self.costs.fits(answer.prediction):
            self.outcome.answers.append(answer)
        else:
            self._too_large(answer.candidate, answer.prediction)

    def _better(self, answer: Answer) -> None:
        if self._best is None or answer.prediction.step_s < self._best.prediction.step_s:
            self._best = answer
            self._says(self._best, len(self.queue), self.outcome.traces)

    # small things

    def _push_composed(self, candidate: Candidate, step_s: float, least_s: float | None = None) -> None:
        """least_s: that it may take; by default, step_s."""
        if candidate not in self._seen:
            self.outcome.composed += 1
            bound = (step_s if least_s is None else least_s) * (1 - SLACK) - self.costs.ends_save_s(candidate)
            self.queue.push(bound, Node(candidate, Stage.COMPOSED, composed_s=step_s))
