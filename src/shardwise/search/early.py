"""Early: a plan that fits, from the first pieces that are traced, so that a search that is stopped has one;
and what such a search has not looked at.

It has no say in what is looked at, nor in what is the best: a search that goes on to its proof is as without
it, but for a piece or two that it traces where nothing fits as it is."""

import math
from collections.abc import Iterable
from dataclasses import replace

from shardwise.core.search import Candidate
from shardwise.search.costs import Costs
from shardwise.search.needs import Needs
from shardwise.search.piece import Piece, Unfit
from shardwise.search.problem import Answer

AT_ONCE = 2
"""Of the candidates that share a piece, so many are predicted."""


class Early:
    """answer: the best that was foreseen. wanted: pieces that would tell of one, where nothing fits so far:
    with all layers run again."""

    def __init__(self, costs: Costs) -> None:
        self.costs, self.problem = costs, costs.problem
        self.answer: Answer | None = None
        self.wanted: dict[Piece, Candidate] = {}
        self._of_piece: dict[Piece, list[Candidate]] = {}
        for candidate in self.problem.candidates:
            self._of_piece.setdefault(self.problem.piece_of(candidate), []).append(candidate)

    def wants_more(self, piece: Piece) -> bool:
        """It is traced: what it tells by itself is foreseen. True where another is to be traced next: the
        first time that nothing fits."""
        if isinstance(self.costs.pieces[piece], Unfit):
            return False
        if piece in self.wanted:
            self._foresee(self.wanted[piece])
        own = self._of_piece.get(piece, [])
        for candidate in self._promising(piece, own):
            self._foresee(candidate)
        if not own or self.answer is not None or self.wanted:
            return False
        needs = self.costs.bounds_of(piece).needs
        return self._want((candidate, needs) for candidate in own)

    def wants_one(self) -> bool:
        """The same, once all have their bounds: of all of them."""
        if self.answer is not None:
            return False
        fit = (
            each
            for each in self.problem.candidates
            if not isinstance(self.costs.pieces[self.problem.piece_of(each).root], Unfit)
        )
        return self._want((each, self.costs.needs(each)) for each in fit)

    def _want(self, known: Iterable[tuple[Candidate, Needs]]) -> bool:
        """Of the candidates, with what they hold at least, that which holds least with a recompute of all its
        layers. False where that doesn't fit, or is known."""
        kinds = [kind for kind in self.problem.recompute if kind != "none" or not self.problem.layers]
        sized = [
            (needs.device_bytes(each, kind), index, each, kind)
            for index, (each, needs) in enumerate(known)
            for kind in kinds
        ]
        n_bytes, _, plain, kind = min(sized, default=(math.inf, 0, None, ""))
        if plain is None or n_bytes > self.problem.memory_bytes:
            return False
        whole = plain if kind == "none" else replace(plain, recompute=kind, recomputed=self.problem.layers)
        piece = self.problem.piece_of(whole)
        if piece in self.costs.pieces:
            return False
        self.wanted[piece] = whole
        return True

    def _promising(self, piece: Piece, own: list[Candidate]) -> list[Candidate]:
        """Those that may fit, and be better than what is known, the best first."""
        if not own:
            return []
        bounds, limit = self.costs.bounds_of(piece), self.problem.memory_bytes
        below = self.answer.prediction.step_s if self.answer is not None else math.inf
        timed = sorted((bounds.step_s(each), index) for index, each in enumerate(own))
        may = [own[index] for step_s, index in timed if step_s < below]
        return [each for each in may if bounds.needs.device_bytes(each) <= limit][:AT_ONCE]

    def _foresee(self, candidate: Candidate) -> None:
        found, known = self.costs.foreseen(candidate), self.answer
        if isinstance(found, Unfit) or (known is not None and known.prediction.step_s <= found.step_s):
            return
        found = self.costs.reserving(candidate, found)
        if self.costs.fits(found):
            self.answer = Answer(candidate, found)


def left_over(costs: Costs, unbounded: int, below: Iterable[Candidate]) -> tuple[int, int]:
    """How many candidates weren't looked at, of those that may be the best, and how many bounds ruled out.
    unbounded: how many have no bound yet; below: those whose bound is below the best's step."""
    problem, looked = costs.problem, costs.looked_at()
    may = {problem.with_defaults(each).without_recompute() for each in below}
    unlooked = unbounded + len(may - looked)
    can_not = 0
    for each in set(problem.candidates) - looked:
        own = problem.piece_of(each)
        can_not += any(isinstance(costs.pieces.get(piece), Unfit) for piece in (own, own.root))
    known = len(looked.intersection(problem.candidates))
    return unlooked, len(problem.candidates) - known - can_not - unlooked
