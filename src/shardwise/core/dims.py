"""Dims: which dims of a model's weights must be cut together, what a cut of them costs, and what can't be cut
and why. Made by planner/classes.py from one forward; it knows of no plan but the one that Shardwise would
make."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Member:
    """A dim of a parameter, or of a pattern's equal ones (`*` for the layer). held: how a rank has it where
    the class is cut, as a plan file says it: `shard(0)`, `shard(0: 3072+1024+1024)`; "" where the class
    isn't cut. n_dims: of the parameter."""

    parameter: str
    dim: int
    held: str
    n_dims: int = 2


@dataclass(frozen=True, slots=True)
class DimClass:
    """Dims that are cut together or not at all: `units` of them over the ranks, `width` entries each (of the
    member that has the most).

    name: what they count, told by what the forward does with them. where: the least module that all members
    are in. times: how many equal ones there are, in as many layers. begins: modules that make them from an
    input that ranks have whole; ends: modules that sum over them (of the vocabulary: where ids are looked up,
    and where logits are made); gathers: modules at whose input the parts of the gradient are summed (and the
    sequence is gathered, if it is cut); whole_at: modules that need all of them, such as a norm over all
    heads, and gather them for that. sums: numbers for each token that
    are then summed over ranks, forward and backward. obstacles: why it can't be cut. is_cut: whether the plan
    that Shardwise makes cuts it; instead: where it could and doesn't, what it cuts instead.
    """

    name: str
    where: str
    units: int
    width: int
    times: int
    members: tuple[Member, ...]
    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    gathers: tuple[str, ...] = ()
    sums: float | None = None
    obstacles: tuple[str, ...] = ()
    is_cut: bool = False
    whole_at: tuple[str, ...] = ()
    instead: str = ""


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter, or a pattern's equal ones. classes: of each dim, which classes it is made of, as places in
    the tuple of classes. held: how a rank has it under the plan, as a plan file says it. rule: the plan's
    rule for its module, where a plan of the user's is looked at."""

    name: str
    shape: tuple[int, ...]
    times: int
    classes: tuple[tuple[int, ...], ...]
    held: str
    rule: str = ""

    @property
    def elements(self) -> int:
        """Of all equal ones together."""
        total = self.times
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True, slots=True)
class Dims:
    """A model's classes, those that are cut first; its weights, in the order in which the forward first uses
    them. layers: the pattern of the repeated layers and how many there are. unknown: ops that nobody
    described, whose dims stay whole. plan: the user's plan that is looked at, None where there is none."""

    model: str
    mesh: str
    ranks: int
    seq: int
    parameters: int
    classes: tuple[DimClass, ...]
    weights: tuple[Weight, ...]
    layers: tuple[str, int] | None = None
    unknown: tuple[str, ...] = ()
    plan: str | None = None
    schema_version: int = 1
