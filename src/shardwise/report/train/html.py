"""The page of a Training: its words, and the curve of its loss."""

from collections.abc import Iterable
from dataclasses import dataclass

from shardwise.core.training import Training
from shardwise.report.common.page import draw
from shardwise.report.common.scale import Scale, Tick, ticks
from shardwise.report.common.units import Unit
from shardwise.report.train.tables import headline, restarts_table, told_lines, train_report, validated_table

_UNIT = (Unit("", 1.0), Unit("k", 1e3), Unit("M", 1e6))
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """Percent of the width and the height, from the upper left corner. line: of the loss of each step;
    held_out: of the held-out text, with how each reads; restarts: where ranks were started anew."""

    line: str
    held_out: tuple[tuple[float, float, str], ...]
    restarts: tuple[tuple[float, str], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def train_html(run: Training) -> str:
    return draw(
        "train/train.html.j2",
        ("train/train.css",),
        run=run,
        report=train_report(run),
        headline=tuple(headline(run)),
        curve=curve_of(run),
        validated=validated_table(run) if run.validated else None,
        restarts=restarts_table(run) if run.restarts else None,
        told=tuple(told_lines(run.told)),
    )


def curve_of(run: Training) -> Curve | None:
    """None for fewer than two steps, or for losses that can't be drawn."""
    if len(run.curve) < 2:
        return None
    losses = [*(loss for _, loss in run.curve), *(each.loss for each in run.validated)]
    x, y = Scale.over([0.0, float(run.curve[-1][0])]), Scale.over(losses)

    def place(step: float, loss: float) -> Point:
        return x.at(step), 100 - y.at(loss)

    return Curve(
        _path(place(step, loss) for step, loss in run.curve),
        tuple((*place(each.step, each.loss), f"{each.loss:.4f} at {each.step:,}") for each in run.validated),
        tuple((x.at(each.step), each.why) for each in run.restarts),
        tuple(ticks(x, _UNIT)),
        tuple(Tick(100 - tick.at, tick.text) for tick in ticks(y, _UNIT)),
    )


def _path(points: Iterable[Point]) -> str:
    """SVG's, of a picture 100 wide and 100 high."""
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
