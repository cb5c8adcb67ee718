"""Asks of a search to its processes: what they told is kept, and what follows from it isn't asked."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shardwise.core.case import Case
from shardwise.core.mesh import Mesh, Role
from shardwise.core.pipeline import Pipeline
from shardwise.core.program import Program
from shardwise.core.search import Group
from shardwise.predict.family import LONG, SHORT, Family, NotAFamilyError
from shardwise.search.piece import Piece, Traced, Unfit
from shardwise.verbs.search.pieces import Ask, AskFacts, AskGroups, AskPlan, AskProgram, Facts, Told
from shardwise.workers.processes import Processes


class Tracing:
    """Of one model. programs: of all pieces so far."""

    def __init__(self, case: Case, device: str, processes: Processes[Ask, Told]) -> None:
        self.case, self.device, self.processes = case, device, processes
        self.programs: dict[Piece, Traced] = {}
        self._families: dict[Piece, Family | None] = {}

    def facts(self) -> Facts:
        facts = self._one(AskFacts(self.case))
        assert isinstance(facts, Facts)
        return facts

    def groups(self, degrees: Sequence[int]) -> dict[int, tuple[Group, ...]]:
        """By tp."""
        asked = [AskGroups(self.case, Mesh.of({Role.CUTS_TENSORS: tp})) for tp in degrees]
        found: dict[int, tuple[Group, ...]] = {}
        for ask, told in self.processes.results(asked):
            assert isinstance(ask, AskGroups)
            assert isinstance(told, tuple)
            found[ask.mesh.tp] = told
        return found

    def plan(self, piece: Piece) -> str | None:
        """Its plan's file."""
        told = self._one(AskPlan(self.case, piece))
        assert told is None or isinstance(told, str)
        return told

    def _one(self, asked: Ask) -> Told:
        found: Told = None
        for ask, told in self.processes.results([asked]):
            if ask == asked:  # others were under way when a search was stopped
                found = told
        return found

    def traced(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Traced]]:
        """Each with its Program, as they come: what follows from others isn't traced."""
        waiting = [piece for piece in pieces if not self._is_there(piece)]
        for piece in pieces:
            if piece not in waiting:
                yield piece, self.programs[piece]
        direct = dict.fromkeys(each for piece in waiting for each in self._asked_for(piece))
        for piece, traced in self._direct(list(direct)):
            if piece in waiting:
                yield piece, traced
        for piece in waiting:
            if piece not in direct:
                if self._is_there(piece):
                    yield piece, self.programs[piece]
                else:
                    yield from self._direct([piece])

    def _asked_for(self, piece: Piece) -> list[Piece]:
        """What is traced for it: of a root with four sequences or more those with two and three, from
        which all larger ones follow; where a part of the layers is recomputed, that with none and all of
        them."""
        if piece.recomputed is not None:
            whole = replace(piece, recomputed=None, dealt=(1, 1))
            pair = [each for each in (replace(whole, recompute="none"), whole) if not self._is_there(each)]
            return [other for each in pair for other in self._asked_for(each)] or [piece]
        if piece.micro_batch > LONG and piece == piece.root:
            pair = [replace(piece, micro_batch=size) for size in (SHORT, LONG)]
            return [each for each in pair if each not in self.programs]
        return [piece]

    def _is_there(self, piece: Piece) -> bool:
        """Whether its Program is known, or follows from those that are."""
        if piece not in self.programs:
            found = self._of_two_kinds(piece) or self._of_a_family(piece)
            if found is not None:
                self.programs[piece] = found
        return piece in self.programs

    def _of_two_kinds(self, piece: Piece) -> Program | None:
        """A part of the layers recomputed: from none and all of them."""
        from shardwise.trace.extend import NotPeriodicError
        from shardwise.trace.two_kinds import of_two_kinds

        if piece.recomputed is None:
            return None
        again = replace(piece, recomputed=None, dealt=(1, 1))
        pair = [self.programs.get(each) for each in (replace(again, recompute="none"), again)]
        if not all(isinstance(each, Program) for each in pair):
            return None
        plain, every = (each for each in pair if isinstance(each, Program))
        try:
            return of_two_kinds(plain, every, piece.recomputed, Pipeline(*piece.dealt))
        except NotPeriodicError:
            return None

    def _of_a_family(self, piece: Piece) -> Traced | None:
        """Larger micro-batches: from those of two and three sequences."""
        pair = [self.programs.get(replace(piece, micro_batch=size)) for size in (SHORT, LONG)]
        if piece.micro_batch <= LONG or None in pair:
            return None
        unfit = [each for each in pair if isinstance(each, Unfit)]
        if unfit:
            return unfit[0]
        short, long = (each for each in pair if isinstance(each, Program))
        smallest = replace(piece, micro_batch=SHORT)
        if smallest not in self._families:
            try:
                self._families[smallest] = Family(short, long)
            except NotAFamilyError:
                self._families[smallest] = None
        family = self._families[smallest]
        try:
            return family.at(piece.micro_batch) if family is not None else None
        except NotAFamilyError:
            return None

    def _direct(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Traced]]:
        asked = [AskProgram(self.case, piece, self.device) for piece in pieces]
        under_way = self.processes.under_way
        for ask, told in self.processes.results(ask for ask in asked if ask not in under_way):
            assert isinstance(ask, AskProgram)
            assert isinstance(told, Program | Unfit)
            self.programs[ask.piece] = told
            yield ask.piece, self.programs[ask.piece]
