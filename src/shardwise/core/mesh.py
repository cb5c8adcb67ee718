"""Mesh: named axes of ranks, such as `dp=2,tp=4`; and what each axis is, told once. Standard library only.

AXES says of each axis its name, its role, and which gradients are summed over it, outermost first: neighbours
differ in the last one. Others ask for a role, or ask Mesh; none decides by an axis' name.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from shardwise.core.errors import MeshError


class Role(StrEnum):
    """What the ranks along an axis have of the model, or of the data, each for itself."""

    CUTS_DEPTH = "cuts depth"
    REPLICATES = "replicates"
    SHARDS_PARAMETERS = "shards parameters"
    CUTS_SEQUENCE = "cuts the sequence"
    CUTS_EXPERTS = "cuts experts"
    CUTS_TENSORS = "cuts tensors"


class Summed(StrEnum):
    """Which gradients are summed over an axis. Those of what its ranks hold alike the plan's styles sum."""

    ALL = "all"
    REPLICATED = "of what its ranks hold alike"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Axis:
    """gradients: those that are summed over it. splits_batch: its ranks see different sequences. runs,
    predicted: whether a training step can be run, and predicted, over several ranks of it."""

    name: str
    role: Role
    about: str
    gradients: Summed
    splits_batch: bool = False
    runs: bool = False
    predicted: bool = True


AXES = (
    Axis("pp", Role.CUTS_DEPTH, "stages of a pipeline", Summed.NONE),
    Axis("dp", Role.REPLICATES, "whole replicas of the model", Summed.ALL, splits_batch=True, runs=True),
    Axis("fsdp", Role.SHARDS_PARAMETERS, "replicas that keep a shard of the parameters each", Summed.ALL,
         splits_batch=True, runs=True),
    Axis("cp", Role.CUTS_SEQUENCE, "ranks that share each sequence", Summed.ALL),
    Axis("ep", Role.CUTS_EXPERTS, "ranks that hold some experts each", Summed.REPLICATED, predicted=False),
    Axis("tp", Role.CUTS_TENSORS, "ranks that hold a part of each tensor", Summed.REPLICATED, runs=True),
)  # fmt: skip

NAMES = tuple(axis.name for axis in AXES)
_BY_NAME = {axis.name: axis for axis in AXES}
_BY_ROLE = {axis.role: axis for axis in AXES}
TENSOR_AXIS = _BY_ROLE[Role.CUTS_TENSORS].name
SHARDS_AXIS = _BY_ROLE[Role.SHARDS_PARAMETERS].name
REPLICAS_AXIS = _BY_ROLE[Role.REPLICATES].name

RUN = tuple(axis.role for axis in AXES if axis.runs)
PREDICTED = tuple(axis.role for axis in AXES if axis.predicted)


def role_of(name: str) -> Role | None:
    """None for an axis of someone else's mesh, whose name means nothing here."""
    return _BY_NAME[name].role if name in _BY_NAME else None


@dataclass(frozen=True, slots=True)
class Mesh:
    """Axes as (name, size), outermost first, in AXES' order. Always has a tp axis (size 1 if not named)."""

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        for name, size in self.axes:
            if name not in NAMES:
                raise MeshError(f'mesh: unknown axis "{name}". Allowed axes: {", ".join(NAMES)}.')
            if size < 1:
                raise MeshError(f"mesh: axis {name}={size} is not a size. Use a whole number of at least 1.")
        if len(set(names)) != len(names):
            raise MeshError(f"mesh: an axis is named twice in {self}. Name each axis once.")
        if names != [name for name in NAMES if name in names]:
            raise MeshError(
                f"mesh: axes of {self} are out of order. Write them in the order {', '.join(NAMES)}."
            )
        if TENSOR_AXIS not in names:
            object.__setattr__(self, "axes", (*self.axes, (TENSOR_AXIS, 1)))

    @classmethod
    def parse(cls, text: str) -> Self:
        """`"dp=2,tp=4"` -> Mesh. Raises MeshError with the text, the mistake and an example."""
        axes = []
        for part in text.split(","):
            name, equals, size = part.strip().partition("=")
            if not equals or not size.strip().isdecimal():
                raise MeshError(
                    f'mesh: can\'t read "{part.strip()}" in "{text}". Write NAME=SIZE, such as dp=2,tp=4.'
                )
            axes.append((name.strip(), int(size)))
        return cls(tuple(axes))

    @classmethod
    def of(cls, sizes: dict[Role, int]) -> Self:
        """A mesh of the axes with these roles."""
        return cls(tuple((axis.name, sizes[axis.role]) for axis in AXES if axis.role in sizes))

    def size(self, axis: str) -> int:
        """Ranks along one axis; 1 for an axis that the mesh doesn't name."""
        return dict(self.axes).get(axis, 1)

    def size_of(self, role: Role) -> int:
        """Ranks along the axis with a role; 1 where the mesh doesn't name it."""
        return self.size(_BY_ROLE[role].name)

    @property
    def world_size(self) -> int:
        return math.prod(size for _, size in self.axes)

    @property
    def tp(self) -> int:
        return self.size_of(Role.CUTS_TENSORS)

    @property
    def fsdp(self) -> int:
        return self.size_of(Role.SHARDS_PARAMETERS)

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return self.size_of(Role.CUTS_DEPTH)

    @property
    def context(self) -> int:
        """Ranks that share each sequence."""
        return self.size_of(Role.CUTS_SEQUENCE)

    @property
    def data_parallel(self) -> int:
        """Ranks that see different parts of the batch: dp x fsdp."""
        return math.prod(size for name, size in self.axes if _BY_NAME[name].splits_batch)

    @property
    def reducing_axis(self) -> str | None:
        """The axis that context ranks join, for reducing gradients and for FSDP's shards: fsdp, else dp; one
        with several ranks before one of size 1."""
        sizes = dict(self.axes)
        named = [name for name in (SHARDS_AXIS, REPLICAS_AXIS) if name in sizes]
        return next((name for name in named if sizes[name] > 1), named[0] if named else None)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)


def sees_other_tokens(name: str) -> bool:
    """Whether ranks along an axis see different tokens, so that losses and all gradients are summed over it.
    A foreign axis is taken so."""
    return name not in _BY_NAME or _BY_NAME[name].gradients is Summed.ALL


def check_carried(mesh: Mesh, verb: str, carried: Collection[Role]) -> None:
    """Raises MeshError for an axis of several ranks that a verb can't carry yet."""
    refused = [name for name, size in mesh.axes if size > 1 and _BY_NAME[name].role not in carried]
    if refused:
        allowed = ", ".join(axis.name for axis in AXES if axis.role in carried)
        raise MeshError(
            f"mesh {mesh}: {verb} can't carry {' or '.join(refused)} yet. Use the axes {allowed}."
        )
