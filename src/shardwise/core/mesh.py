"""Mesh: named axes of ranks, such as `dp=2,tp=4`. The last axis is the fastest: neighbouring ranks differ in it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from shardwise.core.errors import MeshError

# dp: whole replicas of the model; fsdp: replicas that keep only a shard of the parameters each; tp: tensor parallel.
AXES = ("dp", "fsdp", "tp")


@dataclass(frozen=True, slots=True)
class Mesh:
    """Axes as (name, size), outermost first, in the order dp, fsdp, tp. Always has a tp axis (size 1 if not named)."""

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        for name, size in self.axes:
            if name not in AXES:
                raise MeshError(f'mesh: unknown axis "{name}". Allowed axes: {", ".join(AXES)}.')
            if size < 1:
                raise MeshError(f"mesh: axis {name}={size} is not a size. Use a whole number of at least 1.")
        if len(set(names)) != len(names):
            raise MeshError(f"mesh: an axis is named twice in {self}. Name each axis once.")
        if names != [name for name in AXES if name in names]:
            raise MeshError(
                f"mesh: axes of {self} are out of order. Write them in the order {', '.join(AXES)}."
            )
        if "tp" not in names:
            object.__setattr__(self, "axes", (*self.axes, ("tp", 1)))

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

    def size(self, axis: str) -> int:
        """Ranks along one axis; 1 for an axis that the mesh doesn't name."""
        return dict(self.axes).get(axis, 1)

    @property
    def world_size(self) -> int:
        return math.prod(size for _, size in self.axes)

    @property
    def tp(self) -> int:
        return self.size("tp")

    @property
    def data_parallel(self) -> int:
        """Ranks that see different parts of the batch: dp x fsdp."""
        return self.size("dp") * self.size("fsdp")

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)


def reducing_axis(sizes: Mapping[str, int]) -> str | None:
    """The axis that context ranks join, for reducing gradients and for FSDP's shards: fsdp, else dp; one with several ranks before one of size 1."""
    named = [name for name in ("fsdp", "dp") if name in sizes]
    return next((name for name in named if sizes[name] > 1), named[0] if named else None)
