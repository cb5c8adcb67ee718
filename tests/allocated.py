"""What PyTorch's CPU allocator handed out and took back while a profiler watched."""

from collections.abc import Iterable, Iterator
from typing import Any


def begin_and_peak(profiler: Any, name: str) -> tuple[int, int]:
    """Bytes that lived when the record_function `name` began, and the most that lived during it, of those
    handed out since the profiler began."""
    results = profiler.profiler.kineto_results
    assert results is not None
    events = list(_all(results.experimental_event_tree()))
    whole = next(event for event in events if event.name == name)
    start, stop = whole.start_time_ns, whole.end_time_ns
    blocks: dict[int, int] = {}
    live = peak = begin = 0
    for event in sorted(
        (event for event in events if event.name == "[memory]"), key=lambda event: event.start_time_ns
    ):
        if event.start_time_ns > stop:
            break
        block = event.extra_fields
        live -= blocks.pop(block.ptr, 0)
        if block.alloc_size > 0:
            blocks[block.ptr] = block.alloc_size
            live += block.alloc_size
        if event.start_time_ns < start:
            begin = peak = live
        else:
            peak = max(peak, live)
    return begin, peak


def _all(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _all(event.children)
