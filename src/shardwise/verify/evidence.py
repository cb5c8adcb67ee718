"""Evidence: all that is known of a wrong run, before a reason is made of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from shardwise.verify.along import Along
from shardwise.verify.expected import Differences
from shardwise.verify.relation import Related
from shardwise.verify.roots import Lacks, Roots, Seen
from shardwise.verify.trail import Flow


@dataclass(frozen=True, slots=True)
class Recut:
    """A parameter that makes what is computed from it right when it is cut in another way. parts: as so many
    tensors, each by itself; 1: as one."""

    parameter: str
    parts: int

    @property
    def reason(self) -> str:
        if self.parts == 1:
            how, other = (
                "it is one weight, and it is cut as if several lay in it, each by itself",
                "cut as one",
            )
        else:
            how = f"{self.parts} weights lie in it, and it is cut as if it were one"
            other = "with each cut by itself"
        return f"{how}; {other}, its module is right"


@dataclass(frozen=True, slots=True)
class Added:
    """What the first wrong value is too much, or too little, of. what: a parameter, or the point of the trail
    with that number. times: how often it is in it; once would be right."""

    what: str | int
    times: float


@dataclass(frozen=True, slots=True)
class Trials:
    """What was tried on the first wrong value, or gradient. normalises: the module that gives the value takes
    statistics over all of what it is given a part of. kept: points to which each rank's own tokens alone
    give a gradient back."""

    recut: Recut | None = None
    added: Added | None = None
    normalises: bool = False
    kept: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Evidence:
    """output: how the logits relate to the whole ones, if they are wrong. gradients: of the parameters whose
    gradients are wrong. seen: by point of the unsharded model's trail; flow: what is computed from what.

    along: gradients that lack a sum over axes of the mesh. idle: gradients that are zero on these ranks of
    the mesh alone, and right on the others. counts: modules that are called another number of times than
    unsharded: (sharded, unsharded). again: gradients that are sums of what each micro-batch gives, so many
    times each. lacks: see roots.py.
    """

    model: nn.Module
    n_ranks: int
    differences: Differences
    output: Related | None
    gradients: Mapping[str, Related]
    seen: tuple[Seen, ...] = ()
    flow: Flow = field(default_factory=Flow)
    trials: Trials = field(default_factory=Trials)
    along: Mapping[str, Along] = field(default_factory=dict)
    idle: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    again: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    lacks: Lacks = lambda _, __: False

    @cached_property
    def roots(self) -> Roots:
        return Roots(self.seen, self.flow, self.lacks)
