"""Where in a model and a step each span of a profile stands: the module whose forward or backward it belongs
to, and the pass.

In a forward that is the innermost range `module: NAME` around it (measure/profile.py writes them); in a
backward the module in whose forward the running autograd node was made, by the node's sequence number, which
the profiler writes beside both. A device's span stands where its launch did. What no range and no node says
stays NONE.
"""

import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardwise.core.timeline import NONE, Pass, SpanKind, Spans

_MODULE = "module: "
_NODE = "autograd::engine::"
_STEP = re.compile(r"ProfilerStep#\d{1,9}$")
_UNSET = -2
_MOST_DEEP = 256


@dataclass(frozen=True, slots=True)
class Nodes:
    """Columns, one row a span: an op's or an autograd node's sequence number, and the thread of the forward
    that made the node (0 or NONE: it is no node's)."""

    sequence: NDArray[np.int64]
    forward_thread: NDArray[np.int64]


def with_places(spans: Spans, names: tuple[str, ...], nodes: Nodes) -> tuple[Spans, tuple[str, ...]]:
    """The spans with their modules and passes, and the names with those of the modules."""
    number = {name: at for at, name in enumerate(names)}
    module_of = np.full(len(names), _UNSET, np.int64)
    for at, name in enumerate(names):
        if name.startswith(_MODULE):
            module_of[at] = number.setdefault(name.removeprefix(_MODULE), len(number))
    is_node = (spans.kind == SpanKind.OP) & (nodes.forward_thread > 0)
    called = np.where(spans.kind == SpanKind.RANGE, module_of[spans.name], _UNSET)
    parent = spans.parent.astype(np.int64)
    module = _inherited(called, parent)
    if is_node.any():
        called[is_node] = _made_in(module, spans, nodes, is_node)
        module = _inherited(called, parent)
    known = np.where(module == _UNSET, NONE, module).astype(np.int32)
    passes = _passes(spans, names, is_node, parent)
    return replace(spans, module=known, step_pass=passes), tuple(number)


def _inherited(own: NDArray[np.int64], parent: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each span's own value, else that of the nearest span around it that has one."""
    open_ = np.flatnonzero(own == _UNSET)
    if len(open_) == len(own):
        return own
    found = own.copy()
    up = parent[open_]
    for _ in range(_MOST_DEEP):
        inside = up != NONE
        open_, up = open_[inside], up[inside]
        if not len(open_):
            break
        found[open_] = own[up]
        further = own[up] == _UNSET
        open_, up = open_[further], parent[up[further]]
    return found


def _made_in(
    module: NDArray[np.int64], spans: Spans, nodes: Nodes, is_node: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """For each node the module in whose forward it was made; NONE where that isn't known. Of the ops that
    were told a number before it was given to a node, the last one made it."""
    makers = np.flatnonzero((nodes.sequence >= 0) & ~is_node & (spans.kind == SpanKind.OP))
    wanted = nodes.sequence[is_node]
    if not len(makers):
        return np.full(len(wanted), NONE, np.int64)
    makers = makers[np.lexsort((spans.start_ns[makers], nodes.sequence[makers]))]
    made = nodes.sequence[makers]
    at = np.searchsorted(made, wanted, side="right") - 1
    of_node = makers[np.maximum(at, 0)]
    known = (at >= 0) & (made[np.maximum(at, 0)] == wanted) & (module[of_node] != _UNSET)
    return np.where(known, module[of_node], NONE)


def _passes(
    spans: Spans, names: tuple[str, ...], is_node: NDArray[np.bool_], parent: NDArray[np.int64]
) -> NDArray[np.int8]:
    """NONE for all where no backward is known."""
    runs = np.array([name.startswith(_NODE) for name in names], np.bool_)[spans.name]
    own = np.where(is_node | (runs & (spans.kind == SpanKind.OP)), int(Pass.BACKWARD), _UNSET)
    found = _inherited(own.astype(np.int64), parent)
    backward = found == Pass.BACKWARD
    if not backward.any():
        return np.full(len(spans), NONE, np.int8)
    passes = np.where(backward, int(Pass.BACKWARD), int(Pass.FORWARD)).astype(np.int8)
    at_ns = np.where(spans.launched_ns == NONE, spans.start_ns, spans.launched_ns)
    on_cpu = spans.kind >= SpanKind.OP
    ends_ns = spans.end_ns[backward & on_cpu]
    marked = np.array([_STEP.search(name) is not None for name in names], np.bool_)
    marks = np.flatnonzero(marked[spans.name] & (spans.kind == SpanKind.RANGE))
    bounds = [(int(spans.start_ns[mark]), int(spans.end_ns[mark])) for mark in marks]
    for begin, end in bounds or [(int(at_ns.min()), int(at_ns.max()) + 1)]:
        inside = ends_ns[(ends_ns >= begin) & (ends_ns <= end)]
        if len(inside):
            passes[(at_ns >= inside.max()) & (at_ns < end) & ~backward] = Pass.END
    return passes
