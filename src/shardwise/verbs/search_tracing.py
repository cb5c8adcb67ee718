"""Asks of a search to its processes: what they told is kept, and what follows from it isn't asked."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shardwise.core.case import Case
from shardwise.core.mesh import Mesh, Role
from shardwise.core.program import Program
from shardwise.core.search import Group
from shardwise.predict.family import LONG, SHORT, Family, NotAFamilyError
from shardwise.search.piece import Piece, Traced, Unfit
from shardwise.verbs.search_pieces import Ask, AskFacts, AskGroups, AskPlan, AskProgram, Facts, Told
from shardwise.workers import Processes


class Tracing:
    """Of one model. programs: of all pieces so far."""

    def __init__(self, case: Case, device: str, processes: Processes[Ask, Told]) -> None:
        self.case, self.device, self.processes = case, device, processes
        self.programs: dict[Piece, Traced] = {}

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
        """Of four sequences and more the Program follows from those of two and three, where these are
        there or wanted for many."""
        derived = [piece for piece in pieces if self._is_derived(piece)]
        direct = [piece for piece in pieces if piece not in derived]
        for piece in derived:
            direct += [replace(piece, micro_batch=size) for size in (SHORT, LONG)]
        asked = [piece for piece in dict.fromkeys(direct) if piece not in self.programs]
        yield from ((piece, self.programs[piece]) for piece in pieces if piece in self.programs)
        for piece, traced in self._direct(asked):
            if piece in pieces:
                yield piece, traced
        for piece in derived:
            try:
                pair = [self.programs[replace(piece, micro_batch=size)] for size in (SHORT, LONG)]
                short, long = pair
                if not isinstance(short, Program) or not isinstance(long, Program):
                    self.programs[piece] = next(each for each in pair if not isinstance(each, Program))
                else:
                    self.programs[piece] = Family(short, long).at(piece.micro_batch)
                yield piece, self.programs[piece]
            except NotAFamilyError:
                yield from self._direct([piece])

    def _is_derived(self, piece: Piece) -> bool:
        pair = [replace(piece, micro_batch=size) for size in (SHORT, LONG)]
        is_known = all(each in self.programs for each in pair)
        return piece.micro_batch > LONG and (is_known or piece == piece.root)

    def _direct(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Traced]]:
        asked = [AskProgram(self.case, piece, self.device) for piece in pieces]
        for ask, told in self.processes.results(asked):
            assert isinstance(ask, AskProgram)
            assert isinstance(told, Program | Unfit)
            self.programs[ask.piece] = told
            yield ask.piece, self.programs[ask.piece]
