"""spmd_types: what its types say of plain local tensors, as placements.

S(dim) is a shard; R a parameter that is whole and whose gradient each rank has a summand of; I one whose
gradient is whole too. It is imported only when somebody asks.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from shardwise.core.mesh import EXPERTS_AXIS, TENSOR_AXIS
from shardwise.core.placement import Partial as OurPartial
from shardwise.core.placement import Placement as OurPlacement
from shardwise.core.placement import Replicate as OurReplicate
from shardwise.core.placement import Shard as OurShard
from shardwise.models.self_sharded import Changing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Told = dict[str, list[Placement]]


def placements_of(model: nn.Module, mesh: "DeviceMesh") -> tuple[Told, Told]:
    """Of every parameter, by its types: (placements over the mesh, those of its gradient)."""
    from spmd_types import MeshAxis

    names = mesh.mesh_dim_names or (TENSOR_AXIS,)
    axes = [(MeshAxis.of(mesh.get_group(dim)), name != EXPERTS_AXIS) for dim, name in enumerate(names)]
    placements: Told = {}
    gradients: Told = {}
    for name, parameter in model.named_parameters():
        types = _types(parameter)
        placements[name] = [_placed(types.get(axis)) for axis, _ in axes]
        # ranks of experts see other tokens, and a step sums what those found
        gradients[name] = [
            Partial() if sees_all and _is_summand(types.get(axis)) else _placed(types.get(axis))
            for axis, sees_all in axes
        ]
    return placements, gradients


def _types(parameter: Tensor) -> dict[Any, Any]:
    """An axis, which is known by its ranks -> R, I or S(dim)."""
    import spmd_types
    from spmd_types.runtime import get_local_type, get_partition_spec

    types = dict(get_local_type(parameter))
    for dim, entry in enumerate(get_partition_spec(parameter) or ()):
        types |= {axis: spmd_types.S(dim) for axis in (entry if isinstance(entry, tuple) else (entry,))}
    return types


def _placed(kind: Any) -> Placement:
    import spmd_types

    return Shard(kind.dim) if isinstance(kind, spmd_types.Shard) else Replicate()


def _is_summand(kind: Any) -> bool:
    """Whether each rank's gradient is one."""
    import spmd_types

    return kind is spmd_types.R


@contextmanager
def changes_of(changing: Changing) -> Iterator[None]:
    """What spmd_types' collectives turn into what. Its backwards call the same functions."""
    import spmd_types
    from spmd_types import _collectives

    known: dict[Any, OurPlacement] = {spmd_types.P: OurPartial()}
    known |= dict.fromkeys((spmd_types.R, spmd_types.I), OurReplicate())

    def of(kind: Any) -> OurPlacement | None:
        return OurShard(kind.dim) if isinstance(kind, spmd_types.Shard) else known.get(kind)

    def seen(original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            before, after = of(kwargs.get("src")), of(kwargs.get("dst"))
            around = changing(before, after) if before is not None and after is not None else nullcontext()
            with around:
                return original(*args, **kwargs)

        return collective

    with ExitStack() as stack:
        for name in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all"):
            stack.enter_context(patch.object(_collectives, name, seen(getattr(_collectives, name))))
        yield
