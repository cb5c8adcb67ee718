"""Mesh: named axes of ranks, such as `dp=2,tp=4`; and what each axis is, told once. Standard library only.

AXES says of each axis its name, its role, and what of the global batch is cut over it, outermost first:
neighbours differ in the last one. Others ask for a role, or ask Mesh; none decides by an axis' name.

Where a gradient goes follows from that. Over an axis whose ranks see other tokens every gradient of what they
hold alike is a part, and the step sums it: FSDP over the axes of its shards, the step itself over the others.
What ranks hold each for itself (experts that tokens come to) is summed over no such axis. Over an axis whose
ranks see the same tokens the plan's styles sum.

Axes that a collective goes over together are joined: "fsdp+cp" is one name of a group, and of a mesh's dim.
"""

import math
from collections.abc import Collection, Sequence
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


class Cuts(StrEnum):
    """What of the global batch is cut over an axis; nothing: its ranks see the same tokens."""

    BATCH = "the batch"
    SEQUENCE = "each sequence"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Axis:
    """runs, predicted: whether a training step can be run, and predicted, over several ranks of it."""

    name: str
    role: Role
    about: str
    cuts: Cuts = Cuts.NOTHING
    runs: bool = False
    predicted: bool = True

    @property
    def splits_batch(self) -> bool:
        """Whether its ranks see different sequences."""
        return self.cuts is Cuts.BATCH

    @property
    def sees_other_tokens(self) -> bool:
        """Whether its ranks see different tokens, so that losses are summed over it."""
        return self.cuts is not Cuts.NOTHING


AXES = (
    Axis("pp", Role.CUTS_DEPTH, "stages of a pipeline", runs=True),
    Axis("dp", Role.REPLICATES, "whole replicas of the model", Cuts.BATCH, runs=True),
    Axis("fsdp", Role.SHARDS_PARAMETERS, "replicas that keep a shard of the parameters each", Cuts.BATCH,
         runs=True),
    Axis("cp", Role.CUTS_SEQUENCE, "ranks that share each sequence", Cuts.SEQUENCE, runs=True),
    Axis("ep", Role.CUTS_EXPERTS, "ranks that hold some experts each, and all else alike", Cuts.BATCH,
         runs=True),
    Axis("tp", Role.CUTS_TENSORS, "ranks that hold a part of each tensor", runs=True),
)  # fmt: skip

NAMES = tuple(axis.name for axis in AXES)
_BY_NAME = {axis.name: axis for axis in AXES}
_BY_ROLE = {axis.role: axis for axis in AXES}
EXPERTS_AXIS = _BY_ROLE[Role.CUTS_EXPERTS].name
TENSOR_AXIS = _BY_ROLE[Role.CUTS_TENSORS].name
SHARDS_AXIS = _BY_ROLE[Role.SHARDS_PARAMETERS].name
REPLICAS_AXIS = _BY_ROLE[Role.REPLICATES].name
STAGES_AXIS = _BY_ROLE[Role.CUTS_DEPTH].name
CONTEXT_AXIS = _BY_ROLE[Role.CUTS_SEQUENCE].name
_TOGETHER = "+"

RUN = tuple(axis.role for axis in AXES if axis.runs)
PREDICTED = tuple(axis.role for axis in AXES if axis.predicted)


def joined(names: Sequence[str]) -> str:
    """The name of several axes together: fsdp and cp are "fsdp+cp"."""
    return _TOGETHER.join(names)


def axes_in(name: str) -> tuple[str, ...]:
    """The axes that joined() put together; the name itself where it is one's."""
    return tuple(name.split(_TOGETHER))


def role_of(name: str) -> Role | None:
    """Of joined axes the first one's: the others join it. None for an axis of someone else's mesh, whose name
    means nothing here."""
    first = axes_in(name)[0]
    return _BY_NAME[first].role if first in _BY_NAME else None


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
        """Ranks along one axis, or along joined ones; 1 for an axis that the mesh doesn't name."""
        return math.prod(dict(self.axes).get(name, 1) for name in axes_in(axis))

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
    def experts(self) -> int:
        """Ranks over which experts are shared out."""
        return self.size_of(Role.CUTS_EXPERTS)

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
        """Ranks that see different parts of the batch: dp x fsdp x ep."""
        return math.prod(size for name, size in self.axes if _BY_NAME[name].splits_batch)

    @property
    def reducing_axis(self) -> str | None:
        """The axis that context ranks join, for reducing gradients and for FSDP's shards: fsdp, else dp; one
        with several ranks before one of size 1."""
        sizes = dict(self.axes)
        named = [name for name in (SHARDS_AXIS, REPLICAS_AXIS) if name in sizes]
        return next((name for name in named if sizes[name] > 1), named[0] if named else None)

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """The axes over which FSDP shards: fsdp, and cp that joins it. None where those have one rank."""
        joins = self.context > 1 and self.reducing_axis == SHARDS_AXIS
        names = (SHARDS_AXIS, _BY_ROLE[Role.CUTS_SEQUENCE].name) if joins else (SHARDS_AXIS,)
        return names if math.prod(map(self.size, names)) > 1 else ()

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes of several ranks that see different tokens: losses are summed over them."""
        return tuple(name for name, size in self.axes if size > 1 and sees_other_tokens(name))

    @property
    def summing_axes(self) -> tuple[str, ...]:
        """Those of token_axes over which FSDP doesn't sum: the step sums gradients over them, after the
        backward, of what their ranks hold alike."""
        return tuple(name for name in self.token_axes if name not in self.shard_axes)

    @property
    def joined_axes(self) -> tuple[tuple[str, ...], ...]:
        """The axes over which one collective of a step may go together, from birth, so that all ranks make
        the same groups: FSDP's, those of losses, those of gradients; and these without the axis over which
        experts are cut, whose gradients go without it."""
        experts = _BY_ROLE[Role.CUTS_EXPERTS].name
        of_experts = tuple(name for name in self.summing_axes if name != experts)
        every = (self.shard_axes, self.token_axes, self.summing_axes, of_experts)
        return tuple(dict.fromkeys(names for names in every if len(names) > 1))

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)


def sees_other_tokens(name: str) -> bool:
    """Whether ranks along an axis see different tokens, so that losses are summed over it."""
    return name in _BY_NAME and _BY_NAME[name].sees_other_tokens


def check_carried(mesh: Mesh, verb: str, carried: Collection[Role]) -> None:
    """Raises MeshError for an axis of several ranks that a verb can't carry yet."""
    refused = [name for name, size in mesh.axes if size > 1 and _BY_NAME[name].role not in carried]
    if refused:
        allowed = ", ".join(axis.name for axis in AXES if axis.role in carried)
        raise MeshError(
            f"mesh {mesh}: {verb} can't carry {' or '.join(refused)} yet. Use the axes {allowed}."
        )
