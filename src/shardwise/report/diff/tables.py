"""RunProfile and Difference -> tables and words: where the time of a step went, and what sets two runs apart."""

from collections.abc import Iterator, Sequence

from shardwise.core.difference import CollectiveUse, Difference, RunProfile, Use
from shardwise.core.difference import Line as WorkLine
from shardwise.core.parts import parts_of
from shardwise.core.waiting import SharedCollective
from shardwise.profiles.diff import run_words
from shardwise.report.common.table import (
    Cell,
    Column,
    Line,
    Report,
    Row,
    RowKind,
    Table,
    Tone,
    Words,
    numbers,
    row,
)
from shardwise.report.common.units import NUMBER, PERCENT, Format
from shardwise.report.diff import rows

NS = Format(rows.time, "ns")
SIGNED_NS = Format(rows.signed, "ns")
CALLS = Format("{:.4g}".format)
SPEED = Format(lambda value: f"{value / 1e9:.3g} GB/s", "bytes/s")
CHANGE = Column("Change", SIGNED_NS, sums=True)


def run_report(run: RunProfile) -> Report:
    blocks = [
        _about([run]), _words(run_words(run)), parts_table([run]), *collectives_tables([run]), work_table(run), cpu_table([run]),
        *_cautions([run]),
    ]  # fmt: skip
    title = f"Where the time went: {run.label}"
    return Report(title, tuple(block for block in blocks if block is not None), shared_tables([run]))


def difference_report(difference: Difference) -> Report:
    """The second against the first."""
    runs = [difference.first, difference.second]
    blocks = [
        _about(runs), _words(difference.verdict), parts_table(runs), lines_table(difference), books_table(difference),
        *collectives_tables(runs), *copies_tables(difference), cpu_table(runs), *cpu_lines_tables(difference), *_cautions(runs),
    ]  # fmt: skip
    title = f"Where the time went: {runs[1].label} against {runs[0].label}"
    return Report(title, tuple(block for block in blocks if block is not None), shared_tables(runs))


def _about(runs: Sequence[RunProfile]) -> Words:
    return Words(tuple(Line(rows.about(run), lead=f"{run.label}:") for run in runs))


def _words(words: Sequence[str]) -> Words | None:
    return Words(tuple(map(Line, words)), "In words", boxed=True) if words else None


def _cautions(runs: Sequence[RunProfile]) -> Iterator[Words]:
    lines = tuple(
        Line(f"{line}.", Tone.CAUTION, f"{run.label}:") for run in runs for line in rows.cautions(run)
    )
    if lines:
        yield Words(lines)


def delta(ns: float) -> Cell:
    """A change: longer is worse."""
    return Cell(ns, tone=Tone.BAD if ns > 0 else Tone.GOOD if ns < 0 else Tone.PLAIN)


def _by_run(runs: Sequence[RunProfile], more: str, form: Format) -> list[Column]:
    """Two columns a run: its time, and something else."""
    return [
        column
        for run in runs
        for column in (Column(run.label, NS), Column(more, form, of=run.label if len(runs) > 1 else ""))
    ]


def parts_table(runs: Sequence[RunProfile]) -> Table:
    columns = [Column("Part of a step", wraps=True), *_by_run(runs, "of the step", PERCENT)]
    body = []
    for part in parts_of(run.parts for run in runs):
        ns = [part.ns(run.parts) for run in runs]
        cells = [cell for run, each in zip(runs, ns, strict=True) for cell in (each, each / run.step_ns)]
        body.append(row(Cell(part.label, mark=f"p-{part.key}"), *cells, *_change(ns)))
    steps = [cell for run in runs for cell in (run.step_ns, None)]
    body.append(row("step", *steps, *_change([run.step_ns for run in runs]), kind=RowKind.TOTAL))
    hidden = [cell for run in runs for cell in (run.communication_ns, _hidden(run))]
    communication = [run.communication_ns for run in runs]
    body.append(row("all communication, hidden or not", *hidden, *_change(communication), kind=RowKind.TOTAL))
    columns += [CHANGE] if len(runs) > 1 else []
    return Table("parts", "A step of one rank, on average", tuple(columns), tuple(body))


def _change(ns: Sequence[float]) -> list[Cell]:
    return [delta(ns[-1] - ns[0])] if len(ns) > 1 else []


def _hidden(run: RunProfile) -> Cell:
    share = run.overlap_share
    return Cell(share, None if share is None else f"{100 * share:.1f} % hidden")


def _two(first: str, difference: Difference, *, changes: bool = True) -> tuple[Column, ...]:
    labels = (difference.first.label, difference.second.label)
    columns = [
        column
        for label in labels
        for column in (Column("calls", CALLS, of=label), Column(label, NS, sums=True))
    ]
    return (Column(first, wraps=True), *columns, *((CHANGE,) if changes else ()))


def _uses(first: Use, second: Use) -> tuple[float, float, float, float]:
    return first.count, first.ns, second.count, second.ns


def _work_cell(line: WorkLine) -> Cell:
    return Cell(line.what, rows.what(line), about=rows.shapes(line))


def lines_table(difference: Difference) -> Table:
    where = "the device" if difference.first.has_device else "the CPU"
    note = Line(
        f"All work on {where}, per step of one rank: by the op that called for it, its shapes and its name; what is left by op and shapes, "
        "then by name, then by kind of work.",
        Tone.QUIET,
    )
    body = tuple(
        row(_work_cell(line), *_uses(line.first, line.second), delta(line.delta_ns), line.matched.value)
        for line in difference.lines
    )
    columns = (*_two("Work", difference), Column("Matched by", spills=True))
    title = f"What changed most, of {len(difference.lines)} lines"
    return Table("lines", title, columns, body, (note,), sorts=True, short=16, long=60)


