"""The sweep over Hugging Face types as data, its file, and the tables of docs/hugging-face.md. No torch, no
processes."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from benchmarks.results import RESULTS, Saved, newest

WHAT = "hf-explain"


class Answer(StrEnum):
    YES = "yes"
    NO = "no"
    NO_PLAN = "no plan"


@dataclass(frozen=True, slots=True)
class Step:
    """An explained step of one rank, counted. unknown: (name, count) of the ops that the catalogue doesn't
    know.

    sharded: share of the model's parameters of which the rank keeps a part only.
    """

    ops: int
    flops: int
    unknown: tuple[tuple[str, int], ...]
    collectives: int
    wire_bytes: float
    sharded: float


@dataclass(frozen=True, slots=True)
class Row:
    """One type. `model`: as a command names the form that was tried. step, plan_step: unsharded and under
    plan `hf`, where explained.

    The reasons are a line each, empty where the answer isn't no; `note`: why it isn't simply two layers.
    """

    model_type: str
    model: str
    note: str
    parameters: int | None
    explained: Answer
    reason: str
    step: Step | None
    under_its_plan: Answer
    plan_reason: str
    plan_step: Step | None
    seconds: float

    @property
    def is_whole(self) -> bool:
        """Explained unsharded, and under its plan where it has one."""
        return self.explained is Answer.YES and self.under_its_plan is not Answer.NO


@dataclass(frozen=True, slots=True)
class Sweep(Saved):
    """A run over types, and what it ran with."""

    command: str
    started: str
    dtype: str
    tp: int
    batch: int
    seq: int
    versions: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    what: str = WHAT
    schema_version: int = 2


def newest_sweep(folder: Path = RESULTS) -> Sweep:
    """Raises FileNotFoundError where there is none."""
    return newest(Sweep, WHAT, folder)


def summary(sweep: Sweep) -> str:
    """Counts in a sentence or two."""
    rows = sweep.rows
    explained = sum(row.explained is Answer.YES for row in rows)
    planned = [
        row for row in rows if row.explained is Answer.YES and row.under_its_plan is not Answer.NO_PLAN
    ]
    under_plan = sum(row.under_its_plan is Answer.YES for row in planned)
    steps = [step for row in rows for step in (row.step, row.plan_step) if step is not None]
    ops, unknown = sum(step.ops for step in steps), sum(count for step in steps for _, count in step.unknown)
    return (
        f"Of the {len(rows)} causal language model types, {explained} are explained unsharded. "
        f"{len(planned)} of these have a tensor-parallel plan of their own, and {under_plan} are explained "
        f"under it too. {sum(row.is_whole for row in rows)} are explained both ways, or have no plan. Of "
        f"{ops:,} ops in all these steps the catalogue doesn't know {unknown:,}."
    )


def blocks(sweep: Sweep) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    versions = dict(sweep.versions)
    source = f"\nSource: `benchmarks/results/{sweep.day}-{sweep.what}.json`, made by `{sweep.command}`.\n"
    about = (
        f"\nRun: {sweep.dtype}, batch {sweep.batch}, sequence {sweep.seq}, tp {sweep.tp}; torch "
        f"{versions['torch']}, transformers {versions['transformers']}. Parameters are of the form that "
        "was tried; ops are those of the unsharded step, collectives those of a rank "
        "under its plan.\n"
    )
    made = {
        WHAT: summary(sweep) + "\n\n" + _types_table(sweep.rows) + about + source,
        f"{WHAT}-misses": _misses_table([row for row in sweep.rows if not row.is_whole]) + source,
        f"{WHAT}-forms": _forms_table([row for row in sweep.rows if row.note]) + source,
    }
    return {f"benchmark-{name}": text for name, text in made.items()}


def _types_table(rows: tuple[Row, ...]) -> str:
    cells = [
        [
            row.model_type,
            "" if row.parameters is None else f"{row.parameters / 1e6:,.0f}",
            _answer(row.explained),
            _answer(row.under_its_plan),
            "" if row.plan_step is None else f"{row.plan_step.sharded:.1%}",
            "" if row.plan_step is None else f"{row.plan_step.collectives}",
            "" if row.step is None else f"{row.step.ops:,}",
            ", ".join(
                sorted(
                    {
                        name.removeprefix("aten::")
                        for step in (row.step, row.plan_step)
                        if step
                        for name, _ in step.unknown
                    }
                )
            ),
        ]
        for row in rows
    ]
    head = [
        "type",
        "parameters, M",
        "explained",
        "under its plan",
        "sharded by it",
        "collectives",
        "ops",
        "unknown ops",
    ]
    return table(head, cells, numbers=(1, 4, 5, 6))


def _misses_table(rows: list[Row]) -> str:
    return table(["type", "where", "reason"], [[row.model_type, *_miss(row)] for row in rows])


def _miss(row: Row) -> tuple[str, str]:
    return (
        ("unsharded", cell(row.reason))
        if row.explained is Answer.NO
        else ("under its plan", cell(row.plan_reason))
    )


def _forms_table(rows: list[Row]) -> str:
    return table(["tried as", "why"], [[f"`{cell(row.model)}`", cell(row.note)] for row in rows])


def _answer(answer: Answer) -> str:
    return f"**{answer}**" if answer is Answer.NO else str(answer)


def cell(text: str) -> str:
    """Text of others inside a table: no mark-up of its own."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def table(head: list[str], rows: list[list[str]], numbers: tuple[int, ...] = ()) -> str:
    rule = ["---:" if index in numbers else "---" for index in range(len(head))]
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rows))
