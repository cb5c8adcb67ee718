"""Back through one op: what one rank's gradients of its inputs are made of, where its outputs' are known."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

from shardwise.dims.factors import Factor, find, is_partly, leaves
from shardwise.dims.record import Op, Value

# ops that give parts of a sum where all tensors that they put together are parts, or zeros
PUT_TOGETHER = frozenset(
    {"add", "add_", "cat", "stack", "index_add", "index_add_", "scatter_add", "scatter_add_"}
    | {"copy_", "written"}
)
# ops of which each entry out is one entry in: a piece meets no other
_ENTRY_BY_ENTRY = frozenset(
    {"cat", "slice", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"}
)


class Kind:
    """What one rank's gradient of a tensor is."""

    WHOLE = "whole"
    PART = "part"


def _sets() -> defaultdict[Value, set[str]]:
    return defaultdict(set)


@dataclass(slots=True)
class Kinds:
    """What gradients are made of. of: of tensors; beside: of tensors in pieces of which some are cut, those
    that every rank has whole, or shares with its neighbours (`of` is then of the others)."""

    of: defaultdict[Value, set[str]] = field(default_factory=_sets)
    beside: defaultdict[Value, set[str]] = field(default_factory=_sets)


def is_mixed(value: Value, cut: frozenset[Factor]) -> bool:
    """Whether ranks have parts of some of a tensor's pieces, and others whole."""
    return any(is_partly(dim, cut) for dim in value.dims)


def pass_back(
    op: Op,
    kinds: Kinds,
    cut: frozenset[Factor],
    parts: Collection[Value],
    along: frozenset[Factor] = frozenset(),
) -> None:
    """What an op's inputs get, from what its outputs got: a part where the op has a cut leaf that the input
    lacks, or where it is multiplied by a part of a sum. cut: the leaves that are; along: those of the
    sequence, where that is. parts: those inputs that are parts of a sum."""
    got = set[str]().union(*(kinds.of[output] for output in op.outputs if output in kinds.of))
    beside = set[str]().union(*(kinds.beside[output] for output in op.outputs if output in kinds.beside))
    if not got and not beside:
        return
    own = {leaf for value in (*op.inputs, *op.outputs) for leaf in value.leaves()} & (cut | along)
    for value in op.inputs:
        if not value.has_gradient or any(value is output for output in op.outputs):
            continue
        if value is op.added and any(find(leaf) in cut for factor in op.summed for leaf in leaves(factor)):
            continue  # added once, to the whole sum
        if parts and value not in parts and op.name in PUT_TOGETHER:
            continue  # the same
        lacks = own.difference(value.leaves())
        is_by_entry = op.name in _ENTRY_BY_ENTRY or (op.name == "index" and not lacks)
        if is_by_entry and along.isdisjoint(lacks):
            _pass_pieces(op, value, kinds, cut)
        elif parts and value not in parts:
            kinds.of[value].add(Kind.PART)
        elif lacks:
            # a part from what is cut, and from pieces beside it what those got
            kinds.of[value] |= {Kind.PART} | beside
        else:
            kinds.of[value] |= got
            if beside and is_mixed(value, cut):
                kinds.beside[value] |= beside


def _pass_pieces(op: Op, value: Value, kinds: Kinds, cut: frozenset[Factor]) -> None:
    """Each piece of an input gets what the same piece of an output got."""
    mine, is_in_pieces = cut.intersection(value.leaves()), is_mixed(value, cut)
    for output in op.outputs:
        got, beside = kinds.of.get(output, set()), kinds.beside.get(output, set())
        theirs = cut.intersection(output.leaves())
        if mine == theirs:
            _add(kinds.of, value, got)
            if is_in_pieces:
                _add(kinds.beside, value, beside)
        elif mine > theirs:
            _add(kinds.beside if is_in_pieces else kinds.of, value, got)
        else:
            _add(kinds.of, value, beside)


def _add(kinds: defaultdict[Value, set[str]], value: Value, got: set[str]) -> None:
    if got:
        kinds[value] |= got
