"""What each op says of its tensors' dims: which are one, which are summed away, which nobody may cut.

A rule is a function of a Call. Pointwise ops and reductions are told by PyTorch's own tags; every other op
that is described has its rule here, in views.py or in by_data.py; whatever has none makes all its dims
uncuttable, by its name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardwise.dims.factors import ConflictError, Factor, leaves, narrow, unify, view
from shardwise.dims.record import Source, Value


@dataclass(slots=True)
class Call:
    """An op that has run. arguments: by the schema's names. value_of: the Value of a tensor. is_sized: what
    the output has and no input is as long as the forward writes, and the same for every entry; else it is
    blocked, since the op makes all of it."""

    name: str
    overload: str
    arguments: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    value_of: Callable[[Tensor], Value]
    sequence: frozenset[Factor]
    given: dict[int, list[Factor]] = field(default_factory=dict)
    summed: list[Factor] = field(default_factory=list)
    blocked: list[tuple[Factor, str]] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    is_linear: bool = False
    added: Tensor | None = None
    source: Source = Source.OP
    is_sized: bool = False

    @property
    def output(self) -> Tensor:
        return self.outputs[0]

    def dims(self, tensor: Tensor) -> list[Factor]:
        return list(self.value_of(tensor).dims)

    def give(self, output: Tensor, dims: Sequence[Factor]) -> None:
        """Says what an output's dims are. Raises ConflictError where their sizes aren't the output's."""
        if [dim.size for dim in dims] != list(output.shape):
            raise ConflictError(f"{list(dims)} for a tensor of {list(output.shape)}")
        self.given[id(output)] = list(dims)

    def tie(self, a: Factor, b: Factor) -> None:
        """Makes two dims one; where that can't be, neither may be cut."""
        try:
            unify(a, b)
        except ConflictError as error:
            self.conflicts.append(str(error))
            self.block(a, "its dims can't be told apart")
            self.block(b, "its dims can't be told apart")

    def block(self, factor: Factor, why: str) -> None:
        if factor.size > 1:
            self.blocked.append((factor, why))

    def block_what_is_new(self) -> None:
        """Blocks what an output has and no input, except of a table of positions, which is known as one."""
        if self.source is Source.POSITIONS:
            return
        known = {leaf for tensor in self.inputs for dim in self.dims(tensor) for leaf in leaves(dim)}
        new = (leaf for dims in self.given.values() for dim in dims for leaf in leaves(dim))
        for leaf in dict.fromkeys(new):
            if leaf not in known:
                self.block(leaf, f"{self.name} gives every rank all of it")

    def is_of_sequence(self, factor: Factor) -> bool:
        return any(leaf in self.sequence for leaf in leaves(factor))


