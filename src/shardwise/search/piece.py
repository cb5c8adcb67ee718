"""Piece: what of a candidate a trace depends on. Candidates that share one share its Program: they differ in
stages, in the sizes of the data axes, and in how many micro-batches a step has."""

from dataclasses import dataclass, replace

from shardwise.core.mesh import AXES, Mesh, Role
from shardwise.core.program import Program
from shardwise.core.search import Candidate
from shardwise.predict.traced import traced_mesh

INNER = (Role.CUTS_EXPERTS, Role.CUTS_TENSORS)
"""Axes that decide which ops a rank runs, whatever its share of the tokens."""


@dataclass(frozen=True, slots=True)
class Piece:
    """axes: of the mesh that it is traced on. styles: by group. micro_batch: sequences of a data-parallel
    rank. recompute: of all layers, or of `recomputed` ones. dealt: stages and chunks, where these say
    which."""

    axes: tuple[tuple[str, int], ...]
    styles: tuple[tuple[str, str], ...]
    micro_batch: int
    recompute: str = "none"
    recomputed: int | None = None
    reshard: bool = True
    dealt: tuple[int, int] = (1, 1)

    @property
    def root(self) -> "Piece":
        """The piece without data axes, context ranks and recompute: what a rank computes at least, of the
        tokens that it has."""
        sizes = {axis.role: Mesh(self.axes).size(axis.name) for axis in AXES if axis.role in INNER}
        kept = Mesh.of({role: size for role, size in sizes.items() if size > 1})
        return Piece(kept.axes, self.styles, self.micro_batch)

    def with_styles(self, styles: tuple[tuple[str, str], ...]) -> "Piece":
        return replace(self, styles=styles)


@dataclass(frozen=True, slots=True)
class Unfit:
    """Why a piece can't be traced."""

    reason: str


Traced = Program | Unfit


def piece_of(candidate: Candidate, layers: int) -> Piece:
    """layers: of the model."""
    mesh = traced_mesh(candidate.mesh)
    has_shards = bool(mesh.shard_axes)
    is_part = 0 < candidate.recomputed < layers
    return Piece(
        mesh.axes,
        candidate.styles,
        candidate.micro_batch,
        candidate.recompute if candidate.recomputed else "none",
        candidate.recomputed if is_part else None,
        candidate.reshard or not has_shards,
        (candidate.mesh.stages, candidate.chunks) if is_part else (1, 1),
    )
