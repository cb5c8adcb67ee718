"""A predicted step as the trace of a run that takes just that long: what Kineto would write of it."""

import re
from pathlib import Path
from typing import Any

from shardwise.core.program import LOSS_MODULE
from shardwise.core.timeline import SpanKind
from shardwise.predict.layout import Layout
from shardwise.predict.timeline import timeline_of
from tests.unit.chrome_trace import event, kernel, launch, step, write

_TENSOR = re.compile(r"\[[\d, ]*\]")
_CALLED = {"all_gather": "_allgather_base", "reduce_scatter": "_reduce_scatter_base"}


def write_run(layout: Layout, folder: Path) -> Path:
    """A file for each of two ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    events = _events(layout)
    for rank in (0, 1):
        write(folder / f"rank{rank}.json", events, rank=rank, world_size=layout.mesh.world_size)
    return folder


def _events(layout: Layout) -> list[dict[str, Any]]:
    timeline = timeline_of(layout)
    spans, collectives = timeline.spans, timeline.collectives
    row_of = {int(span): row for row, span in enumerate(collectives.span)}
    forward, backward = len(layout.busiest.forward), len(layout.busiest.backward)
    device = [span for span in range(len(spans)) if spans.kind[span] <= SpanKind.COPY]
    made = [step(0, 0, float(spans.end_ns.max()) / 1e3)]
    for number, span in enumerate(device):
        issued = int(spans.parent[span])
        begin, end = spans.start_ns[issued] / 1e3, spans.end_ns[issued] / 1e3
        long = max(end - begin, 0.01)
        module, _, op = timeline.name(issued).rpartition(": ")
        if forward <= number < forward + backward:
            node = {"Sequence number": 10**6 + number, "Fwd thread id": 1}
            made.append(
                event("cpu_op", "autograd::engine::evaluate_function: Backward0", begin, long, args=node)
            )
        if module and module != LOSS_MODULE:
            made.append(event("user_annotation", f"module: {module}", begin, long))
        shapes = "" if span in row_of else timeline.names[int(spans.shapes[span])]
        dims = [[int(size) for size in each[1:-1].split(",") if size] for each in _TENSOR.findall(shapes)]
        made.append(event("cpu_op", op, begin, long, args={"Input Dims": dims}))
        made.append(launch(begin + long - 0.002, number + 1, for_us=0.001))
        at, took = spans.start_ns[span] / 1e3, (spans.end_ns[span] - spans.start_ns[span]) / 1e3
        args: dict[str, Any] = {}
        if span in row_of:
            n = int(collectives.elements[row_of[span]])
            args = {
                "Collective name": _CALLED.get(op, op.replace("_", "")),
                "In msg nelems": n,
                "Out msg nelems": n,
                "dtype": "BFloat16",
                "Process Group Name": "0",
                "Process Group Ranks": "[0, 1]",
            }
        name = f"ncclDevKernel_{op}" if args else f"kernel of {op}"
        made.append(kernel(name, at, took, stream=20 if args else 7, correlation=number + 1, args=args))
    return made
