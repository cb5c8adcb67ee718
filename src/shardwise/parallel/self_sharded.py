"""A model that its factory has sharded, as plan "own" takes it: what it told beside its DTensors is carried
out here.

Parameters that it left as plain tensors, each rank its part, become DTensors of the placements that it told,
so that weights are set, gradients compared and optimizers run as for any other. Their modules meet the plain
tensors as before (own_forward.py), and so does what the framework calls between backward and clipping.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Placement as TorchPlacement

from shardwise.core.errors import ModelError
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.models.model_source import ModelSource
from shardwise.models.self_sharded import SelfSharded, sharding_source, told_of
from shardwise.parallel.apply import Applied, applied_to, is_applied, mark_applied
from shardwise.parallel.loss import DTensorLoss
from shardwise.parallel.own_forward import in_place, wrap
from shardwise.torch_private import hooks_of, local_shape_and_offset, parameters_of

Placements = tuple[TorchPlacement, ...]


def build_sharded(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device | str = "meta", mesh: DeviceMesh
) -> nn.Module:
    """The model as its source shards it over `mesh`; applied_to() knows what was told of it. Raises
    OptionError for a source that doesn't shard itself, ModelError for what build() raises and for told
    placements that don't fit."""
    own = sharding_source(source)
    model = own.build(dtype=dtype, device=device, mesh=mesh)
    applied = (
        applied_to(model) if is_applied(model) else Applied(None, DTensorLoss())
    )  # it takes whole ones too
    told = told_of(model)
    if told is not None:
        left = _LeftPlain.of(told, source, dtype, mesh)
        if told.after_backward is not None:
            applied = replace(applied, after_backward=left.with_plain(told.after_backward))
        if told.clip_grad_norm is not None:
            applied = replace(applied, clip=left.with_plain(told.clip_grad_norm))
    mark_applied(model, applied)
    return model


@dataclass(frozen=True, slots=True, eq=False)
class _Left:
    """A parameter that was left plain, and the DTensor of the same memory that takes all of its places.
    gradient: its placements when clipping begins."""

    plain: nn.Parameter
    first: nn.Parameter
    gradient: Placements
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def put(self) -> None:
        for hook in hooks_of(self.plain)[1]:
            self.first.register_post_accumulate_grad_hook(partial(_with_stand_in, self, hook))
        for module, name in self.places:
            parameters_of(module)[name] = self.first

    @property
    def held(self) -> Tensor:
        """What stands in its places now; DTensors may have been put there by others since."""
        module, name = self.places[0]
        held: Tensor = parameters_of(module)[name]
        return held

    def stand_in(self) -> nn.Parameter:
        """A plain parameter of this rank's part and its gradient: the framework's own, as long as it is of
        the same memory."""
        held = self.held
        assert isinstance(held, DTensor)
        local = held.to_local().detach()
        plain = self.plain
        if not _are_one(plain, local):
            plain = nn.Parameter(local, requires_grad=held.requires_grad)
            vars(plain).update(vars(self.plain))
        gradient = held.grad
        plain.grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        return plain

    def take_gradient(self, plain: nn.Parameter) -> None:
        """Of the stand-in, whatever was made of it."""
        held, gradient = self.held, plain.grad
        assert isinstance(held, DTensor)
        plain.grad = None
        placements = held.grad.placements if isinstance(held.grad, DTensor) else self.gradient
        held.grad = None if gradient is None else _as_dtensor(gradient, held, placements)


