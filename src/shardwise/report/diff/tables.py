"""RunProfile and Difference -> tables and words: where the time of a step went, and what sets two runs
apart."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from shardwise.core.collective import collective_name
from shardwise.core.difference import CollectiveUse, Difference, RunProfile, Use, Work
from shardwise.core.difference import Line as WorkLine
from shardwise.core.parts import Parts, parts_of
from shardwise.core.waiting import SharedCollective
from shardwise.profiles.diff import run_words
from shardwise.report.common.table import (
    Block,
    Cell,
    Column,
    Columns,
    Line,
    Report,
    Row,
    RowKind,
    Table,
    Tone,
    Words,
    row,
    tabled,
)
from shardwise.report.common.units import NUMBER, PERCENT, Format
from shardwise.report.diff import rows

_Item = TypeVar("_Item")
NS = Format(rows.time, "ns")
SIGNED_NS = Format(rows.signed, "ns")
CALLS = Format("{:.4g}".format)
SPEED = Format(lambda value: f"{value / 1e9:.3g} GB/s", "bytes/s")
CHANGE = Column("Change", SIGNED_NS, sums=True)


def run_report(run: RunProfile) -> Report:
    blocks: list[Block] = [_about([run]), *_words(run_words(run)), parts_table([run])]
    blocks += [*collectives_tables([run]), work_table(run), cpu_table([run]), *_cautions([run])]
    return Report(f"Where the time went: {run.label}", tuple(blocks), shared_tables([run]))


def difference_report(difference: Difference) -> Report:
    """The second against the first."""
    runs = [difference.first, difference.second]
    blocks: list[Block] = [_about(runs), *_words(difference.verdict), parts_table(runs)]
    blocks += [lines_table(difference), books_table(difference), *collectives_tables(runs)]
    blocks += [*copies_tables(difference), cpu_table(runs), *cpu_lines_tables(difference), *_cautions(runs)]
    title = f"Where the time went: {runs[1].label} against {runs[0].label}"
    return Report(title, tuple(blocks), shared_tables(runs))


def _about(runs: Sequence[RunProfile]) -> Words:
    return Words(tuple(Line(rows.about(run), lead=f"{run.label}:") for run in runs))


def _words(words: Sequence[str]) -> Iterator[Words]:
    if words:
        yield Words(tuple(map(Line, words)), "In words", boxed=True)


def _cautions(runs: Sequence[RunProfile]) -> Iterator[Words]:
    lines = tuple(
        Line(f"{line}.", Tone.CAUTION, f"{run.label}:") for run in runs for line in rows.cautions(run)
    )
    if lines:
        yield Words(lines)


def delta(ns: float) -> Cell:
    """A change: longer is worse."""
    return Cell(ns, tone=Tone.BAD if ns > 0 else Tone.GOOD if ns < 0 else Tone.PLAIN)


def cut_steps(key: str, title: str, steps: Sequence[tuple[str, Parts]], *totals: Row) -> Table:
    """(label, parts) of steps side by side: nanoseconds and share of each part; of two also what changed."""
    several = len(steps) > 1
    columns = [Column("Part of a step", wraps=True)]
    for label, _ in steps:
        columns += [Column(label, NS), Column("of the step", PERCENT, of=label if several else "")]
    body = []
    for part in parts_of(parts for _, parts in steps):
        ns = [part.ns(parts) for _, parts in steps]
        shares = [each / parts.total_ns for each, (_, parts) in zip(ns, steps, strict=True)]
        pairs = [cell for pair in zip(ns, shares, strict=True) for cell in pair]
        body.append(row(Cell(part.label, mark=f"p-{part.key}"), *pairs, *_change(ns)))
    whole = [cell for _, parts in steps for cell in (parts.total_ns, None)]
    body.append(row("step", *whole, *_change([parts.total_ns for _, parts in steps]), kind=RowKind.TOTAL))
    columns += [CHANGE] if len(steps) == 2 else []
    return Table(key, title, tuple(columns), (*body, *totals))


def parts_table(runs: Sequence[RunProfile]) -> Table:
    hidden = [cell for run in runs for cell in (run.communication_ns, _hidden(run))]
    change = _change([run.communication_ns for run in runs])
    communication = row("all communication, hidden or not", *hidden, *change, kind=RowKind.TOTAL)
    steps = [(run.label, run.parts) for run in runs]
    return cut_steps("parts", "A step of one rank, on average", steps, communication)


def _change(ns: Sequence[float]) -> list[Cell]:
    return [delta(ns[-1] - ns[0])] if len(ns) == 2 else []


def _hidden(run: RunProfile) -> Cell:
    share = run.overlap_share
    return Cell(share, None if share is None else f"{100 * share:.1f} % hidden")


def _two(difference: Difference, uses: Callable[[_Item], tuple[Use, Use]]) -> Columns[_Item]:
    """Calls and time of an item in both runs."""
    first, second = difference.first.label, difference.second.label
    return (
        (Column("calls", CALLS, of=first), lambda item: uses(item)[0].count),
        (Column(first, NS, sums=True), lambda item: uses(item)[0].ns),
        (Column("calls", CALLS, of=second), lambda item: uses(item)[1].count),
        (Column(second, NS, sums=True), lambda item: uses(item)[1].ns),
    )


def _work_uses(line: WorkLine) -> tuple[Use, Use]:
    return line.first, line.second


def _op_uses(line: tuple[str, Use, Use]) -> tuple[Use, Use]:
    return line[1], line[2]


def _work_cell(line: WorkLine) -> Cell:
    return Cell(line.what, rows.what(line), about=rows.shapes(line))


def lines_table(difference: Difference) -> Table:
    where = "the device" if difference.first.has_device else "the CPU"
    note = Line(
        f"All work on {where}, per step of one rank: by the op that called for it, its shapes and its name; "
        "what is "
        "left by op and shapes, then by name, then by kind of work.",
        Tone.QUIET,
    )
    columns: Columns[WorkLine] = (
        (Column("Work", wraps=True), _work_cell),
        *_two(difference, _work_uses),
        (CHANGE, lambda line: delta(line.delta_ns)),
        (Column("Matched by", spills=True), lambda line: line.matched.value),
    )
    title = f"What changed most, of {len(difference.lines)} lines"
    return tabled(
        difference.lines, columns, key="lines", title=title, notes=[note], sorts=True, short=16, long=60
    )


def books_table(difference: Difference) -> Table:
    columns: Columns[tuple[str, float, float]] = (
        (Column("What"), lambda line: line[0]),
        (Column(difference.first.label, NS), lambda line: line[1]),
        (Column(difference.second.label, NS), lambda line: line[2]),
        (CHANGE, lambda line: delta(line[2] - line[1])),
    )
    return tabled(rows.books(difference), columns, key="books", title="How it adds up")


def copies_tables(difference: Difference) -> Iterator[Table]:
    columns: Columns[WorkLine] = ((Column("Copy", wraps=True), _work_cell), *_two(difference, _work_uses))
    title = "Copies that one makes more often"
    if difference.copies:
        yield tabled(difference.copies, columns, key="copies", title=title, sorts=True, short=8, long=25)


def work_table(run: RunProfile) -> Table:
    columns: Columns[tuple[Work, Use]] = (
        (Column("Work", wraps=True), lambda pair: Cell(pair[0].name, rows.work_name(pair[0]))),
        (Column("calls", CALLS), lambda pair: pair[1].count),
        (Column("time", NS, sums=True), lambda pair: pair[1].ns),
        (Column("of the step", PERCENT, sums=True), lambda pair: pair[1].ns / run.step_ns),
    )
    title = "Where the time goes"
    return tabled(run.work, columns, key="work", title=title, sorts=True, short=16, long=60)


def _sides(runs: Sequence[RunProfile]) -> Iterator[tuple[RunProfile, str]]:
    """Each run with what tells the keys of its own tables apart."""
    return zip(runs, ("",) if len(runs) == 1 else ("-a", "-b"), strict=True)


def _origin(op: str, origin: str) -> Cell:
    return Cell(collective_name(op), about=f"of {origin}" if origin else "")


def _transfer(use: CollectiveUse) -> Cell:
    is_least = use.is_bound and use.transfer_ns is not None
    return Cell(use.transfer_ns, f"{'≥ ' * is_least}{rows.time(use.transfer_ns)}")


_COLLECTIVES: Columns[CollectiveUse] = (
    (Column("Collective", wraps=True), lambda use: _origin(use.op, use.origin)),
    (Column("calls", CALLS), lambda use: use.use.count),
    (Column("in it", NS, sums=True), lambda use: use.use.ns),
    (Column("before the last came", NS), lambda use: Cell(use.waiting_ns, rows.time(use.waiting_ns))),
    (Column("transfer", NS), _transfer),
    (Column("bus", SPEED), lambda use: Cell(use.bus_bytes_per_s, rows.speed(use))),
    (Column("Waited for", wraps=True, spills=True), rows.late),
)
_OF_COLLECTIVES = Line(
    "Before the last came: from a rank's entry until the last rank of the group entered. Transfer: from then "
    "on. In an "
    "all-to-all, ranks that are there early move data before: its transfer is a lower bound, its speed an "
    "upper one.",
    Tone.QUIET,
)


def collectives_tables(runs: Sequence[RunProfile]) -> Iterator[Table]:
    """Of two runs, of each its own."""
    for run, side in _sides(runs):
        title = f"Collectives{f' of {run.label}' if side else ''}, per step of one rank"
        notes = [_OF_COLLECTIVES] if run is runs[-1] else []
        if run.collectives:
            yield tabled(
                run.collectives,
                _COLLECTIVES,
                key=f"collectives{side}",
                title=title,
                notes=notes,
                sorts=True,
                short=8,
            )


def _blamed(each: SharedCollective) -> str:
    blame = each.blame
    if blame is None:
        return ""
    return f"{rows.shortened(blame.doing, 90)} ({rows.time(blame.busy_ns)} of {rows.time(blame.window_ns)})"


_SHARED: Columns[SharedCollective] = (
    (Column("Step", NUMBER), lambda each: each.step),
    (Column("Collective", wraps=True), lambda each: _origin(each.op, each.origin)),
    (Column("Ranks", NUMBER), lambda each: len(each.ranks)),
    (Column("Last rank", NUMBER), lambda each: each.last_rank),
    (Column("Longest wait", NS), lambda each: each.longest_wait_ns),
    (Column("Transfer", NS), lambda each: each.transfer_ns),
    (Column("The last one was in", wraps=True), _blamed),
)


def shared_tables(runs: Sequence[RunProfile]) -> tuple[Table, ...]:
    """Each collective of a run, on all its ranks."""
    made = []
    for run, side in _sides(runs):
        title = f"Each collective of {run.label}, on all its ranks"
        if run.sharing.collectives:
            made.append(
                tabled(run.sharing.collectives, _SHARED, key=f"each{side}", title=title, sorts=True, long=200)
            )
    return tuple(made)


_CPU: Columns[RunProfile] = (
    (Column("Run", wraps=True), lambda run: run.label),
    (Column("ops", CALLS), lambda run: run.cpu.ops.count),
    (Column("time in ops", NS), lambda run: run.cpu.ops.ns),
    (Column("launches", CALLS), lambda run: run.cpu.launches.count),
    (Column("time in launches", NS), lambda run: run.cpu.launches.ns),
)


def cpu_table(runs: Sequence[RunProfile]) -> Table:
    return tabled(runs, _CPU, key="cpu", title="The CPU, per step of one rank")


def cpu_lines_tables(difference: Difference) -> Iterator[Table]:
    columns: Columns[tuple[str, Use, Use]] = (
        (Column("Op", wraps=True), lambda line: Cell(line[0], rows.shortened(line[0], 60))),
        *_two(difference, _op_uses),
        (CHANGE, lambda line: delta(line[2].ns - line[1].ns)),
    )
    changed = [line for line in difference.cpu_lines if line[1].ns != line[2].ns]
    title = "CPU ops that changed most, without the ops inside them"
    if changed:
        yield tabled(changed, columns, key="cpu-ops", title=title, sorts=True, short=8, long=25)
