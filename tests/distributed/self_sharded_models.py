"""Models that shard themselves with plain tensors, written as frameworks do it without DTensor: each rank has
its part, autograd functions send, and a loop of the framework's own sums what is left and clips."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.utils.checkpoint import checkpoint

from shardwise import SelfSharded

Group = dist.ProcessGroup | None
# uneven over two ranks
INNER = 15


class _Copied(torch.autograd.Function):
    """The same on every rank; its gradient is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = gradient.clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _Summed(torch.autograd.Function):
    """Summed over ranks; its gradient is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        summed = x.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def copied(x: Tensor, group: Group) -> Tensor:
    given: Tensor = _Copied.apply(x, group) if group is not None else x
    return given


def summed(x: Tensor, group: Group) -> Tensor:
    given: Tensor = _Summed.apply(x, group) if group is not None else x
    return given


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16))


class Layer(nn.Module):
    """`gain` works on what each rank takes into its part: each finds a summand of its gradient. It is read
    from outside of the module that owns it."""

    def __init__(self, up: nn.Linear) -> None:
        super().__init__()
        self.norm, self.up, self.down = Gain(), up, nn.Linear(up.out_features, 16)
        self.group: Group = None

    def forward(self, x_BSH: Tensor) -> Tensor:
        taken = copied(x_BSH, self.group) * self.norm.gain
        part = nn.functional.linear(torch.relu(self.up(taken)), self.down.weight)
        return x_BSH + summed(part, self.group) + self.down.bias


class Model(nn.Module):
    """Takes positions and gives a pair. ties: both layers have one `up`."""

    def __init__(self, inner: int = INNER, *, ties: bool = True) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(64, 16), nn.Embedding(32, 16)
        ups = [nn.Linear(16, inner) for _ in range(2)]
        self.layers = nn.ModuleList(Layer(ups[0] if ties else up) for up in ups)
        self.head = nn.Linear(16, 64)

    def forward(self, ids_BS: Tensor, positions_S: Tensor) -> tuple[Tensor, None]:
        x = self.words(ids_BS) + self.places(positions_S)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(x), None


def logits(forward: Callable[..., Any], ids_BS: Tensor) -> Tensor:
    found: Tensor = forward(ids_BS, torch.arange(ids_BS.shape[1], device=ids_BS.device))[0]
    return found


def sharded(mesh: DeviceMesh, model: Model | None = None) -> tuple[Model, dict[str, tuple[Placement, ...]]]:
    """The model, and the placements of what is cut in it."""
    model, tp = model or Model(), mesh["tp"] if mesh.ndim > 1 else mesh
    told: dict[str, tuple[Placement, ...]] = {}
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.group = tp.get_group()
    for name, _ in list(model.named_parameters()):  # a tied one once
        dims = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
        module, _, own = name.rpartition(".")
        dim = dims.get(f"{module.rpartition('.')[2]}.{own}")
        if dim is not None:
            cut(model.get_submodule(module), own, dim, tp)
            told[name] = (Shard(dim),)
    return model, told


def cut(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    part = module.get_parameter(name).detach().chunk(mesh.size(), dim)[mesh.get_local_rank()]
    setattr(module, name, nn.Parameter(part.clone(memory_format=torch.contiguous_format)))


def gains(model: nn.Module) -> Iterable[nn.Parameter]:
    return (each for name, each in model.named_parameters() if name.endswith("gain"))


def sum_gains(model: nn.Module, mesh: DeviceMesh) -> None:
    """What a framework calls after the backward. It knows of no DTensors."""
    for parameter in model.parameters():
        assert not isinstance(parameter, DTensor)
        assert not isinstance(parameter.grad, DTensor)
    for gain in gains(model):
        assert gain.grad is not None
        dist.all_reduce(gain.grad, group=mesh.get_group("tp"))


def squares(model: nn.Module, group: Group, is_cut: Callable[[str], bool]) -> Tensor:
    """Of all gradients, with one all-reduce of what is cut."""
    cut = torch.zeros((), dtype=torch.float64)
    whole = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            (cut if is_cut(name) else whole).add_(parameter.grad.double().square().sum())
    dist.all_reduce(cut, group=group)
    return cut + whole


def clipping(model: nn.Module, group: Group, is_cut: Callable[[str], bool]) -> Callable[[float], Tensor]:
    def clip(max_norm: float) -> Tensor:
        norm = squares(model, group, is_cut).sqrt()
        scale = float((max_norm / norm).clamp(max=1.0))
        for parameter in model.parameters():
            assert not isinstance(parameter, DTensor)
            if parameter.grad is not None:
                parameter.grad = parameter.grad * scale
        return norm

    return clip


def right(mesh: DeviceMesh | None = None) -> SelfSharded:
    """Local tensors, a sum after the backward, and clipping of its own."""
    if mesh is None:
        return SelfSharded(Model(), logits=logits)
    model, told = sharded(mesh)
    return SelfSharded(
        model,
        placements=told,
        after_backward=lambda: sum_gains(model, mesh),
        clip_grad_norm=clipping(model, mesh.get_group("tp"), lambda name: name in told),
        logits=logits,
    )


def right_under_fsdp(mesh: DeviceMesh | None = None) -> SelfSharded:
    """All of it told of, so that what FSDP cuts further is plain where the framework meets it."""
    model = Model(16, ties=False)
    if mesh is None:
        return SelfSharded(model, logits=logits)
    model, told = sharded(mesh, model)
    told = {name: told.get(name, (Replicate(),)) for name, _ in model.named_parameters()}
    return SelfSharded(model, placements=told, after_backward=lambda: sum_gains(model, mesh), logits=logits)


def summed_by_hooks(mesh: DeviceMesh | None = None) -> SelfSharded:
    """The framework's hooks sum, one on a gradient and one on what is accumulated; both parameters are told
    of though they are whole."""
    if mesh is None:
        return SelfSharded(Model(), logits=logits)
    model, told = sharded(mesh)
    group = mesh.get_group("tp")
    first, second = gains(model)

    def accumulated(parameter: Tensor) -> None:
        assert not isinstance(parameter.grad, DTensor)
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)

    def gradient(found: Tensor) -> Tensor:
        total = found.clone()
        dist.all_reduce(total, group=group)
        return total

    first.register_hook(gradient)
    second.register_post_accumulate_grad_hook(accumulated)
    told |= {f"layers.{number}.norm.gain": (Replicate(),) for number in range(2)}
    return SelfSharded(model, placements=told, logits=logits)


def told_as_summands(mesh: DeviceMesh | None = None) -> SelfSharded:
    """Gradients that the framework's optimizer would sum."""
    if mesh is None:
        return SelfSharded(Model(), logits=logits)
    model, told = sharded(mesh)
    names = [f"layers.{number}.norm.gain" for number in range(2)]
    return SelfSharded(
        model,
        placements=told | dict.fromkeys(names, (Replicate(),)),
        gradients=dict.fromkeys(names, (Partial(),)),
        mesh=mesh["tp"],
        logits=logits,
    )


