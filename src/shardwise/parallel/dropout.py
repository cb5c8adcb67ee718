"""Dropout under tensor parallelism: all ranks of the axis draw alike, whatever they were seeded with.

What every rank holds whole must lose the same elements on each. So each forward in training begins from a
seed that is the same on the ranks of the axis, another for each forward and each place on the mesh's other
axes, and leaves the stream outside as it was. Parts of what is cut lose elements at the same places of each
part. Ranks stay together as long as their parts are of one size; where they aren't, the engine refuses.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.errors import PlanError
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.core.placement import Shard
from shardwise.parallel.claims import Claim
from shardwise.torch_private import AnyDropout

_PLACES = 1_000_003  # a prime: seeds of two places on the mesh don't meet
_SEEDS = 2**63
_ATTRIBUTE = "_shardwise_forwards"


@dataclass(slots=True, eq=False)
class Forwards:
    """How many there were in training: what a run must know of this stream to go on with it."""

    number: int = 0


def check_dropout(model: nn.Module, held: Mapping[str, Claim], head: nn.Module | None, tp: int) -> None:
    """Raises PlanError where ranks would draw different numbers of times, and so lose one another. Behind a
    table rows are whole, and behind the head nothing is dropped."""
    on = next(((name, each) for name, each in model.named_modules() if _is_on(each)), None)
    if on is None:
        return
    name, dropout = on
    sizes = dict(model.named_parameters(remove_duplicate=False))
    for path, claim in held.items():
        placement, module = claim.held.placement, claim.assignment.module
        is_outer = module is head or isinstance(module, nn.Embedding)
        if is_outer or path not in sizes or not isinstance(placement, Shard):
            continue
        size = sizes[path].shape[placement.dim]
        if size % tp:
            raise PlanError(
                f"{name} is a {type(dropout).__name__}({dropout.p}), and {path} has {size} to share out over "
                f"tp={tp}: masks would differ between the ranks. Set its p to 0, or use a tp that divides."
            )


def draw_alike(model: nn.Module, mesh: DeviceMesh) -> None:
    """All ranks of the tp axis draw the same in a forward in training, if the model has dropout that is on:
    a module of its own, or a rate that a forward gives to a function."""
    if not may_drop(model):
        return
    forwards, place, inner = Forwards(), _place(mesh), model.forward
    setattr(model, _ATTRIBUTE, forwards)

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return inner(*args, **kwargs)
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            forwards.number += 1
            torch.manual_seed((forwards.number * _PLACES + place) % _SEEDS)
            return inner(*args, **kwargs)

    model.forward = forward


def forwards_of(model: nn.Module) -> Forwards | None:
    """Of a model whose ranks draw alike; None for another one."""
    return getattr(model, _ATTRIBUTE, None)


def may_drop(model: nn.Module) -> bool:
    """Whether it has dropout that is on: a module of its own, or a rate that a forward gives a function."""
    return any(_is_on(module) or _has_rate(module) for module in model.modules())


def _is_on(module: nn.Module) -> bool:
    return isinstance(module, AnyDropout) and module.p > 0


def _has_rate(module: nn.Module) -> bool:
    """Whether it, or the configuration that it reads, keeps a rate of dropout."""
    holders = (vars(module), getattr(getattr(module, "config", None), "__dict__", {}))
    return any(
        "drop" in name and isinstance(value, float) and 0 < value < 1
        for holder in holders
        for name, value in holder.items()
    )


def _place(mesh: DeviceMesh) -> int:
    """This rank's number among those that differ in other axes than tp."""
    if mesh.ndim == 1:  # tp's alone, by whatever name
        return 0
    place = 0
    for name, size, index in zip(
        mesh.mesh_dim_names or (), mesh.shape, mesh.get_coordinate() or (), strict=False
    ):
        place = place if name == TENSOR_AXIS else place * size + index
    return place
