"""From a spec and a plan to a model on this rank, filled and ready for a TrainStep; no rank ever holds more
than one whole parameter."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from shardwise.core.mesh import SHARDS_AXIS, Mesh
from shardwise.core.plan import Plan
from shardwise.models.init import initial_parameter
from shardwise.models.specs import ModelSpec
from shardwise.parallel.apply import applied_to, parallelize
from shardwise.parallel.parameters import fill
from shardwise.step.train import recompute_layers, shard_with_fsdp


def device_mesh(mesh: Mesh, device_type: str) -> DeviceMesh:
    """The process group's ranks in the shape of `mesh`."""
    names, sizes = zip(*mesh.axes, strict=True)
    return init_device_mesh(device_type, sizes, mesh_dim_names=names)


def build_model(
    spec: ModelSpec,
    plan: Plan | None,
    mesh: DeviceMesh | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    policy: MixedPrecisionPolicy | None = None,
    recompute: str = "none",
    compiled: bool = False,
    on_parameter: Callable[[str, Tensor], None] | None = None,
) -> nn.Module:
    """The model under `plan` (None: no tensor parallelism), with the initial weights of `seed`. policy:
    FSDP's mixed precision. recompute: see recompute_layers. on_parameter: shown each whole initial
    parameter."""
    model = spec.build("meta", dtype)
    if plan is not None:
        assert mesh is not None
        parallelize(model, plan, mesh)

    def whole(name: str, shape: torch.Size) -> Tensor:
        tensor = initial_parameter(name, shape, seed=seed, dtype=dtype, device=device)
        if on_parameter is not None:
            on_parameter(name, tensor)
        return tensor

    fill(model, whole, applied_to(model).row_order)
    if compiled:
        for layer in model.layers:
            layer.compile()
    if recompute != "none":
        recompute_layers(model.layers, recompute)
    if mesh is not None and SHARDS_AXIS in (mesh.mesh_dim_names or ()):
        shard_with_fsdp(model, model.layers, mesh[SHARDS_AXIS], policy or MixedPrecisionPolicy())
    return model
