"""Over which axes of the mesh the ranks' gradients make up the whole one: where a sum is lacking, the sum of
what the ranks along those axes have is right, and along no others; or ranks have each other's parts, or all
of them the sum of what each should have for itself.

Asked of every set of axes, the smallest first: a gradient may lack its sums over two axes, and then only both
together show it. What is cut over other axes is gathered before. Stages hold other parameters each, but for a
tied one, which both ends hold.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

import torch.distributed as dist
from torch import Tensor, nn

from shardwise.core.batch_part import coordinate
from shardwise.core.mesh import Mesh, Role, joined, role_of
from shardwise.step.groups import mesh_of
from shardwise.step.portion import Portion
from shardwise.verify.exchange import gathered
from shardwise.verify.expected import Unsharded
from shardwise.verify.held import held_over, size
from shardwise.verify.relation import Related, Relation, relate

MOST_ELEMENTS = 1_000_000
"""Of the gradients that are looked at: every rank gets all ranks' of them."""


@dataclass(frozen=True, slots=True)
class Along:
    """How what the ranks along these axes have of a gradient relates to the whole."""

    axes: tuple[str, ...]
    n_ranks: int
    relation: Relation = Relation.PARTS

    @property
    def named(self) -> str:
        return joined(self.axes)


def unsummed(
    model: nn.Module,
    gradients: Mapping[str, Tensor | None],
    expected: Unsharded,
    names: Sequence[str],
    portion: Portion,
) -> dict[str, Along]:
    """Of the wrong gradients those that lack a sum, or lie wrongly, over some axes, each with the fewest. All
    ranks call it, with the same names, and come to the same."""
    assert portion.mesh is not None
    mesh = mesh_of(portion.mesh)
    found: dict[str, Along] = {}
    names = list(_few(names, expected))
    for axes in _sets_of_axes(mesh):
        every = gathered([held_over(gradients.get(name), model, axes) for name in names], _all_ranks())
        for at, name in enumerate(names):
            holder = next((rank for rank, held in enumerate(every) if held[at] is not None), 0)
            pieces = [every[other][at] for other in _ranks_along(mesh, holder, axes)]
            if _over_stages(axes):
                pieces = [piece for piece in pieces if piece is not None]
            whole = expected.observed.gradients[name]
            assert whole is not None
            tolerance = expected.allowed[name] / (size(whole) or 1.0)
            if name not in found and len(pieces) > 1:
                related = relate(pieces, whole, tolerance=tolerance)
                if _tells(related, axes):
                    found[name] = Along(axes, len(pieces), related.relation)
    return found


def _few(names: Sequence[str], expected: Unsharded) -> Iterator[str]:
    """As many as may go to all ranks; the same on each."""
    left = MOST_ELEMENTS
    for name in names:
        whole = expected.observed.gradients[name]
        if whole is not None and whole.numel() <= left:
            left -= whole.numel()
            yield name


def _sets_of_axes(mesh: Mesh) -> Iterator[tuple[str, ...]]:
    several = [name for name, n in mesh.axes if n > 1]
    for count in range(1, len(several) + 1):
        yield from combinations(several, count)


def _ranks_along(mesh: Mesh, rank: int, axes: Sequence[str]) -> list[int]:
    """Those that differ from this one in these axes only, itself among them, in the mesh's order."""
    others = [name for name, _ in mesh.axes if name not in axes]
    own = [coordinate(mesh, rank, name) for name in others]
    found = [
        other for other in range(mesh.world_size) if [coordinate(mesh, other, name) for name in others] == own
    ]
    assert len(found) == prod(map(mesh.size, axes))
    return found


def _over_stages(axes: Sequence[str]) -> bool:
    return any(role_of(name) is Role.CUTS_DEPTH for name in axes)


def _tells(related: Related, axes: Sequence[str]) -> bool:
    if related.relation in (Relation.SHIFTED, Relation.ADDED):
        return len(axes) == 1
    return related.relation is Relation.PARTS and related.factor is None


def _all_ranks() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group
