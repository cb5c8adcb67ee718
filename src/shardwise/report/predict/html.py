"""PredictionRun -> one HTML page. Computes nothing but the widths of bars."""

from collections.abc import Sequence

from shardwise.core.mesh import Mesh
from shardwise.core.prediction import MemoryForecast, Prediction
from shardwise.core.prediction_run import PredictionRun
from shardwise.report.common.chart import Chart, Part, Stack, chart
from shardwise.report.common.page import draw
from shardwise.report.common.units import BYTES, SECONDS
from shardwise.report.predict import rows, tables

SHEETS = ("explain/explain.css", "predict/predict.css")


def prediction_html(run: PredictionRun) -> str:
    first = run.predictions[0]
    memory, limit = memory_chart(run.predictions)
    return draw(
        "predict/predict.html.j2",
        SHEETS,
        run=run,
        rows=rows,
        tables=tables,
        flagged=rows.launch_bound(run),
        terms=term_chart(run.predictions),
        term_rows=rows.term_rows(run.predictions),
        memory=memory,
        limit=limit,
        assumed=rows.assumptions(run.settings, first.setup, Mesh(first.axes), run.machine),
    )


def term_chart(predictions: Sequence[Prediction]) -> Chart:
    """A bar per plan, all on one scale, so that a shorter step is shorter."""
    terms = rows.term_rows(predictions)
    stacks = []
    for index, prediction in enumerate(predictions):
        parts = tuple(
            Part(f"t-{each.term.name.lower()}", each.term.value, each.seconds[index])
            for each in terms
            if each.seconds[index] > 0
        )
        stacks.append(Stack(rows.plan_name(prediction), parts, SECONDS.text(prediction.step_s)))
    return chart(stacks, SECONDS, scale=max(prediction.step_s for prediction in predictions))


def memory_chart(predictions: Sequence[Prediction]) -> tuple[Chart, float]:
    """A bar per plan, and where the line of the capacity stands, in percent."""
    scale = max(
        max(prediction.memory.capacity_bytes, prediction.memory.device_bytes) for prediction in predictions
    )
    stacks = [
        Stack(
            rows.plan_name(prediction),
            tuple(_memory_parts(prediction.memory)),
            BYTES.text(prediction.memory.device_bytes),
        )
        for prediction in predictions
    ]
    return chart(stacks, BYTES, scale=scale), 100 * predictions[0].memory.capacity_bytes / scale


def _memory_parts(memory: MemoryForecast) -> list[Part]:
    """Kinds at the peak, then what the allocator and the process hold beside them."""
    kinds = [Part(f"m-{key}", label, n_bytes) for key, label, n_bytes in rows.memory_rows(memory)]
    beside = [
        Part("m-allocator", "allocator", memory.slack_bytes),
        Part("m-process", "process", memory.device_bytes - memory.reserved_bytes),
    ]
    return [*kinds, *(part for part in beside if part.value > 0)]
