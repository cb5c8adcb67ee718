"""Sharder: what one style does to one class of modules, and what it is given to do it with.

A style is a file of styles/, with a Sharder for each class of modules that it takes. Checks, engines and the
tracer ask it; none of them knows a style by its name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from shardwise.core.errors import PlanError
from shardwise.core.held import Held
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.plan import Rule, Style
from shardwise.parallel.axis import Axis, Site
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.loss import Loss, PlainLoss
from shardwise.parallel.ownership import Order, PieceOrder
from shardwise.parallel.parameters import Cut, shard_parameter

if TYPE_CHECKING:
    from shardwise.parallel.embedding import EmbeddingShard


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """One module, the rule that holds for it, and what the rule's style does to it. is_input_whole: a module
    around it gathers the input. below: modules inside, by their name from this one on, that have no rule of
    their own and for which this one holds too."""

    name: str
    module: Any  # of a class that the sharder takes
    rule: Rule
    sharder: "Sharder"
    is_input_whole: bool = False
    below: tuple[str, ...] = ()

    @property
    def style(self) -> Style:
        return self.rule.style

    @property
    def shown(self) -> str:
        return self.name or "the model itself"

    @property
    def kind(self) -> str:
        """The module's class, for people."""
        return type(self.module).__name__

    @property
    def held(self) -> dict[str, Held]:
        """How parameters are held, by their name from the module on."""
        return self.sharder.held(self)


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """What a plan must fit: the model's modules by name, the tp ranks, the ranks on axes that shard
    parameters further, those that share experts out, those that share each sequence, and the length of the
    sequences where it is known."""

    modules: Mapping[str, nn.Module]
    tp: int
    fsdp: int = 1
    seq: int | None = None
    experts: int = 1
    context: int = 1


@dataclass(frozen=True, slots=True)
class Reasons:
    """Why a module under a style issues a collective: a sentence for the forward, one for the backward."""

    forward: str
    backward: str


@dataclass(slots=True)
class Work:
    """What the native engine collects while it applies a plan: parameters that took the place of whole ones
    (by the whole one's id), the tables among them, those whose gradient is a part on each rank, the orders of
    those that aren't kept in their own (by the new one's id), and the loss.

    axis: that of tensors. experts: that over which experts are shared out, if the mesh has it. head: the
    module that gives the logits.
    """

    axis: Axis
    experts: Axis | None
    mesh: DeviceMesh
    head: nn.Module | None
    sharded: dict[int, nn.Parameter] = field(default_factory=dict)
    tables: dict[int, "EmbeddingShard"] = field(default_factory=dict)
    partial: list[tuple[nn.Module, str]] = field(default_factory=list)
    orders: dict[int, tuple[Order, Site]] = field(default_factory=dict)
    loss: Loss = field(default_factory=PlainLoss)

    def site(self, assignment: Assignment) -> Site:
        return Site(assignment.name, assignment.rule.ref, self.axis)

    def hold(
        self, assignment: Assignment, table: "EmbeddingShard | None" = None, *, outer: Axis | None = None
    ) -> None:
        """Puts DTensor parameters in the places of the whole ones that the assignment says how to hold; a
        tied one is replaced once and shared again. outer: an axis along which each rank has a chunk of the
        first dim, of which the assignment speaks."""
        for path, held in assignment.held.items():
            module_name, _, name = path.rpartition(".")
            module = assignment.module.get_submodule(module_name)
            whole = module._parameters.get(name)  # a buffer stays as it is
            if whole is None or isinstance(whole, DTensor):  # a container and its module may both say how
                continue
            if id(whole) not in self.sharded:
                order = table.order if table is not None else self._order_of(held, whole)
                cuts = [Cut(held.kept_on(self.axis.size), self.axis, order)]
                if outer is not None:
                    cuts.insert(0, Cut(Shard(0), outer))
                new = shard_parameter(whole, cuts, self._mesh_of(cuts))
                self.sharded[id(whole)] = new
                if table is not None:
                    self.tables[id(new)] = table
                if order is not None:
                    self.orders[id(new)] = order, self.site(assignment)
                if held.gradient_on(self.axis.size) == Partial():
                    self.partial.append((module, name))
            setattr(module, name, self.sharded[id(whole)])

    def _mesh_of(self, cuts: Sequence[Cut]) -> DeviceMesh:
        """The mesh of several axes, or of one."""
        if len(cuts) == 1:
            return cuts[0].axis.mesh
        return self.mesh[tuple(cut.axis.name for cut in cuts)]

    def _order_of(self, held: Held, whole: Tensor) -> Order | None:
        kept = held.kept_on(self.axis.size)
        if len(held.pieces) < 2 or self.axis.size == 1 or not isinstance(kept, Shard):
            return None
        return PieceOrder(held.pieces, self.axis.size, kept.dim % whole.dim())


