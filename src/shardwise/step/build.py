"""From a model and a plan to what trains on this rank, filled and ready for a TrainStep.

The model is built without weights, with real buffers (models/skeleton.py), sharded, and then filled parameter
by parameter, so that beside its own shards a rank holds one whole parameter on the device. On the host it
holds one whole model while it fills, where that is the model's own initialisation (models/init.py). A model
whose factory shards it is built as its factory does, and its weights are set in place.
"""

from collections.abc import Callable, Mapping
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from shardwise.core.case import StepSettings
from shardwise.core.errors import ModelError
from shardwise.core.mesh import STAGES_AXIS, Mesh
from shardwise.core.pipeline import Pipeline, Span, recomputed_of_fewer, recomputed_spans
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.models.init import draws_its_own, own_weights, weights_by_name
from shardwise.models.layers import find_layers
from shardwise.models.model_source import ModelSource
from shardwise.models.skeleton import build_without_weights
from shardwise.parallel.any_plan import apply_any
from shardwise.parallel.apply import applied_to
from shardwise.parallel.ends import ends_of
from shardwise.parallel.parameters import fill, part_of_dtensor
from shardwise.parallel.self_sharded import build_sharded
from shardwise.parallel.stages import cut_to_stage, stage_of
from shardwise.step.groups import along, mesh_of
from shardwise.step.train import mixed_precision, recompute_in, shard_with_fsdp, sum_gradients

Weights = Callable[[str, torch.Size], Tensor]
"""(name, shape) -> a whole initial parameter."""


def device_mesh(mesh: Mesh, device_type: str) -> DeviceMesh:
    """The process group's ranks in the shape of `mesh`; the same DeviceMesh each time, for each group of one
    keeps threads (gloo) and connections for as long as the process lives. All ranks must ask for the same."""
    return _device_mesh(mesh, device_type, dist.group.WORLD)


@cache
def _device_mesh(mesh: Mesh, device_type: str, world: object) -> DeviceMesh:
    """world: the process group that it is made of; another one has other meshes."""
    names, sizes = zip(*mesh.axes, strict=True)
    return init_device_mesh(device_type, sizes, mesh_dim_names=names)


def model_of_step(
    source: ModelSource,
    plan: AnyPlan,
    mesh: DeviceMesh,
    settings: StepSettings,
    *,
    device: torch.device,
    compiler: str | None = None,
    on_parameter: Callable[[str, Tensor], None] | None = None,
) -> nn.Module:
    """build_model() as the settings of a step have it. compiler: of each layer; None: none is compiled."""
    return build_model(
        source,
        plan,
        mesh,
        dtype=getattr(torch, settings.dtype),
        device=device,
        seed=settings.seed,
        policy=mixed_precision(settings),
        reshard=settings.reshard_after_forward,
        recompute=settings.recompute,
        recompute_layers=settings.recompute_layers,
        compiled=compiler is not None,
        compiler=compiler or "",
        pipeline=settings.pipeline(mesh_of(mesh)),
        on_parameter=on_parameter,
    )


def build_model(
    source: ModelSource,
    plan: AnyPlan | None,
    mesh: DeviceMesh | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    policy: MixedPrecisionPolicy | None = None,
    reshard: bool = True,
    recompute: str = "none",
    recompute_layers: int | None = None,
    compiled: bool = False,
    compiler: str = "inductor",
    depth: int | None = None,
    pipeline: Pipeline | None = None,
    on_parameter: Callable[[str, Tensor], None] | None = None,
) -> nn.Module:
    """The model under `plan` (None: whole, on one rank) in train mode, with the initial weights of `seed`,
    which are the same for every plan.

    policy: FSDP's mixed precision; reshard: see shard_with_fsdp. recompute: see recompute_in;
    recompute_layers: of so many of the model's layers. compiled: each layer, by that compiler of
    torch.compile's. depth: only the first so many of its repeated layers.
    pipeline: of the mesh's stages, of which this rank's is left.
    on_parameter: shown each whole initial parameter, which it may change in place. Raises ModelError, what
    apply_any() raises, and OptionError for layers that can't be dealt to the stages."""
    model = build_without_weights(source, dtype=dtype, device=device, seed=seed)
    first_names, shapes = _first_names(model), _shapes(model)
    own = draws_its_own(source, sum(parameter.numel() for parameter in model.parameters()))
    draw = own_weights(source, seed=seed, dtype=dtype, device=device) if own else None
    draw = draw or weights_by_name(seed=seed, dtype=dtype, device=device)
    if plan is TheirPlan.OWN:
        assert mesh is not None
        torch.manual_seed(seed)
        model = build_sharded(source, dtype=dtype, device=device, mesh=mesh)
    if depth is not None and (layers := find_layers(model)) is not None:
        recompute_layers = recomputed_of_fewer(recompute_layers, layers.count, depth)
        layers.shorten(model, depth)
    if plan is not None:
        assert mesh is not None
        apply_any(model, plan, mesh)
    if pipeline is not None and pipeline.stages > 1:
        assert mesh is not None
        computed = policy.param_dtype if policy is not None else None
        cut_over_stages(model, source, mesh, pipeline, computed or dtype)

    def whole(name: str, shape: torch.Size) -> Tensor:
        name = first_names.get(name, name)  # a plan may have given each of its places its own
        tensor = draw(name, shape)
        if on_parameter is not None:
            on_parameter(name, tensor)
        return tensor

    if plan is TheirPlan.OWN:
        set_in_place(model, whole, shapes)
    else:
        fill(model, whole, applied_to(model).row_order)
    if compiled:
        for layer in _layers(model):
            layer.compile(backend=compiler)
    return trainable(
        model, mesh, policy=policy, reshard=reshard, recompute=recompute, recompute_layers=recompute_layers
    )


