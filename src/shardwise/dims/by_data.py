"""Rules of ops whose entries go where data says (look-ups, gathers, top-k), of windows and padding, and of
ops that make tensors from nothing."""

import torch
from torch import Tensor

from shardwise.dims.factors import ConflictError, Factor, concatenation, leaves, narrow
from shardwise.dims.record import Source
from shardwise.dims.rules import Call, rule

BY_ID = "its rows are looked up by id"


@rule("embedding")
def embedding(call: Call) -> None:
    weight, ids = call.inputs
    rows, width = call.dims(weight)
    call.block(rows, BY_ID)
    call.give(call.output, [*call.dims(ids), width])


@rule("index", "_unsafe_index")
def indexed(call: Call) -> None:
    source = call.inputs[0]
    call.is_linear = True
    dims, indices = call.dims(source), list(call.arguments["indices"])
    places = [at for at, index in enumerate(indices) if index is not None]
    run = run_of(indices[places[0]], dims[places[0]].size) if len(places) == 1 else None
    if run is not None:
        # known numbers, one after the other: a slice
        try:
            dims[places[0]] = narrow(dims[places[0]], *run)
        except ConflictError:
            pass
        else:
            call.give(call.output, dims)
            return
    for at in places:
        call.block(dims[at], "its entries are taken by data")
    ahead, taken, rest = _around(call, dims, indices, places)
    call.give(call.output, [*ahead, *taken, *rest])


def _around(
    call: Call, dims: list[Factor], indices: list[Tensor | None], places: list[int]
) -> tuple[list[Factor], list[Factor], list[Factor]]:
    """The dims of what indices take: (dims before, the indices' own, dims after)."""
    shapes = [index for index in indices if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for index in shapes):
        for dim in dims:
            call.block(dim, "its entries are taken by a mask")
        return [], [Factor(size) for size in call.output.shape], []
    taken = [Factor(1)] * max(index.dim() for index in shapes)
    for index in shapes:
        own = call.dims(index)
        for at, dim in enumerate(own, len(taken) - len(own)):
            if dim.size > 1 and taken[at].size > 1:
                call.tie(taken[at], dim)
            elif dim.size > 1:
                taken[at] = dim
    is_together = places == list(range(places[0], places[-1] + 1))
    ahead = [dim for at, dim in enumerate(dims) if at not in places and at < places[0]] if is_together else []
    rest = [dim for at, dim in enumerate(dims) if at not in places][len(ahead) :]
    return ahead, taken, rest


def run_of(index: Tensor, size: int) -> tuple[int, int] | None:
    """(start, stop) of an index into a dim of `size` whose numbers are known and follow each other; None for
    another."""
    if index.is_meta or index.dim() != 1 or index.dtype in (torch.bool, torch.uint8) or not index.numel():
        return None
    known = [each % size for each in index.tolist()]
    is_run = known == list(range(known[0], known[0] + len(known)))
    return (known[0], known[-1] + 1) if is_run else None


@rule("index_put", "index_put_")
def written(call: Call) -> None:
    dims, indices = call.dims(call.inputs[0]), list(call.arguments["indices"])
    places = [at for at, index in enumerate(indices) if index is not None]
    for at in places:
        call.block(dims[at], "its entries are written by data")
    values = call.dims(call.arguments["values"])
    if any(indices[at].dtype in (torch.bool, torch.uint8) for at in places):
        for dim in (*dims, *values):
            call.block(dim, "its entries are written by a mask")
    else:
        ahead, taken, rest = _around(call, dims, indices, places)
        for dim in taken:
            call.block(dim, "each of its entries is written by data")
        for mine, other in zip(reversed([*ahead, *taken, *rest]), reversed(values), strict=False):
            if mine.size == other.size:
                call.tie(mine, other)
    call.give(call.output, dims)


@rule("index_select", "index_add", "index_add_", "index_copy", "index_copy_", "index_fill_", "index_fill")
def selected_by_data(call: Call) -> None:
    call.is_linear = call.name in ("index_select", "gather")
    source = call.inputs[0]
    dims, at = call.dims(source), call.arguments["dim"] % source.dim()
    call.block(dims[at], "its entries are taken by data")
    index = call.dims(call.arguments["index"])
    if call.name == "index_select":
        dims[at] = index[0] if index else Factor(1)
        call.give(call.output, dims)
        return
    for dim in index:
        call.block(dim, "each of its entries is written by data")
    written_ = call.arguments.get("source")
    if isinstance(written_, Tensor):
        for where, (mine, other) in enumerate(zip(dims, call.dims(written_), strict=True)):
            if where != at:
                call.tie(mine, other)
            else:
                call.block(other, "each of its entries is written by data")
    call.give(call.output, dims)


