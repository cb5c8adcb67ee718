"""What a solver is given, and what it gives: Problem, Answer, Outcome."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from shardwise.core.machine import Machine
from shardwise.core.mesh import AXES, Mesh, Role
from shardwise.core.prediction import Prediction, Setup
from shardwise.core.search import SEQUENCE, Candidate, Considered, Group, Known
from shardwise.predict.traced import TRACED_DATA_RANKS, traced_mesh
from shardwise.search.piece import INNER, Piece, piece_of


@dataclass(frozen=True, slots=True)
class Problem:
    """candidates: with the default styles, without recompute. groups: of the tensor-parallel ranks of a
    candidate. layers: of the model; 0 where it has no row of them.
    partly: whether a part of them may be recomputed. memory_bytes: of a device, at most. gathers_keys:
    context ranks gather keys, and wait for them."""

    machine: Machine
    setup: Setup
    candidates: tuple[Candidate, ...]
    groups: Callable[[Candidate], tuple[Group, ...]]
    recompute: tuple[str, ...]
    layers: int
    memory_bytes: float
    partly: bool = True
    gathers_keys: bool = True

    def piece_of(self, candidate: Candidate) -> Piece:
        return piece_of(candidate, self.layers)

    def sharding_piece(self, inner: Mesh, candidate: Candidate, micro_batch: int) -> Piece:
        """The piece that tells FSDP's collectives of all candidates over the same inner axes, any number of
        tokens, that reshard alike: that of one of them, which it tells all of."""
        sizes = {axis.role: inner.size(axis.name) for axis in AXES if axis.role in INNER}
        sizes = {role: size for role, size in sizes.items() if size > 1 or role is Role.CUTS_TENSORS}
        mesh = traced_mesh(Mesh.of({**sizes, Role.SHARDS_PARAMETERS: TRACED_DATA_RANKS}))
        styles = tuple((group.name, group.options[0]) for group in self.groups(candidate))
        return Piece(mesh.axes, styles, micro_batch, reshard=candidate.reshard)

    def with_defaults(self, candidate: Candidate) -> Candidate:
        """With the default styles, and the same choice of the sequence."""
        first = {group.name: group.options[0] for group in self.groups(candidate)}
        styles = tuple(
            (name, option if name == SEQUENCE else first[name]) for name, option in candidate.styles
        )
        return replace(candidate, styles=styles)

    def is_default(self, candidate: Candidate) -> bool:
        first = {group.name: group.options[0] for group in self.groups(candidate)}
        return all(option == first[name] for name, option in candidate.styles if name != SEQUENCE)

    def setup_of(self, candidate: Candidate) -> Setup:
        return replace(
            self.setup,
            mesh=candidate.mesh,
            micro_batches=candidate.micro_batches,
            chunks=candidate.chunks,
            schedule=None,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """composed_s: what its pieces gave, where it was put together."""

    candidate: Candidate
    prediction: Prediction
    composed_s: float | None = None


@dataclass(slots=True)
class Outcome:
    """answers: best first. gap, ruled_out, unlooked: see core/search.py. needed_bytes: the least that any
    candidate needs, of those that don't fit."""

    answers: list[Answer] = field(default_factory=list)
    considered: list[Considered] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    gap: float = math.inf
    predicted: int = 0
    composed: int = 0
    traces: int = 0
    ruled_out: int = 0
    unlooked: int = 0
    needed_bytes: float = math.inf
    stopped: str | None = None

    def note(self, candidate: Candidate, step_s: float, n_bytes: float, known: Known, *, fits: bool) -> None:
        """For the picture."""
        self.considered.append(Considered(candidate, step_s, n_bytes, known, fits))

    def refuse_large(self, candidate: Candidate, step_s: float, n_bytes: float, known: Known) -> None:
        self.refused["it doesn't fit in a device's memory"] += 1
        self.needed_bytes = min(self.needed_bytes, n_bytes)
        self.note(candidate, step_s, n_bytes, known, fits=False)
