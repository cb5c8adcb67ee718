"""Subject: what a walk-through can be about, read from its file `subjects/KIND/NAME.toml`: a kind of module
under a style.

A file says what the style is given, along which of its dims each tensor is cut, what its collectives send,
and, step by step, a title and words. Words name what is read from the record in braces; reader.py knows these
names. A step `like = "KIND/NAME"` is told as that one's is; of several steps of one kind in a phase each is
called KIND-PART. Who adds a file adds a walk-through. Imports no torch.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.resources import files
from typing import Any

from shardwise.core.collective import CollectiveKind
from shardwise.core.errors import OptionError
from shardwise.core.plan import Style, suggest
from shardwise.core.rule import ModuleKind
from shardwise.core.walkthrough import Phase, Role, StepKind


class Cut(StrEnum):
    """How the ranks have a tensor cut: by rows (tokens, or a parameter's own) or by columns (features)."""

    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True, slots=True)
class Wire:
    """What a style's collective sends in a phase. role: how its blocks came to be where they are sent from.

    formula: bytes that one rank sends, of b, s, H, V, T and x bytes an element; is_bound: the data decides,
    and this is the most (averaged over the ranks).
    """

    collective: CollectiveKind
    role: Role
    formula: str
    is_bound: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """One step of a subject: what is shown, its title and words, and the collective of an exchange."""

    phase: Phase
    kind: StepKind
    title: str
    words: str
    wire: Wire | None = None
    part: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """name: "KIND/NAME". place: its turn among all. module: what a Llama calls such a module. keeps: a rank's
    part of the parameter. style: None for what no plan's style does. cut: of `parameter`, `input` and
    `output`; a tensor that isn't there is whole on every rank, and a gradient is cut as what it is of."""

    name: str
    place: int
    title: str
    remember: str
    module: str
    keeps: str
    style: Style | None
    cut: Mapping[str, Cut]
    steps: tuple[Told, ...]

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    def told(self, phase: Phase, kind: StepKind, part: str = "") -> Told:
        return next(step for step in self.steps if (step.phase, step.kind, step.part) == (phase, kind, part))

    def wires(self, phase: Phase) -> tuple[Wire, ...]:
        """The collectives of a phase; one that is issued several times counts once."""
        wires = (step.wire for step in self.steps if step.phase is phase)
        return tuple(wire for wire in wires if wire is not None)

    def wire(self, phase: Phase) -> Wire | None:
        """The one collective of a phase; None where nothing is sent."""
        return next(iter(self.wires(phase)), None)


@cache
def subjects() -> dict[str, Subject]:
    """All walk-throughs that there are, by name, the simplest first."""
    tables = {
        f"{folder.name}/{file.name.removesuffix('.toml')}": tomllib.loads(file.read_text(encoding="utf-8"))
        for folder in files(__package__).joinpath("subjects").iterdir()
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    }
    read = [_subject(name, table, tables) for name, table in tables.items()]
    return {subject.name: subject for subject in sorted(read, key=lambda subject: subject.place)}


def subject_named(name: str) -> Subject:
    """Raises OptionError for a name that no subject has."""
    if name not in subjects():
        raise OptionError(
            f'walk-through "{name}" is unknown.{suggest(name, subjects())} Allowed: {", ".join(subjects())}.'
        )
    return subjects()[name]


def subject_of(kind: ModuleKind, style: Style) -> Subject | None:
    """The walk-through of a kind of module under a style, if there is one; placements make no difference to
    it."""
    for subject in subjects().values():
        own = subject.style
        is_same = own is not None and (own.name, own.ownership) == (style.name, style.ownership)
        if is_same and subject.kind == kind:
            return subject
    return None


def _subject(name: str, table: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> Subject:
    return Subject(
        name=name,
        place=table["place"],
        title=table["title"],
        remember=" ".join(table["remember"].split()),
        module=table["module"],
        keeps=table["keeps"],
        style=Style.from_value(table["style"]) if "style" in table else None,
        cut={tensor: Cut(dim) for tensor, dim in table.get("cut", {}).items()},
        steps=tuple(_told(phase, kind, name, tables) for phase in Phase for kind in table.get(phase, ())),
    )


def _told(phase: Phase, kind: str, name: str, tables: Mapping[str, Mapping[str, Any]]) -> Told:
    step = tables[name][phase][kind]
    if "like" in step:
        return _told(phase, kind, step["like"], tables)
    wire = None
    if "collective" in step:
        collective, role = CollectiveKind(step["collective"]), Role(step["role"])
        wire = Wire(collective, role, step["sends"], step.get("is_bound", False))
    called, _, part = kind.partition("-")
    return Told(phase, StepKind(called), step["title"], " ".join(step["words"].split()), wire, part)
