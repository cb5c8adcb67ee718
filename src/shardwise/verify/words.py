"""What findings say: of a relation, of a place in the model, of what to do."""

from collections.abc import Mapping, Sequence

from shardwise.core.finding import Cause
from shardwise.verify.blocks import Block
from shardwise.verify.relation import Related, Relation
from shardwise.verify.roots import Seen
from shardwise.verify.trail import Side

ADVICE = {
    Cause.PARTS_NOT_SUMMED: "Sum them over tp; of a gradient, sequence_parallel does that, and "
    "replicated_with_grad_allreduce in a plan of transformers.",
    Cause.SUMMED_TOO_OFTEN: "Leave out the sum; or, where the style takes its input for a part, such as of "
    "the sequence, give it one.",
    Cause.AVERAGED: "Sum the parts instead of averaging them, and don't divide a whole.",
    Cause.CUT_AS_ONE: "Cut each weight by itself; in a plan of transformers, packed_colwise and "
    "packed_rowwise do that.",
    Cause.NOT_GATHERED: "Gather the logits (colwise_gather_output in a plan of transformers), or take a "
    "vocabulary-parallel loss.",
    Cause.WRONG_SHARD: "Let rank r hold the r-th chunk, as DTensor's Shard does.",
    Cause.PART_FOR_WHOLE: "Give it the whole (a gather before it), or let the ranks sum its statistics.",
    Cause.PARTS_MEET_WHOLES: "Cut all of them alike, over ranks that divide each, or gather the parts first.",
}

SHIFTED = "each rank has the gradient of another rank's part"
ADDED = "every rank has the sum of all ranks' gradients, each of a part of its own"
_MOST_BLOCKS = 4


def own_fault(related: Related, n_ranks: int) -> tuple[Cause, str]:
    """What a parameter's gradient tells by itself."""
    times = f"{times_of(related.factor)} the unsharded one"
    match related.relation:
        case Relation.MISSING:
            return Cause.NOTHING_ARRIVES, "no gradient arrives on some rank"
        case Relation.ZERO:
            return Cause.NOTHING_ARRIVES, "its gradient is zero, and the unsharded one isn't"
        case Relation.PARTS if related.factor is None:
            reason = f"each of {n_ranks} ranks computes a part of its gradient, and nothing sums them"
            return Cause.PARTS_NOT_SUMMED, reason
        case Relation.PARTS:
            reason = f"the ranks' gradients differ, nothing sums them, and their sum is {times}"
            return Cause.PARTS_NOT_SUMMED, reason
        case Relation.MULTIPLE if related.factor is not None and not _is_of_ranks(related.factor):
            return Cause.UNKNOWN, f"its gradient is {times}"
        case Relation.MULTIPLE if related.factor is not None and abs(related.factor) > 1:
            return Cause.SUMMED_TOO_OFTEN, f"its gradient is {times}: summed where every rank had the whole"
        case Relation.MULTIPLE:
            return Cause.AVERAGED, f"its gradient is {times}: averaged, or parts that were not summed"
        case Relation.BLOCKS:
            return _of_blocks(related, n_ranks)
        case Relation.SHIFTED:
            return Cause.WRONG_SHARD, SHIFTED
        case Relation.REORDERED:
            return (
                Cause.WRONG_SHARD,
                "the ranks have the right gradients, in another order than the parameter",
            )
        case Relation.ADDED:
            return Cause.SUMMED_TOO_OFTEN, ADDED
        case Relation.ONE_OF_SEVERAL:
            reason = (
                f"it holds {related.factor:.0f} weights, which must each be cut by itself; it is cut as one"
            )
            return Cause.CUT_AS_ONE, reason
        case Relation.SHARDED | Relation.WHOLE:
            reason = "each rank's gradient is right for a plain cut, and the parameter isn't cut so"
            return Cause.CUT_AS_ONE, reason
        case Relation.UNEQUAL:
            return Cause.UNKNOWN, "every rank holds it whole, and its gradient isn't equal on them"
        case Relation.OTHER:
            return Cause.UNKNOWN, "its gradient isn't the unsharded one"


def _of_blocks(related: Related, n_ranks: int) -> tuple[Cause, str]:
    """Of a weight of which some rows are right and others aren't."""
    rows = {0: "rows", 1: "columns"}.get(related.dim or 0, f"slices along dim {related.dim}")
    wrong = [block for block in related.blocks if not block.is_whole]
    which = f"its {rows} {_spans(wrong)}"
    if any(block.is_part for block in wrong):
        reason = f"each of {n_ranks} ranks computes a part of the gradient of {which}, and nothing sums them"
        return Cause.PARTS_NOT_SUMMED, f"{reason}; the others are whole on every rank"
    factor = wrong[0].factor or 0.0
    if not factor:
        reason = f"the gradient of {which} is zero, and the unsharded one's isn't; the others are right"
        return Cause.NOTHING_ARRIVES, reason
    cause = Cause.SUMMED_TOO_OFTEN if abs(factor) > 1 else Cause.AVERAGED
    return cause, f"the gradient of {which} is {times_of(factor)} the unsharded one; the others are right"


def _spans(blocks: Sequence[Block]) -> str:
    """Of the slices [start, stop), as in Python."""
    shown = ", ".join(f"{block.start}:{block.stop}" for block in blocks[:_MOST_BLOCKS])
    return (
        shown if len(blocks) <= _MOST_BLOCKS else f"{shown} and {len(blocks) - _MOST_BLOCKS} such blocks more"
    )


def named(module: str) -> str:
    return module or "the model itself"


def spot(seen: Seen) -> str:
    """A point of the trail."""
    return f"the input of {named(seen.module)}" if seen.side is Side.TAKES else named(seen.module)


def around(modules: Sequence[str]) -> str:
    """The innermost module that has them all in it, or is all of them."""
    paths = [module.split(".") for module in modules]
    shared = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def listed(names: Sequence[str], most: int = 3) -> str:
    """a; a and b; a, b and c; a, b, c and 4 more."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def relation_words(related: Related | None, by_relation: Mapping[Relation, str], what: str) -> str:
    if related is None:
        return f"{what} isn't the unsharded one"
    if related.relation is Relation.MULTIPLE:
        return f"{what} is {times_of(related.factor)} the unsharded one"
    return by_relation.get(related.relation, f"{what} isn't the unsharded one")


def times_of(factor: float | None) -> str:
    if factor is None:
        return "a multiple of"
    for n in range(2, 65):
        if abs(factor - n) < 1e-6:
            return f"{n} times"
        if abs(factor - 1 / n) < 1e-6:
            return f"1/{n} of"
    if f"{factor:.3g}" == "1":
        return f"(1 {'+' if factor > 1 else '-'} {abs(factor - 1):.1e}) times"
    return f"{factor:.3g} times"


_NEAR = 1e-3


def _is_of_ranks(factor: float) -> bool:
    """Whether ranks can have made it, which sum or divide: it is a whole number of times, or divided by
    one."""
    often = max(abs(factor), 1 / abs(factor)) if factor else 0.0
    return round(often) > 1 and abs(often - round(often)) <= _NEAR * often