@dataclass(frozen=True, slots=True)
class _LeftPlain:
    """All of them, and the mesh of their placements."""

    parameters: Sequence[_Left]
    mesh: DeviceMesh

    @classmethod
    def of(cls, told: SelfSharded, source: ModelSource, dtype: torch.dtype, mesh: DeviceMesh) -> "_LeftPlain":
        """Puts DTensors into the places of plain parameters whose placements were told. Raises ModelError."""
        model, on = told.model, told.mesh or mesh
        if told.mesh is None and mesh.ndim > 1 and all(len(each) == 1 for each in told.placements.values()):
            on = mesh[TENSOR_AXIS]
        shapes = _whole_shapes(source, dtype) if told.placements else {}
        left: dict[int, _Left] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in told.placements and id(parameter) not in left:
                placements = _checked(source.name, name, parameter, told.placements[name], on)
                gradient = _checked(source.name, name, parameter, told.gradients.get(name, placements), on)
                held = _held(source.name, name, parameter, placements, on, shapes.get(name))
                left[id(parameter)] = _Left(parameter, held, gradient)
        for module in model.modules():
            for name, parameter in parameters_of(module).items():
                if id(parameter) in left:
                    left[id(parameter)].places.append((module, name))
        found = cls(tuple(left.values()), on)
        for each in found.parameters:
            each.put()
        for module in model.modules():
            found._run_on_plain(module)
        return found

    def with_plain(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` with the model as the factory returned it: plain parameters in their places, with their
        gradients, which are taken back from them afterwards."""

        def called(*args: Any) -> Any:
            with self._as_returned():
                return call(*args)

        return called if self.parameters else call

    @contextmanager
    def _as_returned(self) -> Iterator[None]:
        plain = [(each, each.stand_in()) for each in self.parameters]
        places = [
            (parameters_of(module), name, parameter)
            for each, parameter in plain
            for module, name in each.places
        ]
        with in_place(places):
            yield
        for each, parameter in plain:
            each.take_gradient(parameter)

    def _run_on_plain(self, module: nn.Module) -> None:
        """Gives a module that holds some of them, itself or further inside, a forward that meets plain
        tensors. What is inside too: a recomputed forward begins there."""
        inside = set(module.modules())
        used = [(each, place) for each in self.parameters for place in each.places if place[0] in inside]

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with in_place(self._plain(used)):
                return inner(*args, **kwargs)

        if used:
            wrap(module, around)

    def _plain(
        self, used: Sequence[tuple[_Left, tuple[nn.Module, str]]]
    ) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """What isn't plain yet; nor what FSDP2 has cut over another axis, and makes whole in its module's own
        call."""
        made: dict[int, Tensor] = {}
        for each, (module, name) in used:
            there = parameters_of(module)
            held = there[name]
            if not isinstance(held, DTensor) or held.device_mesh != self.mesh:
                continue
            if id(held) not in made:
                local = held.to_local(grad_placements=each.gradient)
                vars(local).update(vars(each.plain))  # what the framework wrote on it
                for hook in hooks_of(each.plain)[0]:
                    local.register_hook(hook)
                made[id(held)] = local
            yield there, name, made[id(held)]


def _with_stand_in(left: _Left, hook: Callable[[nn.Parameter], None], _: Tensor) -> None:
    plain = left.stand_in()
    hook(plain)
    left.take_gradient(plain)


def _are_one(parameter: Tensor, local: Tensor) -> bool:
    """Whether a real parameter is of the memory of a local tensor. Others' addresses say nothing."""
    is_real = type(local) is Tensor and local.device.type != "meta" and parameter.device == local.device
    return is_real and parameter.shape == local.shape and parameter.data_ptr() == local.data_ptr()


def _as_dtensor(local: Tensor, like: DTensor, placements: Sequence[TorchPlacement]) -> DTensor:
    return DTensor.from_local(
        local, like.device_mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _held(
    model: str,
    name: str,
    plain: nn.Parameter,
    placements: Placements,
    mesh: DeviceMesh,
    whole: torch.Size | None,
) -> nn.Parameter:
    """The DTensor of a plain parameter's memory. whole: its shape unsharded; None where nobody knows it."""
    local = plain.detach()
    if whole is None:  # as if it were cut evenly
        whole = DTensor.from_local(local.to("meta"), mesh, placements, run_check=False).shape
    expected, _ = local_shape_and_offset(whole, mesh, placements)
    if tuple(expected) != tuple(local.shape):
        raise ModelError(
            f'model "{model}": {name} is {list(local.shape)} on a rank; as {_text(placements)} of '
            f"{list(whole)} over mesh {_axes(mesh)} it would be {list(expected)}. Tell the placements that "
            "it has."
        )
    stride = torch.empty(whole, device="meta").stride()
    held = DTensor.from_local(local, mesh, placements, run_check=False, shape=whole, stride=stride)
    return nn.Parameter(held, requires_grad=plain.requires_grad)


def _whole_shapes(source: ModelSource, dtype: torch.dtype) -> dict[str, torch.Size]:
    """By name, of the unsharded model; none where it can't be built without weights."""
    try:
        model = source.build(dtype=dtype)
    except ModelError:
        return {}
    return {name: each.shape for name, each in model.named_parameters(remove_duplicate=False)}


def _checked(
    model: str, name: str, parameter: Tensor, placements: Sequence[TorchPlacement], mesh: DeviceMesh
) -> Placements:
    if isinstance(parameter, DTensor):
        raise ModelError(
            f'model "{model}": SelfSharded tells placements of {name}, which is a DTensor and has its own. '
            "Leave it out."
        )
    if len(placements) != mesh.ndim:
        raise ModelError(
            f'model "{model}": SelfSharded tells {len(placements)} placements of {name}, and mesh '
            f"{_axes(mesh)} has {mesh.ndim} axes. Give one for each axis, or name the mesh."
        )
    return tuple(placements)


def _text(placements: Placements) -> str:
    return ", ".join(map(str, placements))


def _axes(mesh: DeviceMesh) -> str:
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    return ",".join(f"{name}={size}" for name, size in zip(names, mesh.shape, strict=True))
