"""Every verb's report in a terminal of any width: no line is wider, no label lost, no word broken, however
long the names in it are. And the other formats hold the same tables."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from rich.cells import cell_len
from rich.console import Console

from shardwise.cli.main import run
from shardwise.core.program import StageShare
from shardwise.core.sample import Calibration
from shardwise.predict.machines import load_machine
from shardwise.profiles.diff import diff
from shardwise.report.common.deliver import show
from shardwise.report.common.formats import format_named, formats, terminal
from shardwise.report.common.layout import ELLIPSIS, HEAD_LINES, NAME_LINES, fitted, fitted_head, lay_out
from shardwise.report.common.plain import plain
from shardwise.report.common.room import room_of
from shardwise.report.common.table import ABSENT, Cell, Column, Report, RowKind, Table, Words
from shardwise.report.common.units import TEXT
from tests.matrix import thinned
from tests.unit import comparison_example as compared
from tests.unit import explanation_example as explained
from tests.unit import plan_example as planned
from tests.unit import prediction_example as predicted
from tests.unit import search_example as searched
from tests.unit import test_verify_report as verified
from tests.unit.test_predict_sweep import point, sweep_of
from tests.unit.test_profile_diff import A, B, profiled

with TemporaryDirectory() as folder:
    RUN, OTHER_RUN = (
        profiled(Path(folder) / label[:1], label, [made]) for label, made in (("a/long_name", A), ("B", B))
    )
STAGES = tuple(
    StageShare(stage, ((10 * stage, 10), (40 + 10 * stage, 11)), 123_456_789, 987_654_321, 12)
    for stage in range(4)
)
CALIBRATED = Calibration(
    load_machine("h100-sxm-80gb"),
    8,
    (),
    (),
    ("Measured with --quick: a few sizes of each. Predictions by this file are rough.",),
)
RESULTS = {
    "compare": compared.example(),
    "compare on cuda": compared.cuda_example(),
    "compare one module": compared.module_only_example(),
    "diff": diff(RUN, OTHER_RUN),
    "diff of one run": RUN,
    "explain": explained.explanation(),
    "explain dtensor": explained.dtensor_example(),
    "explain alone": explained.alone_example(),
    "explain against": explained.contrast_example(),
    "explain a stage": replace(explained.explanation(), stages=STAGES),
    "calibrate": CALIBRATED,
    "plan": planned.made(),
    "plan of a user's model": planned.made(planned.FUSED),
    "dims": planned.found(planned.NORMED),
    "dims beside a plan": planned.found(planned.LLAMA, "rowwise"),
    "predict": predicted.run_of(),
    "predict two plans": predicted.two_plans(),
    "predict sweep": sweep_of(point(300), point(200, plan="colwise"), point(900, memory=predicted.TOO_MUCH)),
    "search": searched.search(),
    "search with a gap": searched.with_gap(),
    "search stopped": searched.stopped(),
    "search without an answer": searched.nothing_fits(),
    "verify": verified.run(
        *(each for each in (verified.RIGHT, verified.WRONG, verified.CRASH, verified.LITTLE))
    ),
    "verify one": verified.run(verified.WRONG),
    "verify static": verified.run(*verified.STATIC),
}
WORD = re.compile(r"\w+")

each_result = pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS.keys())


def drawn(result: object, width: int, *, no_color: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=no_color, force_terminal=not no_color)
    show(result, "terminal", console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def texts(report: Report) -> Iterator[str]:
    """All that a report says."""
    for block in report.blocks:
        yield block.title
        if isinstance(block, Words):
            yield from (f"{line.lead} {line.text}" for line in block.lines)
            continue
        table = block.cut(block.short)
        yield from (column.name for column in table.columns if block.headed)
        for row in table.rows:
            yield from (f"{line.lead} {line.text}" for line in row.below)
            for cell, column in zip(row.cells, table.columns, strict=row.kind is not RowKind.HEADING):
                yield cell.read(column)
                yield cell.about
        yield from (f"{note.lead} {note.text}" for note in table.notes)


@pytest.mark.parametrize("width", thinned((80, 100, 200), lambda width: width == 80))
@each_result
def test_no_line_is_wider_than_the_terminal_and_no_word_is_broken(result: object, width: int) -> None:
    text = drawn(result, width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    said = set(WORD.findall(" ".join(plain(each) for each in texts(room_of(result).report(result)))))
    assert said - set(WORD.findall(text)) == set()


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("command", ["models", "plans", "machines"])
def test_what_there_is_to_choose_from_fits(
    command: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    whole = listed(command, capsys)
    monkeypatch.setenv("COLUMNS", str(width))
    text = listed(command, capsys)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert set(WORD.findall(whole)) - set(WORD.findall(text)) == set()


def listed(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        run([command])
    assert not ended.value.code
    return capsys.readouterr().out


LABEL = "made for hf:Qwen/Qwen3-30B-A3B-Instruct-2507?num_hidden_layers=2 at tp=8"
MODULE = "language_model.layers.*.self_attention_with_rotary.query_key_value_projection.base_layer"
KERNEL = "void_at_native_vectorized_elementwise_kernel_CUDAFunctor_add_float_std_array_char_3"


def lengthened(table: Table) -> Table:
    """The same table of plans, modules and kernels with long names."""
    labels = {column.of for column in table.columns} - {""}

    def column(each: Column) -> Column:
        name, of = (f"{part} {LABEL}" if part in labels else part for part in (each.name, each.of))
        return replace(each, name=name, of=of)

    def cell(each: Cell, column: Column) -> Cell:
        text = each.read(column)
        is_name = column.format is TEXT and " " not in text and len(text) > 2
        return replace(each, text=f"{text}.{MODULE}_{KERNEL}") if is_name else each

    rows = tuple(
        row if row.kind is RowKind.HEADING else replace(row, cells=tuple(map(cell, row.cells, table.columns)))
        for row in table.rows
    )
    title = f"{table.title} {LABEL}" if table.title else ""
    return replace(table, title=title, columns=tuple(map(column, table.columns)), rows=rows)


def filled(table: Table) -> Iterator[Column]:
    """Columns that have something to tell: a terminal leaves out the others."""
    for index, column in enumerate(table.columns):
        cells = (row.cells[index] for row in table.rows if row.kind is not RowKind.HEADING)
        if any(cell.read(column) not in ("", ABSENT) for cell in cells):
            yield column


@pytest.mark.parametrize("width", thinned((60, 80, 120), lambda width: width == 60))
@each_result
def test_long_names_of_plans_modules_and_kernels_lose_no_column_and_no_word(
    result: object, width: int
) -> None:
    for table in map(lengthened, room_of(result).report(result).tables()):
        console = Console(file=io.StringIO(), width=width, no_color=True)
        console.print(terminal.drawn(table, width))
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        assert max(cell_len(line) for line in text.splitlines()) <= width, table.key
        heads = (column.name for column in filled(table) if table.headed and LABEL not in column.name)
        assert set(WORD.findall(" ".join(heads))) - set(WORD.findall(text)) == set(), table.key
        whole = [[each.name for each in table.columns]]
        whole += [[c.read(h) for c, h in zip(row.cells, table.columns, strict=False)] for row in table.rows]
        for part in lay_out(table, whole, width):
            assert part.columns[0] == 0, table.key


def test_a_long_name_is_shortened_in_its_middle_and_a_sentence_never_is() -> None:
    assert fitted("layers.*.attention.wq", 12) == ["layers.*.", "attention.wq"]
    assert fitted(f"{MODULE}_{KERNEL}", 20)[0] == "language_model."
    shortened = fitted(f"{MODULE}_{KERNEL}", 20)
    assert len(shortened) == NAME_LINES
    assert "".join(shortened).count(ELLIPSIS) == 1
    assert shortened[-1].endswith("array_char_3")
    sentence = "Each rank has a part of every sequence. " * 5
    assert " ".join(fitted(sentence.strip(), 20)) == sentence.strip()
    assert fitted_head("calls", 5) == ["calls"]
    assert len(fitted_head(LABEL, 10)) == HEAD_LINES
    assert fitted_head(LABEL, 12) == ["made for", "hf:Qwe…yers=", "2 at tp=8"]


@each_result
def test_without_colour_the_report_is_the_same_text(result: object) -> None:
    coloured = drawn(result, 80, no_color=False)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == drawn(result, 80)
    assert "\x1b" not in drawn(result, 80)


@each_result
def test_a_csv_file_has_every_row_and_the_head_names_each_column(result: object) -> None:
    room = room_of(result)
    files = format_named("csv").files(room, result)
    tables = list(room.report(result).tables())
    assert list(files) == [f"tables/{table.key}.csv" for table in tables]
    for content, table in zip(files.values(), tables, strict=True):
        head, *rows = csv.reader(io.StringIO(content.decode()))
        assert len(rows) == sum(row.kind is not RowKind.HEADING for row in table.rows)
        assert {len(row) for row in rows} <= {len(head)}
        assert all(any(column.name in name for name in head) for column in table.without_bars().columns)


@each_result
def test_markdown_has_a_line_for_each_row_of_each_table(result: object) -> None:
    room = room_of(result)
    blocks = [block for block in room.report(result).blocks if isinstance(block, Table)]
    (content,) = format_named("markdown").files(room, result).values()
    lines = [line for line in content.decode().splitlines() if line.startswith("| ")]
    assert len(lines) == sum(2 + len(table.cut(table.short).rows) for table in blocks)


def test_the_formats_are_the_modules_that_there_are() -> None:
    assert {"csv", "html", "json", "markdown", "terminal"} <= set(formats())


def test_a_name_that_looks_like_a_formula_or_markup_stays_text() -> None:
    hostile = verified.run(verified.RIGHT, replace(verified.WRONG, model="=HYPERLINK(1)<b>|*x*"))
    room = room_of(hostile)
    assert "'=HYPERLINK(1)" in format_named("csv").files(room, hostile)["tables/cases.csv"].decode()
    (content,) = format_named("markdown").files(room, hostile).values()
    assert r"=HYPERLINK(1)&lt;b&gt;\|\*x\*" in content.decode()


def test_a_format_that_there_is_not_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for asked, said in (
        (["--format", "papyrus"], '--format is "papyrus".'),
        (["--format", "csv", "--json"], "--json and --format csv don't go together. Leave one out."),
    ):
        with pytest.raises(SystemExit):
            run(["verify", "rowwise", *asked])
        assert said in capsys.readouterr().err