def cut_over_stages(
    model: nn.Module, source: ModelSource, mesh: DeviceMesh, pipeline: Pipeline, dtype: torch.dtype
) -> None:
    """Leaves of a model, to which its plan has been applied, this rank's stage. dtype: that layers compute
    in. Raises OptionError for layers that can't be dealt to the stages."""
    stage, tp = mesh.get_local_rank(STAGES_AXIS), mesh_of(mesh).tp
    cut_to_stage(model, ends_of(source), pipeline, stage, tp=tp, dtype=dtype)


def trainable(
    model: nn.Module,
    mesh: DeviceMesh | None,
    *,
    policy: MixedPrecisionPolicy | None = None,
    reshard: bool = True,
    recompute: str = "none",
    recompute_layers: int | None = None,
) -> nn.Module:
    """The model, to which its plan has been applied, with recompute of its layers and FSDP over the mesh; in
    train mode. See build_model. Raises OptionError for a recompute of more layers than there are."""
    layers = _layers(model)
    if recompute != "none":
        recompute_in(_running_again(model, recompute_layers), recompute)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        sum_gradients(model)  # its factory has put it under FSDP2 itself
    elif mesh is not None and (shard_axes := mesh_of(mesh).shard_axes):
        policy = policy or MixedPrecisionPolicy()
        shard_with_fsdp(model, layers, along(mesh, shard_axes), policy, reshard=reshard)
    return model.train()


def _layers(model: nn.Module) -> list[nn.Module]:
    found = find_layers(model)
    return list(found.modules(model)) if found is not None else []


def _running_again(model: nn.Module, recompute_layers: int | None) -> list[nn.Module]:
    """The layers that this rank has of those that run again."""
    found, stage = find_layers(model), stage_of(model)
    if found is None:
        return []
    spans = stage.spans if stage is not None else (Span(0, found.count),)
    chosen = recomputed_spans(spans, recompute_layers)
    return [layer for number, layer in found.numbered(model) if any(number in span for span in chosen)]


@torch.no_grad()
def set_in_place(model: nn.Module, whole_of: Weights, shapes: Mapping[str, torch.Size]) -> None:
    """Gives a model that its factory has sharded the weights of the whole one, whose parameters have these
    shapes: hooks that the factory has put on its parameters stay. Raises ModelError for a parameter that the
    whole one hasn't."""
    order = applied_to(model).row_order
    for name, parameter in model.named_parameters():
        if parameter.shape != shapes.get(name):
            of_whole = list(shapes[name]) if name in shapes else "none of that name"
            raise ModelError(
                f'plan "own": parameter {name} is {list(parameter.shape)}, the unsharded model has '
                f"{of_whole}. Make sharded parameters DTensors of the whole's shape, under the same names."
            )
        whole = whole_of(name, parameter.shape)
        if isinstance(parameter, DTensor):
            part = part_of_dtensor(whole, parameter, order.get(name))
            parameter.to_local().copy_(part.to_local())
        else:
            parameter.copy_(whole)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Of each parameter's names, the one that named_parameters() gives it."""
    first: dict[nn.Parameter, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(parameter, name) for name, parameter in every}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