def summed_by_nobody(mesh: DeviceMesh | None = None) -> SelfSharded:
    if mesh is None:
        return SelfSharded(Model(), logits=logits)
    model, told = sharded(mesh)
    return SelfSharded(model, placements=told, logits=logits)


def clipped_as_if_cut(mesh: DeviceMesh | None = None) -> SelfSharded:
    """Its clipping counts what is whole once for each rank."""
    if mesh is None:
        return SelfSharded(Model(), logits=logits)
    model, told = sharded(mesh)
    return SelfSharded(
        model,
        placements=told,
        after_backward=lambda: sum_gains(model, mesh),
        clip_grad_norm=clipping(model, mesh.get_group("tp"), lambda name: True),
        logits=logits,
    )


def fails_after_the_backward(mesh: DeviceMesh | None = None) -> SelfSharded:
    if mesh is None:
        return SelfSharded(Model(), logits=logits)
    model, told = sharded(mesh)

    def after() -> None:
        raise ValueError("no bucket for gain")

    return SelfSharded(model, placements=told, after_backward=after, logits=logits)


def told_the_other_dim(mesh: DeviceMesh | None = None) -> SelfSharded:
    if mesh is None:
        return SelfSharded(Model(), logits=logits)
    model, told = sharded(mesh)
    return SelfSharded(model, placements=told | {"layers.0.up.weight": (Shard(1),)}, logits=logits)


class Plain(nn.Module):
    """Without a sum that only the framework knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(64, 16), nn.Linear(16, 16, bias=False)
        self.gate, self.down = nn.Linear(16, 16, bias=False), nn.Linear(16, 64, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x = self.words(ids_BS)
        given: Tensor = self.down(torch.relu(self.up(x) * self.gate(x)))
        return given


def two_meshes(mesh: DeviceMesh | None = None) -> nn.Module:
    """All parameters are DTensors, of two meshes of the same ranks, as a framework's dense parts and experts
    are."""
    model = Plain()
    if mesh is None:
        return model
    tp = mesh["tp"] if mesh.ndim > 1 else mesh
    ep = DeviceMesh.from_group(tp.get_group(), tp.device_type, mesh_dim_names=("ep",))
    for name, parameter in list(model.named_parameters()):
        module_name, _, own = name.rpartition(".")
        on, placement = (ep, Shard(0)) if module_name == "gate" else (tp, Replicate())
        part = parameter.detach()
        if on is ep:
            part = part.chunk(ep.size())[ep.get_local_rank()].clone()
        held = DTensor.from_local(part, on, (placement,), run_check=False)
        setattr(model.get_submodule(module_name), own, nn.Parameter(held))

    def plainly(module: nn.Linear | nn.Embedding) -> None:
        def forward(x: Tensor) -> Tensor:
            weight = module.weight
            assert isinstance(weight, DTensor)
            whole = weight.redistribute(placements=(Replicate(),)).to_local(grad_placements=(Replicate(),))
            if isinstance(module, nn.Embedding):
                return nn.functional.embedding(x, whole)
            return nn.functional.linear(x, whole)

        module.forward = forward  # type: ignore[assignment, method-assign]

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            plainly(module)
    return model


def with_replicas(mesh: DeviceMesh | None = None) -> nn.Module:
    """FSDP2 over two axes, as hybrid sharding is: it adds the replicas' gradients itself, but for those of
    the module `down`, which it has on one axis alone."""
    model = Plain()
    if mesh is None:
        return model
    for name, module in model.named_children():
        fully_shard(module, mesh=mesh["fsdp"] if name == "down" else mesh["dp", "fsdp"])
    return model
