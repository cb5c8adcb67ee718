"""What `compare` checks of a case, or chooses, before its ranks start."""

from typing import TYPE_CHECKING

from shardwise.core.case import Case
from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh
from shardwise.core.plan import AnyPlan, suggest
from shardwise.verbs.checks import ROWWISE, default_plan

if TYPE_CHECKING:
    from torch import nn

    from shardwise.models.source import ModelSource

DEFAULT_PLANS = ("rowwise", "colwise", "routed", "rowwise@dtensor", "colwise@dtensor")
_ROOM = 2**33
"""Bytes, where the system doesn't tell what is free."""


def default_plans(source: "ModelSource") -> tuple[str, ...]:
    """The built-in ones where they are for the model, else its own."""
    import torch

    from shardwise.parallel.resolve import tied_parameters

    default = default_plan(source)
    if default != ROWWISE:
        return (default,)
    # PyTorch's own styles would untie a head
    is_tied = bool(tied_parameters(source.build(dtype=torch.float32)))
    return tuple(name for name in DEFAULT_PLANS if not (is_tied and name.endswith("@dtensor")))


def check_module(model: "nn.Module", model_name: str, module: str, mesh: Mesh) -> None:
    """Raises OptionError for a module that isn't there, or that can't be timed alone."""
    names = [name for name, _ in model.named_modules() if name]
    if module not in names:
        shown = names[:3] + [name for name in names[3:] if "." not in name]
        raise OptionError(
            f'--module: {model_name} has no module "{module}".{suggest(module, names)} '
            f"It has {', '.join(shown)}, ..."
        )
    if mesh.stages > 1:
        raise OptionError(
            f"--module {module}: lives on some stages of a pipeline only, and is timed on all ranks at once. "
            "Use a mesh with pp=1."
        )
    if mesh.fsdp > 1:
        raise OptionError(
            f"--module {module}: FSDP gathers a module's parameters for a whole layer, so one can't be timed "
            "alone. Use tp or dp."
        )


def check_fit(
    source: "ModelSource",
    model: "nn.Module",
    plans: "list[AnyPlan]",
    case: Case,
    device_type: str,
    repeat: bool,
) -> None:
    """Every plan against the model, then the machine against what they need."""
    import torch

    from shardwise.launch.environment import available_memory, ranks_here
    from shardwise.models.layers import find_layers
    from shardwise.parallel.any_plan import check_any
    from shardwise.parallel.need import refuse_too_large
    from shardwise.step.train import recompute_in

    if case.step.recompute != "none" and find_layers(model) is None:
        recompute_in((), case.step.recompute)  # says so
    mesh = case.mesh
    for plan in plans:
        check_any(source, model, plan, mesh, case.step.seq)
    is_one_host = ranks_here(mesh.world_size) == mesh.world_size
    refuse_too_large(
        model,
        source.name,
        plans,
        mesh,
        getattr(torch, case.step.dtype),
        device_type=device_type,
        copies=len(plans) + repeat,
        available=available_memory() if is_one_host else None,
    )


def check_depth(source: "ModelSource", model: "nn.Module", mesh: Mesh, device_type: str) -> int:
    """Depth at which the unsharded model fits beside a sharded one, in float64: weights and gradients of both
    on every rank of a device, and while one is built its initial weights. 0 for all of a model without a list
    of layers. Raises OptionError where nothing fits."""
    from shardwise.models.layers import find_layers

    room, layers = _room(mesh, device_type), find_layers(model)
    depths = [0]
    if layers is not None:
        kinds = layers.kinds(model)
        depths = sorted({layers.count, max(kinds, min(2, layers.count)), kinds}, reverse=True)
    for depth in depths:
        parameters = _parameters_of(model, depth)
        drawn = parameters if source.initialises and device_type == "cpu" else 0
        beside = max(2 * parameters / mesh.tp, drawn + parameters / mesh.tp)
        if 8 * (2 * parameters + beside) <= room:
            return depth
    least = f"{depths[-1]} layer{'s' if depths[-1] > 1 else ''} of {source.name}" if layers else source.name
    raise OptionError(
        f"--check: {least} unsharded in float64 doesn't fit here, with {_gib(room)} for a rank. Leave the "
        "check out with --no-check."
    )


def _room(mesh: Mesh, device_type: str) -> float:
    import torch

    from shardwise.launch.environment import available_memory, ranks_here

    if device_type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory * 0.7
    return (available_memory() or _ROOM) * 0.5 / ranks_here(mesh.world_size)


def _parameters_of(model: "nn.Module", depth: int) -> int:
    """Of its first `depth` layers and all that is outside of them; 0: of all layers."""
    from shardwise.models.layers import find_layers

    layers = find_layers(model)
    left_out = set()
    if depth and layers is not None:
        beyond = list(layers.modules(model))[depth:]
        left_out = {parameter for layer in beyond for parameter in layer.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if parameter not in left_out)


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