def books_table(difference: Difference) -> Table:
    columns = (
        Column("What"),
        Column(difference.first.label, NS),
        Column(difference.second.label, NS),
        CHANGE,
    )
    body = tuple(row(label, one, other, delta(other - one)) for label, one, other in rows.books(difference))
    return Table("books", "How it adds up", columns, body, headed=True)


def copies_tables(difference: Difference) -> Iterator[Table]:
    if not difference.copies:
        return
    body = tuple(row(_work_cell(line), *_uses(line.first, line.second)) for line in difference.copies)
    columns = _two("Copy", difference, changes=False)
    yield Table("copies", "Copies that one makes more often", columns, body, sorts=True, short=8, long=25)


def work_table(run: RunProfile) -> Table:
    columns = (
        Column("Work", wraps=True),
        Column("calls", CALLS),
        Column("time", NS, sums=True),
        Column("of the step", PERCENT, sums=True),
    )
    body = tuple(
        row(Cell(work.name, rows.work_name(work)), use.count, use.ns, use.ns / run.step_ns)
        for work, use in run.work
    )
    return Table("work", "Where the time goes", columns, body, sorts=True, short=16, long=60)


def collectives_tables(runs: Sequence[RunProfile]) -> Iterator[Table]:
    """Of two runs, of each its own."""
    names = ("",) if len(runs) == 1 else ("-a", "-b")
    return (collectives_table(run, name) for run, name in zip(runs, names, strict=True) if run.collectives)


def collectives_table(run: RunProfile, name: str) -> Table:
    columns = (
        Column("Collective", wraps=True),
        Column("calls", CALLS),
        Column("in it", NS, sums=True),
        *numbers(NS, "before the last came", "transfer"),
        Column("bus", SPEED),
        Column("Waited for", wraps=True, spills=True),
    )
    note = Line(
        "Before the last came: from a rank's entry until the last rank of the group entered. Transfer: from then on. In an all-to-all, ranks "
        "that are there early move data before: its transfer is a lower bound, its speed an upper one.",
        Tone.QUIET,
    )
    whose = f" of {run.label}" if name else ""
    title = f"Collectives{whose}, per step of one rank"
    return Table(
        f"collectives{name}",
        title,
        columns,
        tuple(map(_collective, run.collectives)),
        (note,),
        sorts=True,
        short=8,
    )


def _collective(use: CollectiveUse) -> Row:
    is_least = use.is_bound and use.transfer_ns is not None
    return row(
        Cell(rows.collective_name(use.op), about=f"of {use.origin}" if use.origin else ""),
        use.use.count,
        use.use.ns,
        Cell(use.waiting_ns, rows.time(use.waiting_ns)),
        Cell(use.transfer_ns, f"{'≥ ' * is_least}{rows.time(use.transfer_ns)}"),
        Cell(use.bus_bytes_per_s, rows.speed(use)),
        rows.late(use),
    )


def shared_tables(runs: Sequence[RunProfile]) -> tuple[Table, ...]:
    """Each collective of a run, on all its ranks."""
    sides = ("",) if len(runs) == 1 else ("-a", "-b")
    return tuple(
        shared_table(run, side) for run, side in zip(runs, sides, strict=True) if run.sharing.collectives
    )


def shared_table(run: RunProfile, side: str) -> Table:
    columns = (
        Column("Step", NUMBER),
        Column("Collective", wraps=True),
        *numbers(NUMBER, "Ranks", "Last rank"),
        *numbers(NS, "Longest wait", "Transfer"),
        Column("The last one was in", wraps=True),
    )
    body = tuple(map(_shared, run.sharing.collectives))
    return Table(
        f"each{side}",
        f"Each collective of {run.label}, on all its ranks",
        columns,
        body,
        sorts=True,
        long=200,
    )


def _shared(each: SharedCollective) -> Row:
    blame = each.blame
    doing = (
        f"{rows.shortened(blame.doing, 90)} ({rows.time(blame.busy_ns)} of {rows.time(blame.window_ns)})"
        if blame
        else ""
    )
    collective = Cell(rows.collective_name(each.op), about=f"of {each.origin}" if each.origin else "")
    return row(
        each.step, collective, len(each.ranks), each.last_rank, each.longest_wait_ns, each.transfer_ns, doing
    )


def cpu_table(runs: Sequence[RunProfile]) -> Table:
    columns = (
        Column("Run", wraps=True),
        Column("ops", CALLS),
        Column("time in ops", NS),
        Column("launches", CALLS),
        Column("time in launches", NS),
    )
    body = tuple(row(run.label, *_uses(run.cpu.ops, run.cpu.launches)) for run in runs)
    return Table("cpu", "The CPU, per step of one rank", columns, body)


def cpu_lines_tables(difference: Difference) -> Iterator[Table]:
    changed = [line for line in difference.cpu_lines if line[1].ns != line[2].ns]
    if not changed:
        return
    body = tuple(
        row(Cell(name, rows.shortened(name, 60)), *_uses(one, other), delta(other.ns - one.ns))
        for name, one, other in changed
    )
    title = "CPU ops that changed most, without the ops inside them"
    yield Table("cpu-ops", title, _two("Op", difference), body, sorts=True, short=8, long=25)
