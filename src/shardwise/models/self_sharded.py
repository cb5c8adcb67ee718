"""A model that shards itself: what is known of its source, and what its factory may tell beside the DTensors
that it leaves."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shardwise.core.errors import ModelError, OptionError
from shardwise.core.placement import Placement as OurPlacement
from shardwise.core.plan import suggest
from shardwise.core.shown import shown
from shardwise.models.model_source import ModelSource

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

_ATTRIBUTE = "_shardwise_told"
Changing = Callable[[OurPlacement, OurPlacement], AbstractContextManager[None]]


@runtime_checkable
class ShardsItself(ModelSource, Protocol):
    """A source whose models come sharded where they are given a mesh: plan "own" stands for what it does."""

    @property
    def takes_mesh(self) -> bool:
        """Whether it does; a factory need not."""

    def build(
        self, *, dtype: torch.dtype, device: torch.device | str = "meta", mesh: "DeviceMesh | None" = None
    ) -> nn.Module:
        """As ModelSource's, without a mesh. With one, this rank's part of the model: parameters of the same
        names, DTensors of the whole's shapes but for those that told_of() tells of. Raises ModelError."""


@dataclass(frozen=True, slots=True, eq=False)
class SelfSharded:
    """What a factory may return in place of the module that it has sharded, to tell what DTensors don't.

    placements: of parameters that are plain tensors and this rank's part, by name: for each axis of `mesh`,
    as a DTensor has them. A plain parameter that isn't named is whole on every rank. gradients: placements of
    such a parameter's gradient as clipping finds it, where they aren't the parameter's: Partial() for a
    summand. mesh: that of the placements; None is the factory's own, of which one placement means the axis
    "tp". after_backward: what the framework calls once per step between the last backward and clipping. It
    finds the model as it was returned: plain parameters where they were, their `.grad` plain too.
    clip_grad_norm: takes the largest norm, scales the gradients in place as the framework does, and returns
    the norm before. logits: logits(forward, ids [B, S]) -> [B, S, V], where the model's own forward takes or
    gives something else. changes: for a trace, which otherwise knows DTensor's redistributions only:
    changes(changing) is a context in which the framework's collectives run inside changing(before, after),
    what they turn into what along their axis. Names are checked when the model is built.
    """

    model: nn.Module
    placements: "Mapping[str, Sequence[Placement]]" = field(default_factory=dict)
    gradients: "Mapping[str, Sequence[Placement]]" = field(default_factory=dict)
    mesh: "DeviceMesh | None" = None
    after_backward: Callable[[], object] | None = None
    clip_grad_norm: Callable[[float], Tensor] | None = None
    logits: Callable[[Callable[..., Any], Tensor], Tensor] | None = None
    changes: Callable[[Changing], AbstractContextManager[None]] | None = None


def module_of(made: object, name: str) -> nn.Module:
    """The module that a factory made, which told_of() then knows of. name: of the model, for errors. Raises
    ModelError where it made something else, or tells of parameters that aren't there."""
    if not isinstance(made, SelfSharded):
        if isinstance(made, nn.Module):
            return made
        raise ModelError(
            f'model "{name}": the factory returned {shown(type(made).__name__)}. Return an nn.Module.'
        )
    model = made.model
    if not isinstance(model, nn.Module):
        raise ModelError(
            f'model "{name}": SelfSharded holds {shown(type(model).__name__)}. Give it the nn.Module that '
            "you have sharded."
        )
    known = dict(model.named_parameters(remove_duplicate=False))
    for told in (*made.placements, *made.gradients):
        if told not in known:
            raise ModelError(
                f'model "{name}": SelfSharded tells of "{shown(told)}", which is no parameter.'
                f"{suggest(told[:200], known)} Name those of named_parameters()."
            )
    untold = next((each for each in made.gradients if each not in made.placements), None)
    if untold is not None:
        raise ModelError(
            f'model "{name}": SelfSharded tells how the gradient of {shown(untold)} is placed, and not the '
            "parameter. Name it in placements too."
        )
    if made.logits is not None:
        _give_logits(model, made.logits)
    setattr(model, _ATTRIBUTE, made)
    return model


def told_of(model: nn.Module) -> SelfSharded | None:
    """What the factory told when it returned the model; None where it returned no more than that."""
    return getattr(model, _ATTRIBUTE, None)


def gives_logits(model: nn.Module) -> bool:
    """Whether the factory told how ids become logits."""
    told = told_of(model)
    return told is not None and told.logits is not None


def sharding_source(source: ModelSource) -> ShardsItself:
    """A source that is to shard itself, which plan "own" stands for. Raises OptionError for any other."""
    if not isinstance(source, ShardsItself) or not source.takes_mesh:
        raise OptionError(
            f'plan "own": {source.name} doesn\'t shard itself. It is for package.module:factory where the '
            "factory takes a mesh."
        )
    return source


def _give_logits(model: nn.Module, logits_of: Callable[[Callable[..., Any], Tensor], Tensor]) -> None:
    """Makes model(ids) call logits_of(its former forward, ids). A copy of the model calls its own forward."""
    own = vars(model).get("forward")

    def forward(self: nn.Module, ids_BS: Tensor) -> Tensor:
        return logits_of(own if own is not None else MethodType(type(self).forward, self), ids_BS)

    model.forward = MethodType(forward, model)
