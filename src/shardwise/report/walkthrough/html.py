"""Explained walk-throughs -> one HTML file that needs no network: every step is in the page as text and
tables, and its script only chooses which one is seen. So it prints as a whole, and reads without a script.
The rules of report/page.py hold: escaped text, a content security policy that lets just this script run.
Computes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from shardwise.core.walkthrough import Content, Matrix, Role, Row
from shardwise.report.common.page import csp_hash, page_environment, template_source
from shardwise.report.walkthrough.terminal import format_value
from shardwise.walkthrough.words import Explained, ExplainedMatrix, ExplainedStep

# lines of large type (32 pixels) under a step's words on a screen of 900 pixels; what a matrix has above its
# rows; what a wire takes
ROOMY_LINES = 15
HEADING_LINES = 2
WIRE_LINES = 3


@dataclass(frozen=True, slots=True)
class Key:
    """What the colours and patterns of a step mean: a class name of walkthrough.css and words."""

    style: str
    text: str


def walkthrough_html(walkthroughs: Sequence[Explained]) -> str:
    """The page, with a tab for each walk-through; `#embedding/rowwise/5` opens step 5 of that one."""
    environment = page_environment()
    own = {
        "value": format_value,
        "row_class": _row_class,
        "cell_class": _cell_class,
        "keys": _keys,
        "peer": _peer,
        "is_roomy": _is_roomy,
        "is_wide": _is_wide,
    }
    script = template_source(environment, "walkthrough/walkthrough.js")
    groups: dict[str, list[Explained]] = {}
    for explained in walkthroughs:
        groups.setdefault(explained.group, []).append(explained)
    return environment.get_template("walkthrough/walkthrough.html.j2", globals=own).render(
        groups=groups,
        walkthroughs=walkthroughs,
        css=Markup(template_source(environment, "walkthrough/walkthrough.css")),
        script=Markup(script),
        script_hash=Markup(csp_hash(script)),
    )


def _row_class(row: Row, explained: ExplainedMatrix, rank: int | None) -> str:
    """The row's role, and the colour of its owner; where rows have none, of the rank that it comes from."""
    matrix = explained.matrix
    # a rank's answer that a row isn't its own has no colour
    if matrix.column_owners or row.role in (Role.ZERO, Role.UNTOUCHED, Role.IGNORED):
        return str(row.role)
    owner = row.owner if row.owner is not None else _comes_from(matrix, rank)
    return str(row.role) if owner is None else f"{row.role} o{owner}"


def _comes_from(matrix: Matrix, rank: int | None) -> int | None:
    """The rank whose numbers a block on its way is made of."""
    match matrix.content:
        case Content.SENT | Content.PARTIAL:
            return rank
        case Content.RECEIVED:
            return matrix.peer
        case _:
            return None


def _cell_class(index: int, row: Row, explained: ExplainedMatrix) -> str:
    owners = explained.matrix.column_owners
    return f"o{owners[index]}" if owners and row.role not in (Role.ZERO, Role.UNTOUCHED) else ""


def _peer(explained: ExplainedMatrix) -> str:
    """The rank at the other end of the wire; "sum" for what arrives added up."""
    matrix = explained.matrix
    if matrix.peer is not None:
        return str(matrix.peer)
    return "sum" if matrix.content is Content.SUM else "all"


def _is_roomy(step: ExplainedStep) -> bool:
    """Whether a step fits a screen of 1200 x 900 pixels in large type."""
    wire = WIRE_LINES if step.wire else 0
    return (
        max(
            _lines(panel.holds, len(step.panels)) + _lines(panel.gets, len(step.panels))
            for panel in step.panels
        )
        + wire
        <= ROOMY_LINES
    )


def _is_wide(step: ExplainedStep) -> bool:
    """Whether the unsharded module's tensor is too wide to stand beside those of the ranks."""
    return any(
        _large_width(matrix) > 1200 / len(step.panels)
        for panel in step.panels
        if panel.rank is None
        for matrix in panel.holds
    )


def _lines(matrices: tuple[ExplainedMatrix, ...], panels: int) -> int:
    """Lines of large type that matrices take in one of `panels` panels beside each other."""
    heights = [len(matrix.matrix.rows) + HEADING_LINES for matrix in matrices]
    fits = sum(map(_large_width, matrices)) <= 1200 / panels - 40
    return (max(heights, default=0) if fits else sum(heights)) + (1 if heights else 0)


def _large_width(explained: ExplainedMatrix) -> float:
    """Pixels: a character of 19.5 pixels is 11 wide, a cell has 18 beside it, a matrix 45."""
    cells = [[len(format_value(number)) for number in row.values] for row in explained.matrix.rows]
    widest = [max(lengths) for lengths in zip(*cells, strict=True)]
    labels = max(map(len, explained.row_labels), default=0)
    return float(11 * labels + sum(11 * length + 18 for length in widest) + 45)


def _keys(step: ExplainedStep, ranks: int) -> list[Key]:
    matrices = [matrix.matrix for panel in step.panels for matrix in (*panel.holds, *panel.gets)]
    rows = [row for matrix in matrices for row in matrix.rows]
    by_column = any(matrix.column_owners for matrix in matrices)
    by_row = any(row.owner is not None for row in rows)
    if step.wire and not by_row and not by_column:
        return [Key(f"o{rank}", f"comes from rank {rank}") for rank in range(ranks)]
    what = "column" if by_column else "row"
    owned = by_row or by_column
    keys = [Key(f"o{rank}", f"a {what} of rank {rank}'s") for rank in range(ranks) if owned]
    roles = {row.role for row in rows}
    if Role.ZERO in roles:
        keys.append(Key("zero", "not its own"))
    if Role.UNTOUCHED in roles:
        keys.append(Key("untouched", "zeros: no token had this id"))
    return keys