Rule = Callable[[Call], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def rule_for(func: Any, name: str) -> Rule | None:
    """The rule of a dispatcher op (`name` without its overload)."""
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in func.tags:
        return pointwise
    if torch.Tag.reduction in func.tags:
        return reduction
    return None


_LINEAR_IN_FIRST = frozenset({"mul", "div", "neg", "_to_copy", "clone", "detach", "alias", "mul_", "div_"})


@rule(
    *("_to_copy", "detach", "alias", "lift_fresh", "copy_", "fill_", "zero_", "floor_divide", "zeros_like"),
    *("ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_empty_strided", "isin"),
    *("native_dropout", "rrelu_with_noise", "bernoulli_", "_conj", "_neg_view", "complex", "polar"),
)
def pointwise(call: Call) -> None:
    """Entry by entry, with broadcasting."""
    for output in call.outputs:
        own = call.dims(output) if any(output is each for each in call.inputs) else [None] * output.dim()
        dims: list[Factor | None] = list(own)
        for tensor in call.inputs:
            if tensor is output or tensor.dim() > output.dim():
                continue
            ahead = output.dim() - tensor.dim()
            for at, factor in enumerate(call.dims(tensor), ahead):
                if factor.size != output.shape[at] or factor.size == 1:
                    continue
                mine = dims[at]
                if mine is None:
                    dims[at] = factor
                else:
                    call.tie(mine, factor)
        filled = [
            dim if dim is not None else Factor(size) for dim, size in zip(dims, output.shape, strict=True)
        ]
        call.give(output, filled)
    if call.name.endswith("_like"):
        call.source = Source.FILLED
    is_rounded = call.arguments.get("rounding_mode") is not None or not _is_real(call.output)
    call.is_linear = call.name in _LINEAR_IN_FIRST and not is_rounded


def _is_real(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


@rule("tril", "triu", "tril_", "triu_")
def triangle(call: Call) -> None:
    pointwise(call)
    for dim in call.dims(call.inputs[0])[-2:]:
        call.block(dim, "a triangle of it is taken")


@rule("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv")
def matmul(call: Call) -> None:
    """[..., a, k] x [..., k, b]: k is summed over."""
    first, second = call.inputs[-2:]
    x, y = call.dims(first), call.dims(second)
    inner = y[-2] if len(y) > 1 else y[-1]
    call.tie(x[-1], inner)
    dims = [*x[:-1], *y[-1:]] if len(y) > 1 else x[:-1]
    if len(x) == 3:
        call.tie(x[0], y[0])
    call.give(call.output, dims)
    call.summed += list(leaves(x[-1]))
    call.is_linear = len(call.inputs) == 2
    if len(call.inputs) == 3:
        added = call.inputs[0]
        for mine, other in zip(reversed(call.dims(added)), reversed(dims), strict=False):
            if mine.size == other.size:
                call.tie(mine, other)
        call.added = added


def reduction(call: Call) -> None:
    """Over the dims that are gone, or have become 1."""
    source = call.inputs[0]
    dims = call.dims(source)
    asked = call.arguments.get("dim")
    chosen = [asked] if isinstance(asked, int) else list(asked or range(len(dims)))
    gone = {at % len(dims) for at in chosen} if dims else set()
    for at in gone:
        if call.name == "sum":
            call.summed += list(leaves(dims[at]))
        else:
            call.block(dims[at], f"{call.name} is taken over it")
    kept = [Factor(1) if at in gone else dim for at, dim in enumerate(dims)]
    for output in call.outputs:
        same = output.dim() == len(dims)
        call.give(output, kept if same else [dim for at, dim in enumerate(dims) if at not in gone])
    call.is_linear = call.name == "sum"


RULES.update(
    dict.fromkeys(
        ("var_mean", "logsumexp", "norm", "all", "any", "linalg_vector_norm", "std", "var", "prod"), reduction
    )
)


@rule("max", "min", "argmax", "argmin", "median", "mode", "kthvalue")
def extreme(call: Call) -> None:
    (pointwise if call.overload == "other" else reduction)(call)


@rule("_softmax", "_safe_softmax", "_log_softmax")
def softmax(call: Call) -> None:
    along(call, "softmax is taken over it")


@rule("cumsum", "cumprod", "logcumsumexp", "flip", "roll", "cummax", "cummin", "cumsum_")
def ordered(call: Call) -> None:
    along(call, f"{call.name} follows its order")


def along(call: Call, why: str) -> None:
    """An op over a dim, or several, that leaves the shape as it is."""
    dims = call.dims(call.inputs[0])
    asked = call.arguments.get("dim", call.arguments.get("dims", -1))
    for at in [asked] if isinstance(asked, int) else asked or range(len(dims)):
        call.block(dims[at % len(dims)], why)
    for output in call.outputs:
        call.give(output, dims)


@rule("glu")
def gated(call: Call) -> None:
    """The first half of a dim times what the second half opens."""
    source = call.inputs[0]
    dims, at = call.dims(source), call.arguments["dim"] % source.dim()
    half = source.shape[at] // 2
    first, second = narrow(dims[at], 0, half), narrow(dims[at], half, 2 * half)
    call.tie(first, second)
    dims[at] = first
    call.give(call.output, dims)


@rule("native_layer_norm", "_fused_rms_norm")
def normalized(call: Call) -> None:
    source, *weights = call.inputs
    dims, n = call.dims(source), len(call.arguments["normalized_shape"])
    for dim in dims[len(dims) - n :]:
        call.block(dim, "statistics are taken over it")
    for weight in weights:
        for mine, other in zip(call.dims(weight), dims[len(dims) - n :], strict=True):
            call.tie(mine, other)
    for output in call.outputs:
        kept = [dim if size == dim.size else Factor(1) for dim, size in zip(dims, output.shape, strict=False)]
        call.give(output, kept)


@rule("native_group_norm")
def group_normalized(call: Call) -> None:
    source, *weights = call.inputs
    dims, groups = call.dims(source), call.arguments["group"]
    outer, inner = view([dims[1]], [groups, dims[1].size // groups])
    for factor in (inner, *dims[2:]):
        call.block(factor, "statistics are taken over it")
    for weight in weights:
        call.tie(call.dims(weight)[0], dims[1])
    call.give(call.outputs[0], dims)
    for output in call.outputs[1:]:
        call.give(output, [dims[0], outer])