class Sharder:
    """One style on one class of modules.

    inputs, outputs: the placements that a rule may give for them; the first is the default. cut_dim: the dim
    of the weight of which each rank has a part; None: each has all of it, or the class doesn't tell.
    gradients_inside: what a whole tensor's gradient is on each rank inside the module: Partial where all that
    is inside does a part of the work, Replicate where each rank does all of it, None: as around it.
    holds_below: modules inside without a rule of their own are held as this one says. holds_others: it is for
    modules that hold others. decided_by_data: token ids decide what is sent. takes_tied_table: for a head
    that shares its weight with the embedding. below_gather_input: what to do instead, where what a style
    takes for whole is each rank's part of a sum. twin_style: PyTorch's own style for the same.
    twin_keeps_whole_gradient: and whether that leaves the gradient of the whole weight on every rank.
    """

    inputs: ClassVar[tuple[Placement, ...]] = ()
    outputs: ClassVar[tuple[Placement, ...]] = ()
    cut_dim: ClassVar[int | None] = None
    gradients_inside: ClassVar[Partial | Replicate | None] = None
    holds_below: ClassVar[bool] = False
    holds_others: ClassVar[bool] = False
    decided_by_data: ClassVar[bool] = False
    takes_tied_table: ClassVar[bool] = False
    below_gather_input: ClassVar[str | None] = None
    twin_style: ClassVar[Callable[..., ParallelStyle] | None] = None
    twin_keeps_whole_gradient: ClassVar[bool] = False
    reasons: ClassVar[Reasons | None] = None

    def held(self, assignment: Assignment) -> dict[str, Held]:
        """How the module's parameters are held, by their name from the module on; those that aren't named
        need another rule."""
        return {}

    def is_shared_out(self, style: Style) -> bool:
        """Whether each rank of the axis for experts has its chunk of the first dim of what it owns."""
        return False

    def input_of(self, style: Style) -> Placement:
        return style.input or self.inputs[0]

    def output_of(self, style: Style) -> Placement:
        return style.output or self.outputs[0]

    def cuts_sequence(self, style: Style) -> bool:
        return bool(self.outputs) and self.output_of(style) == Shard(1)

    def check(self, assignment: Assignment, fit: Fit) -> None:
        """Raises PlanError where the module's sizes or options don't suit the style."""

    def check_below_gather_input(self, assignment: Assignment) -> None:
        """Raises PlanError for what would train wrong without a word where every rank has the whole input and
        computes a part of its gradient."""
        if self.below_gather_input is not None:
            refuse_below_gather_input(assignment, self.below_gather_input)

    def apply(self, assignment: Assignment, work: Work) -> None:
        """Shards the module in place for the native engine."""
        raise NotImplementedError

    def twin(self, assignment: Assignment, *, keeps_dtensor: bool) -> ParallelStyle | None:
        """PyTorch's own style for the same, made; None where there is none. keeps_dtensor: of a head, whose
        loss wants it."""
        return None if self.twin_style is None else self.twin_style()


def refuse_below_gather_input(assignment: Assignment, advice: str) -> None:
    """Raises the PlanError of check_below_gather_input()."""
    raise PlanError(
        f"rule {assignment.rule}: {assignment.name} is below a gather_input, where each rank's gradient is a "
        f"part of the sum. {advice}"
    )


def check_no_empty_shard(assignment: Assignment, fit: Fit, size: int, what: str) -> None:
    """FSDP can't cut what isn't there."""
    if fit.fsdp > 1 and 0 in chunk_sizes(size, fit.tp):
        raise PlanError(
            f"rule {assignment.rule} leaves a rank without {what} of {assignment.name} ({size} over "
            f"tp={fit.tp}), which FSDP can't shard further. Use tp of at most {size}, or no fsdp axis."
        )


def divisors(number: int) -> str:
    """`{1, 2, 4}`: the tp sizes that divide a number."""
    fitting = (str(tp) for tp in range(1, min(number, 256) + 1) if number % tp == 0)
    return "{" + ", ".join(fitting) + "}"