@rule("gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def gathered(call: Call) -> None:
    call.is_linear = call.name in ("index_select", "gather")
    source, *others = call.inputs
    dims, at = call.dims(source), call.arguments["dim"] % max(1, source.dim())
    call.block(dims[at], "its entries are taken by data")
    for other in others:
        for where, dim in enumerate(call.dims(other)):
            if where == at:
                if call.name != "gather":
                    call.block(dim, "each of its entries is written by data")
            elif dim.size == dims[where].size:
                call.tie(dims[where], dim)
            else:
                call.block(dims[where], "a part of it is taken by data")
                call.block(dim, "it takes from a part by data")
    if call.name == "gather":
        index = call.dims(call.arguments["index"])
        call.give(call.output, index)
    else:
        call.give(call.output, dims)


@rule("topk", "sort")
def ranked(call: Call) -> None:
    dims = call.dims(call.inputs[0])
    at = call.arguments.get("dim", -1) % len(dims)
    call.block(dims[at], f"{call.name} is taken over it")
    for output in call.outputs:
        own = list(dims)
        if output.shape[at] != dims[at].size:
            own[at] = Factor(output.shape[at])
        call.give(output, own)


@rule("_grouped_mm")
def grouped(call: Call) -> None:
    """Rows of each expert times its weight: [n, k] x [experts, k, m]."""
    rows, weights = (call.dims(tensor) for tensor in call.inputs[:2])
    call.tie(rows[-1], weights[-2])
    call.block(weights[0], "its experts are chosen by data")
    for dim in (rows[0], *(dim for ends in call.inputs[2:] for dim in call.dims(ends))):
        call.block(dim, "its rows go to experts by data")
    call.summed += list(leaves(rows[-1]))
    call.give(call.output, [rows[0], weights[-1]])
    call.is_linear = True


@rule("convolution")
def convolution(call: Call) -> None:
    """[B, channels, ...]: a window runs over the other dims; channels are free where each has its own
    filter."""
    source, weight, *bias = call.inputs
    x, filters, groups = call.dims(source), call.dims(weight), call.arguments["groups"]
    for dim in (*x[2:], *filters[2:]):
        call.block(dim, "a window runs over it")
    if call.arguments.get("transposed"):
        filters = [filters[1], filters[0], *filters[2:]]  # [in, out / groups, ...]
    if groups == x[1].size == filters[0].size:
        call.tie(x[1], filters[0])
    elif groups == 1 and filters[1].size == x[1].size:
        call.tie(x[1], filters[1])
        call.summed += list(leaves(x[1]))
        call.added = bias[0] if bias else None
    else:
        for dim in (x[1], *filters[:2]):
            call.block(dim, "channels are in groups")
    out = filters[0] if filters[0].size == call.output.shape[1] else Factor(call.output.shape[1])
    for tensor in bias:
        call.tie(call.dims(tensor)[0], out)
    call.give(call.output, [x[0], out, *map(Factor, call.output.shape[2:])])


@rule("constant_pad_nd")
def padded(call: Call) -> None:
    source, pads = call.inputs[0], list(call.arguments["pad"])
    dims = call.dims(source)
    for at in range(len(pads) // 2):
        before, after = pads[2 * at : 2 * at + 2]
        where = len(dims) - 1 - at
        if not before and not after:
            continue
        size = call.output.shape[where]
        if before < 0 or after < 0 or call.is_of_sequence(dims[where]):
            call.block(dims[where], "it is padded")
            dims[where] = Factor(size)
        else:
            around = [Factor(before), dims[where], Factor(after)]
            dims[where] = concatenation(around)
    call.give(call.output, dims)


@rule("unfold")
def unfolded(call: Call) -> None:
    dims = call.dims(call.inputs[0])
    at = call.arguments["dimension"] % len(dims)
    call.block(dims[at], "windows of it are taken")
    own = [*dims, Factor(call.output.shape[-1])]
    own[at] = Factor(call.output.shape[at])
    call.give(call.output, own)


@rule("view_as_complex", "view_as_real")
def complex_view(call: Call) -> None:
    dims = call.dims(call.inputs[0])
    if call.name == "view_as_complex":
        call.block(dims[-1], "it holds a number's two parts")
        call.give(call.output, dims[:-1])
    else:
        call.give(call.output, [*dims, Factor(2)])
    call.is_linear = True


@rule("diagonal", "linalg_solve_triangular", "linalg_inv_ex")
def matrices(call: Call) -> None:
    """Over the last two dims of each input; those before are free."""
    for tensor in call.inputs:
        for dim in call.dims(tensor)[-2:]:
            call.block(dim, f"{call.name} works on it as a matrix")
    first = call.dims(call.inputs[-1])
    ahead = first[:-2]
    for tensor in call.inputs[:-1]:
        for mine, other in zip(ahead, call.dims(tensor)[:-2], strict=False):
            if mine.size == other.size:
                call.tie(mine, other)
    for output in call.outputs:
        own = [*ahead, *map(Factor, output.shape[len(ahead) :])]
        for at in range(len(ahead), min(len(own), len(first))):
            if own[at].size == first[at].size and call.name != "diagonal":
                own[at] = first[at]
        call.give(output, own)


@rule(
    *("arange", "linspace", "eye", "scalar_tensor", "rand", "randn", "randint", "randperm", "tril_indices"),
    *("triu_indices", "bincount", "histc", "nonzero", "_unique2", "unique_consecutive"),
    *("searchsorted", "bucketize", "_local_scalar_dense", "repeat_interleave"),
)
def made(call: Call) -> None:
    """Numbers that depend on where they stand, or on data as a whole."""
    for tensor in call.inputs:
        for dim in call.dims(tensor):
            call.block(dim, f"{call.name} takes it as a whole")
    _fresh(call)
    call.source = Source.POSITIONS if not call.inputs else Source.OP


@rule("ones", "zeros", "full", "empty", "new_ones", "new_zeros", "new_full", "new_empty", "empty_strided")
def filled(call: Call) -> None:
    _fresh(call)
    call.source = Source.FILLED
    call.is_sized = True


def _fresh(call: Call) -> None:
    for output in call.outputs:
        call.give(output, [Factor(size) for size in output.shape])
