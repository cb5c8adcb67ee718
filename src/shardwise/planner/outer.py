"""The outer modules of a model: in which ids are looked up, and which makes the logits."""

from torch import nn

from shardwise.core.placement import Placement, Replicate, Shard
from shardwise.dims.by_data import BY_ID
from shardwise.dims.factors import Factor, leaves
from shardwise.dims.record import Op, Record, Value


def read_in(record: Record, module: str | None) -> set[str]:
    """The parameters that a module's own forward reads."""
    values = {value for op in record.ops if op.module == module for value in op.inputs}
    return {name for name, value in record.parameters.items() if value in values}


def tables_of(record: Record, model: nn.Module) -> tuple[str, ...]:
    """Embeddings in which ids are looked up, and of which nobody reads rows otherwise: of any other class no
    style knows how rows of a part are found."""
    modules = dict(model.named_modules())
    found = [
        op.module
        for op in record.ops
        if op.name == "embedding"
        and op.inputs[-1].is_live
        and not op.inputs[-1].has_gradient
        and isinstance(modules[op.module], nn.Embedding)
        and _are_rows_free(record, op.inputs[0])
    ]
    return tuple(dict.fromkeys(found))


def _are_rows_free(record: Record, table: Value) -> bool:
    """Whether a table's rows are never taken but by id: `weight[pad_id]` of a rank's part is another row."""
    rows = frozenset(leaves(table.dims[0]))
    return not any(
        why != BY_ID and table in op.inputs and not rows.isdisjoint(leaves(factor))
        for op in record.ops
        for factor, why in op.blocked
    )


def head_of(record: Record, model: nn.Module) -> tuple[str | None, Placement]:
    """The module that makes the logits, and what of them it may give: its part where all that follows takes
    one."""
    assert record.logits is not None
    vocabulary = frozenset(leaves(record.logits.dims[-1]))
    makers = [op for op in record.ops if op.summed and _has(op, vocabulary, outputs=True)]
    if not makers or len(vocabulary) != 1:
        return None, Replicate()
    head = makers[-1].module
    if not any(True for _ in dict(model.named_modules())[head].parameters(recurse=False)):
        return None, Replicate()
    if not all(_are_rows_free(record, record.parameters[name]) for name in read_in(record, head)):
        return None, Replicate()  # it shares such a table
    is_taken_as_a_whole = any(
        why != BY_ID and not vocabulary.isdisjoint(leaves(factor))
        for op in record.ops
        for factor, why in op.blocked
    )
    return head, Replicate() if is_taken_as_a_whole else Shard(-1)


def _has(op: Op, own: frozenset[Factor], *, outputs: bool) -> bool:
    return any(not own.isdisjoint(value.leaves()) for value in (op.outputs if outputs else op.inputs))
