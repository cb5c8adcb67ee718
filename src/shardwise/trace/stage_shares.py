"""What each stage of a pipeline holds of a model, told by any rank: from the whole model, sharded and on the
meta device."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.core.layer_name import layer_index
from shardwise.core.mesh import Mesh
from shardwise.core.pipeline import Pipeline, Span, most_in_flight
from shardwise.core.program import StageShare
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.ends import Ends
from shardwise.torch_private import local_part


def shares_of(
    model: nn.Module, ends: Ends, pipeline: Pipeline, mesh: Mesh, micro_batches: int
) -> Iterator[StageShare]:
    """Of each stage, bytes as the rank there that stands where this one does along the other axes, and holds
    FSDP's first shards. model: whole, with a plan's DTensors."""
    layers = model.get_submodule(ends.layers.prefix)
    spans = pipeline.spans(sum(1 for _ in layers.children()))
    shards = 1
    for axis in mesh.shard_axes:
        shards *= mesh.size(axis)
    for stage in range(pipeline.stages):
        own = tuple(spans[part] for part in pipeline.parts_of(stage))
        held = set(_held(model, ends, own, stage == 0, stage == pipeline.stages - 1))
        yield StageShare(
            stage,
            tuple((span.first, span.count) for span in own),
            sum(parameter.numel() for parameter in held),
            sum(_first_shard_bytes(parameter, shards) for parameter in held),
            most_in_flight(pipeline.turns(stage, micro_batches)),
        )


def _held(
    model: nn.Module, ends: Ends, spans: tuple[Span, ...], is_first: bool, is_last: bool
) -> Iterator[nn.Parameter]:
    outside = {*(ends.before if is_first else ()), *(ends.after if is_last else ())}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        index = layer_index(name, ends.layers.prefix)
        owner = name.rpartition(".")[0]
        if owner in outside if index is None else any(index in span for span in spans):
            yield parameter


def _first_shard_bytes(parameter: Tensor, shards: int) -> int:
    """FSDP cuts what a rank has along dim 0, or along the dim that it is told, into equal parts."""
    local = local_part(parameter) if isinstance(parameter, DTensor) else parameter
    rows = local.shape[0] if local.dim() else 1
    return local.numel() // max(1, rows) * chunk_sizes(rows, shards)[0] * local.element_size()
