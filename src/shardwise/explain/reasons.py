"""Why a collective or a copy is there, in one sentence for people: from the rule's style, the change of placement and the phase.

What isn't known is said plainly from the placements, never guessed. Numbers are left to who draws them.
"""

from shardwise.core.collective import CollectiveKind
from shardwise.core.mesh import Role, role_of
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.program import REPLICATED_PARAMETERS, Collective, Op, Phase
from shardwise.explain.words import named


def carries_out(collective: Collective) -> CollectiveKind:
    """The collective that this one stands for: where summands become shards by an all-to-all, that is a reduce-scatter."""
    is_sum = collective.before == Partial() and isinstance(collective.after, Shard)
    if collective.call.kind is CollectiveKind.ALL_TO_ALL and is_sum and collective.by_data is None:
        return CollectiveKind.REDUCE_SCATTER
    if (
        collective.call.kind is CollectiveKind.ALL_GATHER
        and isinstance(collective.before, Shard)
        and isinstance(collective.after, Shard)
    ):
        return CollectiveKind.ALL_TO_ALL
    return collective.call.kind


def reason_of(collective: Collective) -> str:
    """One sentence."""
    role, phase = role_of(collective.call.axis), collective.phase
    style = collective.rule.style if collective.rule is not None else None
    match role, phase:
        case Role.SHARDS_PARAMETERS, _:
            return _fsdp_reason(collective.call.kind)
        case Role.REPLICATES, Phase.REDUCE:
            return "Replicas of the model saw different parts of the batch: their gradients (or losses) are added up."
        case Role.REPLICATES, Phase.FORWARD | Phase.LOSS:
            return "Counts the labels that count over the whole batch, so that every rank divides by the same number."
        case _, Phase.CLIP:
            return "The global norm of all gradients: every rank adds the squares of its part."
        case _, Phase.OPTIMIZER:
            return "The optimizer meets gradients that are still Partial, and each must be summed before it can be used."
        case _, Phase.REDUCE:
            return "Data-parallel ranks add up what each found for its part of the batch."
        case _, Phase.LOSS:
            return "Each rank has a part of every token's logits: what softmax needs of all of them (largest, sum, the label's own) is brought together."
        case _:
            pass
    if collective.module == REPLICATED_PARAMETERS:
        return (
            "Norms, and whatever else every rank holds whole, see each rank's part of the sequence, so each rank has a summand of their gradients: "
            "all of them are summed in one go."
        )
    if collective.reason is not None:
        return collective.reason
    return _by_placement(collective, style)


def _by_placement(collective: Collective, style: str | None) -> str:
    before, after, name = collective.before, collective.after, _last(collective.module)
    forward = collective.phase is not Phase.BACKWARD
    match before, after:
        case Shard(1), Replicate() if forward and collective.phase is Phase.RECOMPUTE:
            return f"{_subject(name)} runs again in the backward, and gathers its input again."
        case Shard(1), Replicate() if forward:
            return f"{_subject(name)} needs whole sequences, and each rank has a part of every one."
        case Shard(1), Replicate():
            return f"The forward of {name} left each rank a part of the sequence; its gradient is needed whole, since each rank's weights saw all tokens."
        case Partial(), Shard(1) if forward:
            return f"Each rank multiplied its slice of the features by its slice of {name}: the products are summands; each rank keeps its part of the sequence."
        case Partial(), Shard(1):
            return f"Each rank found a part of the gradient of what {name} took in: the parts are summed, and each rank keeps its part of the sequence."
        case Partial(), Replicate() if forward:
            return f"Each rank multiplied its slice of the features by its slice of {name}: the products are summands."
        case Partial(), Replicate():
            return f"Each rank found a part of the gradient of what {name} took in: the parts are summed."
        case Partial(), Shard(dim):
            return f"Summands are added up; each rank keeps its part of dim {dim}."
        case Shard(a), Shard(b):
            return f"What is cut along dim {a} is cut along dim {b} instead."
        case Shard(dim), Replicate():
            return f"{_subject(name)} needs dim {dim} whole, and each rank has a part."
        case Replicate(), Replicate() if collective.call.kind is CollectiveKind.ALL_REDUCE:
            return f"Each rank found a part of the gradient of what {name} took in: the parts are summed."
        case None, None if style:
            return f"{named(collective.call.kind)} by the style {style} of {name}; it doesn't say which placement becomes which."
        case _:
            return f"{named(collective.call.kind)} in {name or 'the step'}; nothing says why."


def _fsdp_reason(kind: CollectiveKind) -> str:
    match kind:
        case CollectiveKind.ALL_GATHER:
            return "FSDP keeps a shard of each parameter: they are gathered for the time that the layer runs."
        case CollectiveKind.REDUCE_SCATTER:
            return "FSDP sums the gradients over its ranks, and each keeps the shard that it owns."
        case _:
            return "Data-parallel ranks add up what each found for its part of the batch."


def copy_reason(op: Op, before: Collective | None, after: Collective | None) -> str:
    """Why a copy is made. before: the collective that reads it next; after: the one that wrote what it copies."""
    if before is not None and not _is_outer(before.before, before.after):
        return f"Blocks for each rank must lie one behind the other for the {named(before.call.kind)}; {_cut(before)} isn't the outermost dim."
    if before is not None:
        return f"Fills the buffer that the {named(before.call.kind)} sends."
    if after is not None:
        return f"Puts the parts that the {named(after.call.kind)} brought into their order."
    changes_dtype = bool(op.inputs and op.outputs and op.inputs[0].dtype != op.outputs[0].dtype)
    match op.name.removeprefix("aten::"):
        case "_to_copy" | "to" if changes_dtype:
            return f"{op.inputs[0].dtype} becomes {op.outputs[0].dtype}."
        case "_to_copy" | "to":
            return "From the host to the device." if op.on_host else "A copy in another layout or place."
        case "cat":
            return "Puts tensors side by side in new memory."
        case "stack":
            return "Stacks tensors in new memory."
        case "clone" | "contiguous":
            return "Brings a view (a transpose, a slice) into contiguous memory."
        case "copy_":
            return "Writes into memory that exists."
        case name:
            return f"{name} writes what it read to new memory."


def _is_outer(before: Placement | None, after: Placement | None) -> bool:
    return all(not isinstance(placement, Shard) or placement.dim == 0 for placement in (before, after))


def _cut(collective: Collective) -> str:
    placement = next(p for p in (collective.after, collective.before) if isinstance(p, Shard) and p.dim != 0)
    return {1: "the sequence", -1: "the last dim"}.get(placement.dim, f"dim {placement.dim}")


def _subject(name: str) -> str:
    return name or "The model"


def _last(module: str) -> str:
    parts = [part for part in module.split(".") if part != "*" and not part.isdecimal()]
    return parts[-1] if parts else ""
