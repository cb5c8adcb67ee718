"""Models, plans and machines -> tables. Names and figures are given; nothing here looks them up."""

from collections.abc import Iterable, Sequence

from shardwise.core.machine import Constant, Machine
from shardwise.core.sample import Calibration
from shardwise.report.common.page import draw
from shardwise.report.common.table import Column, Columns, Line, Report, Table, Words, tabled
from shardwise.report.common.units import PERCENT, Format

_WHOLE = Format("{:,}".format)
_TERA = Format(lambda value: f"{value / 1e12:,.0f}", "FLOP/s")
_TERABYTES = Format(lambda value: f"{value / 1e12:.2f}", "bytes/s")
_GIGABYTES = Format(lambda value: f"{value / 1e9:g}", "bytes")


def named_table(pairs: Iterable[tuple[str, str]], what: str, key: str) -> Table:
    """Names, and what each is."""
    columns: Columns[tuple[str, str]] = (
        (Column(what), lambda pair: pair[0]),
        (Column("about", wraps=True), lambda pair: pair[1]),
    )
    return tabled(pairs, columns, key=key)


def models_table(models: Iterable[tuple[str, int, int, int, str, int]]) -> Table:
    """(name, parameters, layers, hidden, heads / KV heads, vocabulary) of each."""
    columns: Columns[tuple[str, int, int, int, str, int]] = (
        (Column("model"), lambda each: each[0]),
        (Column("parameters", _WHOLE), lambda each: each[1]),
        (Column("layers", _WHOLE), lambda each: each[2]),
        (Column("hidden", _WHOLE), lambda each: each[3]),
        (Column("heads/KV"), lambda each: each[4]),
        (Column("vocabulary", _WHOLE), lambda each: each[5]),
    )
    return tabled(models, columns, key="models")


def machines_table(machines: Sequence[tuple[Machine, float | None]]) -> Table:
    """Each with its peak in bfloat16, where it has one."""
    columns: Columns[tuple[Machine, float | None]] = (
        (Column("machine"), lambda pair: pair[0].name),
        (Column("devices per node", _WHOLE), lambda pair: pair[0].devices_per_node),
        (Column("bfloat16 peak TFLOP/s", _TERA), lambda pair: pair[1]),
        (Column("memory GB", _GIGABYTES), lambda pair: pair[0].memory_bytes),
        (Column("TB/s", _TERABYTES), lambda pair: pair[0].memory_bytes_per_s),
        (Column("error", PERCENT), lambda pair: pair[0].error),
        (Column("about", wraps=True), lambda pair: pair[0].about),
    )
    return tabled(machines, columns, key="machines")


def calibration_report(done: Calibration) -> Report:
    """A machine as it was measured."""
    notes = tuple(Line(note) for note in done.notes)
    return Report(done.machine.name, (calibration_table(done), Words(notes, items=True)))


def calibration_html(done: Calibration) -> str:
    """The page of a machine as it was measured."""
    constants = calibration_table(done)
    return draw("lists/calibration.html.j2", machine=done.machine, constants=constants, notes=done.notes)


def calibration_table(done: Calibration) -> Table:
    """All constants but the curves, which are long."""
    columns: Columns[Constant] = (
        (Column("what", wraps=True), lambda each: each.path),
        (Column("value", wraps=True), lambda each: f"{each.value} {each.unit}"),
        (Column("where it comes from", wraps=True, spills=True), lambda each: each.source),
    )
    constants = done.machine.constants
    single = [each for each in constants if not each.path.endswith(".points")]
    curves = len(constants) - len(single)
    told = Line(f"and {curves} curves over bytes: kernels, fresh memory, collectives.")
    title = f"{done.machine.name}: {len(done.samples)} samples"
    return tabled(single, columns, key="constants", title=title, notes=[told])
