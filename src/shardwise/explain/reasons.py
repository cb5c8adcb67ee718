"""Why a collective or a copy is there, in one sentence for people: from the rule's style, the change of
placement and the phase.

What isn't known is said plainly from the placements, never guessed. Numbers are left to who draws them.
"""

from shardwise.core.collective import TIMED, TO_ONE_RANK, CollectiveKind, collective_name, is_off_mesh
from shardwise.core.mesh import Role, axes_in, role_of, sees_other_tokens
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.program import REPLICATED_PARAMETERS, Collective, Op, Phase
from shardwise.core.rule import ModuleKind

_DATA_PARALLEL = "Data-parallel ranks add up what each found for its part of the batch."
_FSDP = {
    CollectiveKind.ALL_GATHER: "FSDP keeps a shard of each parameter: they are gathered for the time that "
    "the layer runs.",
    CollectiveKind.REDUCE_SCATTER: "FSDP sums the gradients over its ranks, and each keeps the shard that it "
    "owns.",
}
_COUNTS = "Counts the labels that count over the whole batch, so that every rank divides by the same number."
_REPLICAS = {
    Phase.REDUCE: "Replicas of the model saw different parts of the batch: their gradients (or losses) are "
    "added up.",
    Phase.FORWARD: _COUNTS,
    Phase.LOSS: _COUNTS,
}
_OF_PHASE = {
    Phase.REDUCE: _DATA_PARALLEL,
    Phase.CLIP: "The global norm of all gradients: every rank adds the squares of its part.",
    Phase.OPTIMIZER: "The optimizer meets gradients that are still Partial, and each must be summed before "
    "it can be used.",
    Phase.LOSS: "Each rank has a part of every token's logits: what softmax needs of all of them (largest, "
    "sum, the label's own) is brought together.",
}
_REPLICATED = (
    "Norms, and whatever else every rank holds whole, see each rank's part of the sequence, so each rank has "
    "a summand of their gradients: all of them are summed in one go."
)
_SHARED = "Ranks saw different parts of each sequence: what each found (gradients, or losses) is added up."
_SHARES = {2: "half", 3: "a third", 4: "a quarter", 8: "an eighth"}
_STAGES = "The last stage finds the loss: all stages learn it."
_OF_CODE = "The model's own code asks for it, or a library that it calls: no rule of the plan does."
_OF_COPY = {
    "cat": "Puts tensors side by side in new memory.",
    "stack": "Stacks tensors in new memory.",
    "clone": "Brings a view (a transpose, a slice) into contiguous memory.",
    "contiguous": "Brings a view (a transpose, a slice) into contiguous memory.",
    "copy_": "Writes into memory that exists.",
}


def carries_out(collective: Collective) -> CollectiveKind:
    """The collective that this one stands for: an all-to-all in which summands become shards is a
    reduce-scatter, an all-gather of which each rank keeps another shard an all-to-all."""
    kind, before, after = collective.call.kind, collective.before, collective.after
    if kind is CollectiveKind.ALL_TO_ALL and collective.by_data is None:
        return CollectiveKind.REDUCE_SCATTER if before == Partial() and isinstance(after, Shard) else kind
    if kind is CollectiveKind.ALL_GATHER and isinstance(before, Shard) and isinstance(after, Shard):
        return CollectiveKind.ALL_TO_ALL
    return kind


def reason_of(collective: Collective) -> str:
    """One sentence: by the axis and what the step is doing, where they say all, else by the style or the
    placements."""
    call, phase = collective.call, collective.phase
    if call.kind in TO_ONE_RANK and collective.reason is not None:
        return collective.reason
    if role_of(call.axis) is Role.CUTS_SEQUENCE and collective.before is not None:
        shared = _of_shared_sequences(collective)
        if shared is not None:
            return shared
    if call.kind not in TIMED or is_off_mesh(call.axis):  # no plan's engine issues these
        return _OF_CODE
    role = role_of(call.axis)
    if role is Role.CUTS_DEPTH and phase is Phase.REDUCE:
        return _STAGES
    if role is Role.SHARDS_PARAMETERS and call.kind in _FSDP:
        return _FSDP[call.kind]
    if role is Role.REPLICATES and phase in _REPLICAS:
        return _REPLICAS[phase]
    if _counts_labels(collective):
        return _COUNTS
    if phase in _OF_PHASE:
        return _OF_PHASE[phase]
    if collective.module == REPLICATED_PARAMETERS:
        return _REPLICATED
    return collective.reason or _of_experts(collective) or _by_placement(collective)


def _of_shared_sequences(collective: Collective) -> str | None:
    """What ranks that share each sequence exchange: for attention, and of what each found for its tokens.
    None for a number that the step counts."""
    call, name = collective.call, _last(collective.module)
    share = _SHARES.get(call.axis_size, f"1/{call.axis_size}")
    is_first, is_gradient = collective.phase is not Phase.BACKWARD, collective.before == Partial()
    match carries_out(collective):
        case CollectiveKind.ALL_GATHER if not collective.module:
            return "Each rank tells the others which document its tokens are of."
        case CollectiveKind.ALL_GATHER if is_first:
            return (
                f"Each rank has {share} of every sequence, and the queries of {name} need all keys: keys and "
                "values are gathered."
            )
        case CollectiveKind.ALL_GATHER:
            return f"The backward of {name} needs all keys and values again, which weren't kept."
        case CollectiveKind.REDUCE_SCATTER:
            return (
                f"Each rank's queries gave a part of the gradient of all keys and values of {name}: the "
                "parts are summed, and each rank keeps its own tokens'."
            )
        case CollectiveKind.SEND | CollectiveKind.RECV if is_gradient:
            return (
                f"Gradients of keys and values of {name} go round behind them, and each rank adds what its "
                "queries gave, until they are home."
            )
        case CollectiveKind.SEND | CollectiveKind.RECV if is_first:
            return (
                f"Each rank has {share} of every sequence, and the queries of {name} need all keys: keys and "
                "values go round from rank to rank."
            )
        case CollectiveKind.SEND | CollectiveKind.RECV:
            return f"Keys and values of {name} go round again, for their gradients."
        case CollectiveKind.ALL_REDUCE if collective.phase is Phase.REDUCE:
            return _SHARED
    return None


