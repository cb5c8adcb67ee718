"""How long `shardwise search` takes, start to finish, and how near its answer is to the best: from one
node to 16,384 devices.

    python -m benchmarks.search           all; writes benchmarks/results/DATE-search-speed.json
    python -m benchmarks.search 70b       those whose name has this in it; prints, writes nothing

Each search is a process of its own, run once, without the proof; a search ends after its --seconds with
the best so far and the gap. The memory of it and of those that trace for it is read five times a second: Pss
of /proc/PID/smaps_rollup, in which a page that n processes share counts as 1/n of it in each."""

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import psutil

from benchmarks.results import command_line, now
from benchmarks.search_results import SearchRun, SearchSpeed, told

ASKED = (
    ("8B, tp=8: styles, recompute, micro-batches", "--model llama3-8b --fix tp=8 --batch 128", 10.0),
    ("8B on 8 devices, all free", "--model llama3-8b --devices 8 --batch 128", None),
    ("8B on 128 devices, all free", "--model llama3-8b --devices 128 --batch 512", None),
    ("8B on 2,048 devices, all free", "--model llama3-8b --devices 2048 --batch 4096", None),
    ("8B on 16,384 devices, all free", "--model llama3-8b --devices 16384 --batch 16384", None),
    ("70B on 64 devices, all free", "--model llama3-70b --devices 64 --batch 512", 60.0),
    ("70B on 1,024 devices, all free", "--model llama3-70b --devices 1024 --batch 2048", 60.0),
    ("405B on 16,384 devices, all free", "--model llama3.1-405b --devices 16384 --batch 16384", 90.0),
)
LIMIT_S = 600


def main(arguments: Sequence[str] = ()) -> int:
    """Runs the searches; returns the exit code."""
    chosen = [each for each in ASKED if not arguments or arguments[0].lower() in each[0].lower()]
    started, began = now(), time.monotonic()
    runs = tuple(run(*each) for each in chosen)
    speed = SearchSpeed(
        command_line("benchmarks.search"),
        started.isoformat(timespec="seconds"),
        time.monotonic() - began,
        runs,
    )
    print(told(runs))
    if not arguments:
        print(f"wrote {speed.write()}; now run python -m benchmarks.tables")
    return 0


def run(name: str, options: str, bar_s: float | None) -> SearchRun:
    words = ["search", *options.split(), "--dtype", "bfloat16", "--random-ids", "--no-verify", "--json"]
    began = time.monotonic()
    command = [sys.executable, "-m", "shardwise", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        memory = Memory(process.pid)
        try:
            told, _ = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
            memory.end()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds = time.monotonic() - began
    found = json.loads(told)
    best = found["found"][0] if found["found"] else None
    gap = float(found["gap"]) if not isinstance(found["gap"], str) else None  # "Infinity"
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(
        f"{name}: {seconds:.1f} s, {f'gap {gap:.1%}' if best and gap is not None else 'nothing in time'}",
        flush=True,
    )
    return SearchRun(
        name,
        f"shardwise {' '.join(words)}",
        seconds,
        bar_s,
        found["candidates"],
        found["traces"],
        found["predicted"],
        gap if best else None,
        best["step_s"] if best else None,
        largest,
        memory.all_bytes,
        memory.largest_bytes,
    )


class Memory:
    """Of a process and all below it, at the peak, as a thread reads it until end()."""

    def __init__(self, pid: int) -> None:
        self.all_bytes = self.largest_bytes = 0
        self._process, self._ended = psutil.Process(pid), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            sizes = list(self._sizes())
            self.all_bytes = max(self.all_bytes, sum(sizes))
            self.largest_bytes = max(self.largest_bytes, *sizes, 0)

    def _sizes(self) -> Iterator[int]:
        try:
            family = [self._process, *self._process.children(recursive=True)]
        except psutil.Error:
            return
        for each in family:
            try:
                yield each.memory_full_info().pss
            except psutil.Error:  # it has ended
                continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
