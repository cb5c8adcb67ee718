"""PredictionRun -> one HTML file that needs no network; the rules of report/page.py hold. Computes nothing but the widths of bars.

Bars are plain elements; every number is in the page as text. The page's script only sorts tables.
"""

from collections.abc import Sequence

import jinja2
from markupsafe import Markup

from shardwise.core.prediction import MemoryForecast, Prediction
from shardwise.core.prediction_run import PredictionRun
from shardwise.report.common import units
from shardwise.report.common.page import csp_hash, page_environment, template_source
from shardwise.report.common.plain import name, sentence
from shardwise.report.explain.html import LEAST_PERCENT, Bar, Chart, Key, Segment
from shardwise.report.predict import rows


def prediction_html(run: PredictionRun) -> str:
    """The whole page."""
    environment = predict_environment()
    memory, limit = memory_chart(run.predictions)
    return environment.get_template("predict/predict.html.j2").render(
        run=run,
        waits=run.launch_bound or ((),) * len(run.predictions),
        terms=term_chart(run.predictions),
        term_rows=rows.term_rows(run.predictions),
        memory=memory,
        limit=limit,
        levels=rows.levels_side_by_side(run.predictions),
        **page_parts(environment),
    )


def predict_environment() -> jinja2.Environment:
    environment = page_environment()
    environment.globals.update(
        rows=rows,
        name=name,
        sentence=sentence,
        seconds=units.format_seconds,
        bytes=units.format_bytes,
        count=units.format_count,
        ratio=units.format_ratio,
    )
    return environment


def page_parts(environment: jinja2.Environment) -> dict[str, Markup]:
    """Style and script, and the script's name for the page's policy."""
    script = template_source(environment, "common/page.js")
    css = "".join(
        template_source(environment, sheet)
        for sheet in ("common/page.css", "common/bars.css", "explain/explain.css", "predict/predict.css")
    )
    return {"css": Markup(css), "script": Markup(script), "script_hash": Markup(csp_hash(script))}


def term_chart(predictions: Sequence[Prediction]) -> Chart:
    """A bar per plan, all on one scale, so that a shorter step is shorter."""
    found = [row for row in rows.term_rows(predictions) if any(row.seconds)]
    longest = max(prediction.step_s for prediction in predictions)
    bars = tuple(
        Bar(
            name(prediction.plan, "(no plan)"),
            tuple(
                Segment(
                    f"t-{row.term.name.lower()}",
                    row.term.value,
                    units.format_seconds(row.seconds[index]),
                    percent(row.seconds[index], longest),
                )
                for row in found
                if row.seconds[index] > 0
            ),
            units.format_seconds(prediction.step_s),
        )
        for index, prediction in enumerate(predictions)
    )
    return Chart(bars, tuple(Key(f"t-{row.term.name.lower()}", row.term.value) for row in found))


def memory_chart(predictions: Sequence[Prediction]) -> tuple[Chart, float]:
    """A bar per plan, and where the line of the capacity stands, in percent."""
    scale = max(
        max(prediction.memory.capacity_bytes, prediction.memory.device_bytes) for prediction in predictions
    )
    keys: dict[str, str] = {}
    bars = []
    for prediction in predictions:
        parts = _memory_parts(prediction.memory)
        keys |= {style: label for style, label, _ in parts}
        segments = tuple(
            Segment(style, label, units.format_bytes(size), percent(size, scale))
            for style, label, size in parts
        )
        bars.append(
            Bar(
                name(prediction.plan, "(no plan)"),
                segments,
                units.format_bytes(prediction.memory.device_bytes),
            )
        )
    limit = 100 * predictions[0].memory.capacity_bytes / scale
    return Chart(tuple(bars), tuple(Key(style, label) for style, label in keys.items())), limit


def _memory_parts(memory: MemoryForecast) -> list[tuple[str, str, float]]:
    """(style, label, bytes): kinds at the peak, then what the allocator and the process hold beside them."""
    kinds = [(f"m-{key}", label, n_bytes) for key, label, n_bytes in rows.memory_rows(memory)]
    beside = [
        ("m-allocator", "allocator", memory.reserved_bytes - memory.active_bytes),
        ("m-process", "process", memory.device_bytes - memory.reserved_bytes),
    ]
    return [*kinds, *(part for part in beside if part[2] > 0)]


def percent(value: float, of: float) -> float:
    """A width that is seen where there is anything at all."""
    return max(LEAST_PERCENT, 100 * value / of) if of and value else 0.0
