"""Rules of ops that rearrange: views, slices, pieces, and what puts pieces together. No entry is computed
anew."""

from torch import Tensor

from shardwise.dims.factors import ConflictError, Factor, concatenation, narrow, pieces, product, view
from shardwise.dims.rules import Call, rule


@rule("view", "_unsafe_view", "_reshape_alias")
def viewed(call: Call) -> None:
    call.give(call.output, view(call.dims(call.inputs[0]), call.output.shape))
    call.is_linear = True


@rule("t", "transpose", "permute", "transpose_", "t_")
def permuted(call: Call) -> None:
    dims = call.dims(call.inputs[0])
    order = list(range(len(dims)))
    if call.name == "permute":
        order = [at % len(dims) for at in call.arguments["dims"]]
    elif len(dims) > 1:
        a = call.arguments.get("dim0", 0) % len(dims)
        b = call.arguments.get("dim1", 1) % len(dims)
        order[a], order[b] = order[b], order[a]
    call.give(call.output, [dims[at] for at in order])
    call.is_linear = True


@rule("unsqueeze", "unsqueeze_")
def unsqueezed(call: Call) -> None:
    dims = call.dims(call.inputs[0])
    at = call.arguments["dim"] % (len(dims) + 1)
    call.give(call.output, [*dims[:at], Factor(1), *dims[at:]])
    call.is_linear = True


@rule("squeeze", "squeeze_")
def squeezed(call: Call) -> None:
    dims = call.dims(call.inputs[0])
    asked = call.arguments.get("dim", list(range(len(dims))))
    chosen = {at % len(dims) for at in ([asked] if isinstance(asked, int) else asked)}
    call.give(call.output, [dim for at, dim in enumerate(dims) if at not in chosen or dim.size != 1])
    call.is_linear = True


@rule("expand")
def expanded(call: Call) -> None:
    dims = call.dims(call.inputs[0])
    ahead = call.output.dim() - len(dims)
    own = [Factor(size) for size in call.output.shape]
    for at, dim in enumerate(dims, ahead):
        if dim.size == call.output.shape[at]:
            own[at] = dim
    call.give(call.output, own)
    call.is_linear = call.is_sized = True


@rule("slice", "slice_scatter")
def sliced(call: Call) -> None:
    source = call.inputs[0]
    dims, at = call.dims(source), call.arguments["dim"] % source.dim()
    size, step = source.shape[at], call.arguments.get("step", 1)
    if call.name == "slice_scatter":
        for where, (mine, other) in enumerate(zip(dims, call.dims(call.inputs[1]), strict=True)):
            if where != at:
                call.tie(mine, other)
            else:
                call.block(mine, "a part of it is written")
                call.block(other, "it is written into a part")
        call.give(call.output, dims)
        return
    start, length = _start(call.arguments.get("start"), size), call.output.shape[at]
    if length != size:
        dims[at] = _part(call, source, dims[at], start, length, step)
    call.give(call.output, dims)
    call.is_linear = True


def _start(start: int | None, size: int) -> int:
    start = start or 0
    return max(0, start + size) if start < 0 else min(start, size)


def _part(call: Call, source: Tensor, factor: Factor, start: int, length: int, step: int) -> Factor:
    """What a slice leaves of a dim: pieces of a fused dim; or a part that says nothing of it (of positions
    and masks, of a sequence, or a single entry), and it then stays whole."""
    if step != 1:
        if factor.size % step == 0 and length == factor.size // step:
            try:
                outer, inner = view([factor], [length, step])
            except ConflictError:
                pass
            else:
                call.block(inner, "every second entry or so is taken")
                return outer
        call.block(factor, "every second entry or so is taken")
        return Factor(length)
    says_nothing = call.is_of_sequence(factor) or not call.value_of(source).has_gradient
    is_single = min(length, factor.size - length) <= 1
    if says_nothing or (is_single and not _is_piece(factor, start, start + length)):
        call.block(factor, "a part of it is taken")
        return Factor(length)
    try:
        return narrow(factor, start, start + length)
    except ConflictError as error:
        call.conflicts.append(str(error))
        call.block(factor, "a part of it is taken, at no boundary of its units")
        return Factor(length)


def _is_piece(factor: Factor, start: int, stop: int) -> bool:
    """Whether a bound lies between pieces that are told apart already."""
    bounds, reached = set[int](), 0
    for part in pieces(factor)[:-1]:
        reached += part.size
        bounds.add(reached)
    return start in bounds or stop in bounds


@rule("select")
def selected(call: Call) -> None:
    dims = call.dims(call.inputs[0])
    at = call.arguments["dim"] % len(dims)
    call.block(dims[at], "one entry of it is taken")
    call.give(call.output, dims[:at] + dims[at + 1 :])
    call.is_linear = True


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split(call: Call) -> None:
    source = call.inputs[0]
    at, reached = call.arguments.get("dim", 0) % source.dim(), 0
    for output in call.outputs:
        dims = call.dims(source)
        if output.shape[at] != source.shape[at]:
            if call.is_of_sequence(dims[at]) or not call.value_of(source).has_gradient:
                call.block(dims[at], "it is taken apart")
                dims[at] = Factor(output.shape[at])
            else:
                dims[at] = narrow(dims[at], reached, reached + output.shape[at])
        reached += output.shape[at]
        call.give(output, dims)
    call.is_linear = True


@rule("unbind")
def unbound(call: Call) -> None:
    dims = call.dims(call.inputs[0])
    at = call.arguments.get("dim", 0) % len(dims)
    call.block(dims[at], "its entries are taken apart")
    for output in call.outputs:
        call.give(output, dims[:at] + dims[at + 1 :])
    call.is_linear = True


@rule("cat")
def concatenated(call: Call) -> None:
    at = call.arguments.get("dim", 0) % call.output.dim()
    filled = [tensor for tensor in call.inputs if tensor.numel()]
    dims = call.dims(filled[0])
    for tensor in filled[1:]:
        for where, (mine, other) in enumerate(zip(dims, call.dims(tensor), strict=True)):
            if where != at:
                call.tie(mine, other)
    dims[at] = concatenation([call.dims(tensor)[at] for tensor in filled])
    call.give(call.output, dims)


@rule("stack")
def stacked(call: Call) -> None:
    at = call.arguments.get("dim", 0) % call.output.dim()
    dims = call.dims(call.inputs[0])
    for tensor in call.inputs[1:]:
        for mine, other in zip(dims, call.dims(tensor), strict=True):
            call.tie(mine, other)
    call.give(call.output, [*dims[:at], Factor(len(call.inputs)), *dims[at:]])


@rule("repeat")
def repeated(call: Call) -> None:
    dims, times = call.dims(call.inputs[0]), list(call.arguments["repeats"])
    padded = [Factor(1)] * (len(times) - len(dims)) + dims
    call.give(
        call.output,
        [dim if n == 1 else product([Factor(n), dim]) for dim, n in zip(padded, times, strict=True)],
    )
    call.is_linear = call.is_sized = True