def _counts_labels(collective: Collective) -> bool:
    """Whether the step sums a number over ranks that see other tokens, before any module runs."""
    call, is_early = collective.call, collective.phase in (Phase.FORWARD, Phase.LOSS)
    sees_others = all(map(sees_other_tokens, axes_in(call.axis)))
    return call.kind is CollectiveKind.ALL_REDUCE and is_early and sees_others and not collective.module


def _of_experts(collective: Collective) -> str | None:
    """Of a module of experts whose weights are cut inside."""
    if collective.module_kind is not ModuleKind.EXPERTS or not isinstance(collective.before, Partial):
        return None
    kept = "; each rank keeps its part of the sequence" if isinstance(collective.after, Shard) else ""
    if collective.phase is Phase.BACKWARD:
        return (
            "Each rank found a part of the gradient of what its slices of the experts took in (tokens, or "
            f"how much each of its experts counts for a token): the parts are summed{kept}."
        )
    return (
        "Each rank has a slice of every expert, and multiplied each token by those of the experts that the "
        f"router chose for it: the products are summands{kept}."
    )


def _by_placement(collective: Collective) -> str:
    before, after, name = collective.before, collective.after, _last(collective.module)
    kind, forward = collective.call.kind, collective.phase is not Phase.BACKWARD
    multiplied = (
        f"Each rank multiplied its slice of the features by its slice of {name}: the products are summands"
    )
    taken = f"the gradient of what {name or 'the model'} took in"
    if collective.rule is None:  # FSDP sums them where it finds them
        taken = f"a gradient of {name or 'the model'} (of what it took in, or of weights that all have whole)"
    part_found = f"Each rank found a part of {taken}: the parts are summed"
    match before, after:
        case Shard(1), Replicate() if collective.phase is Phase.RECOMPUTE:
            return f"{_subject(name)} runs again in the backward, and gathers its input again."
        case Shard(1), Replicate() if forward:
            return f"{_subject(name)} needs whole sequences, and each rank has a part of every one."
        case Shard(1), Replicate():
            return (
                f"The forward of {name} left each rank a part of the sequence; its gradient is needed whole, "
                "since each rank's weights saw all tokens."
            )
        case Partial(), Shard(1) if forward:
            return f"{multiplied}; each rank keeps its part of the sequence."
        case Partial(), Shard(1):
            return f"{part_found}, and each rank keeps its part of the sequence."
        case Partial(), Replicate() if forward:
            return f"{multiplied}."
        case Partial(), Shard(dim):
            return f"Summands are added up; each rank keeps its part of dim {dim}."
        case Shard(a), Shard(b):
            return f"What is cut along dim {a} is cut along dim {b} instead."
        case Shard(dim), Replicate() if forward:
            return (
                f"What {name or 'the model'} takes is made whole along dim {dim}, of which each rank has a "
                "part."
            )
        case Shard(dim), Replicate():
            return (
                f"What {name or 'the model'} gave was cut along dim {dim}: its gradient is made whole again."
            )
        case Partial(), Replicate():
            return f"{part_found}."
        case Replicate(), Replicate() if kind is CollectiveKind.ALL_REDUCE:
            return f"{part_found}."
        case None, None if collective.rule is not None:
            style = collective.rule.style
            return (
                f"{collective_name(kind)} by the style {style} of {name}; it doesn't say which placement "
                "becomes which."
            )
        case _:
            return (
                f"{collective_name(kind)} in {name or 'the step'}; nothing says why: it is called in code "
                "that tells no placements, as DTensor and the native engine do."
            )


def copy_reason(op: Op, before: Collective | None, after: Collective | None) -> str:
    """Why a copy is made. before: the collective that reads it next; after: the one that wrote what it
    copies."""
    if before is not None and not _is_outer(before.before, before.after):
        return (
            "Blocks for each rank must lie one behind the other for the "
            f"{collective_name(before.call.kind)}; {_cut(before)} isn't the outermost dim."
        )
    if before is not None:
        return f"Fills the buffer that the {collective_name(before.call.kind)} sends."
    if after is not None:
        return f"Puts the parts that the {collective_name(after.call.kind)} brought into their order."
    changes_dtype = bool(op.inputs and op.outputs and op.inputs[0].dtype != op.outputs[0].dtype)
    name = op.name.removeprefix("aten::")
    if name not in ("_to_copy", "to"):
        return _OF_COPY.get(name, f"{name} writes what it read to new memory.")
    if changes_dtype:
        return f"{op.inputs[0].dtype} becomes {op.outputs[0].dtype}."
    return "From the host to the device." if op.on_host else "A copy in another layout or place."


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
