"""What each stage of a pipeline holds, as a table."""

from collections.abc import Iterator

from shardwise.core.explanation import Explanation
from shardwise.core.program import StageShare
from shardwise.report.common.table import Cell, Column, Columns, Line, Table, Tone, tabled
from shardwise.report.common.units import BYTES, NUMBER, format_count


def stages_tables(one: Explanation, side: str = "") -> Iterator[Table]:
    """Of a pipeline: what each stage holds."""
    if not one.stages:
        return
    columns: Columns[StageShare] = (
        (Column("Stage", NUMBER), lambda share: share.stage),
        (Column("Layers", wraps=True), _layers_text),
        (Column("Parameters", NUMBER), lambda share: Cell(share.parameters, format_count(share.parameters))),
        (Column("a rank's", BYTES), lambda share: share.parameter_bytes),
        (Column("with gradients, optimizer", BYTES), _state_bytes),
        (Column("Micro-batches in flight", NUMBER), lambda share: share.in_flight),
    )
    note = Line(
        "A stage holds activations of so many micro-batches at once, at most; bytes are of a rank's shards "
        f"there. What follows is of rank {one.rank}; --stage shows another.",
        Tone.QUIET,
    )
    yield tabled(one.stages, columns, key=f"stages{side}", title="What each stage holds", notes=[note])


def _layers_text(share: StageShare) -> str:
    """`0-19`, or of several chunks `0-9, 20-29`; a number where it is one layer."""
    spans = ((first, first + count - 1) for first, count in share.layers)
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)


def _state_bytes(share: StageShare) -> int:
    """Of parameters, gradients and AdamW's two moments, all kept in one dtype."""
    return 4 * share.parameter_bytes
