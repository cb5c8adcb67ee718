"""What the documents say of searches' times and memory, and of what others published as their best, is made
of results files. And what a process and those below it hold is read while they run."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import published_results, search_results
from benchmarks.published_best_results import Pick, Row, Run, newest_blocks, reason, told
from benchmarks.search import Memory
from benchmarks.search_results import SearchRun
from shardwise.report.common.units import format_seconds
from tests.e2e.command import PATIENCE_S

RUN = SearchRun("8B", "shardwise search", 12.0, 10.0, 8, 47, 37, 0.0, 20.9, 2**27)
OURS = Pick("fsdp=8", 10.0, 40 * 2.0**30, (("matmul", 8.0), ("pipeline bubble", 2.0)), 0.05)
THEIRS = replace(OURS, label="tp=8", step_s=12.0, terms=(("matmul", 8.1), ("pipeline bubble", 3.9)))
ROW = Row("8B, 8 H100", "a source", "tp=8", "13.1 s", "shardwise search", OURS, THEIRS, "")


def test_memory_has_columns_once_it_was_measured_and_a_miss_says_so() -> None:
    assert "all processes" not in search_results.told([RUN])
    measured = replace(RUN, all_bytes=2**31, largest_process_bytes=2**29)
    text = search_results.told([measured])
    assert "| all processes (bar: 1.50 GiB) | the largest |" in text
    assert "| 2.00 GiB, missed | 512 MiB |" in text


def test_a_search_that_found_nothing_in_time_says_so() -> None:
    text = search_results.told([replace(RUN, gap=None, step_s=None)])
    assert "| unknown | none in time |" in text


def test_the_memory_of_a_process_and_of_its_child_is_read_while_they_run() -> None:
    hold = "data = bytearray(64 * 2**20); input()"
    parent = f"import subprocess, sys; {hold.split(';')[0]}; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE) as process:
        memory, until = Memory(process.pid), time.monotonic() + PATIENCE_S
        while memory.all_bytes < 128 * 2**20 and time.monotonic() < until:
            time.sleep(0.05)
        assert process.stdin is not None
        process.stdin.close()
    memory.end()
    assert memory.all_bytes >= 128 * 2**20
    assert 64 * 2**20 <= memory.largest_bytes < 128 * 2**20


def test_theirs_stands_beside_ours_with_the_terms_that_differ(tmp_path: Path) -> None:
    run = Run("python -m it", "2026-01-01T00:00:00", 120.0, (ROW,))
    assert "| 8B, 8 H100 | tp=8 | 13.1 s |  | 12.0 s | fsdp=8 | 10.0 s | 1.20 | 5% |" in told(run)
    assert list(reason(ROW)) == [
        "**8B, 8 H100**: by our prediction theirs takes 20 % longer (1.90 s more pipeline bubble), with 40.0 "
        "GiB of a device where our pick has 40.0 GiB."
    ]
    known = replace(published_results.newest_run().rows[0], measured_s=13.1, gpus=8)
    as_run = replace(ROW, measured="13.10 s")
    text = told(replace(run, rows=(as_run,)), [known, replace(known, gpus=64)])
    assert f"| 13.10 s | {format_seconds(known.predicted_s)} | 12.0 s |" in text
    run.write(tmp_path)
    assert "each search was given 120 s" in newest_blocks(tmp_path)["benchmark-published-best"]
    assert newest_blocks(tmp_path / "none") == {}


def test_what_is_within_a_tenth_needs_no_reason_and_what_can_not_be_says_why() -> None:
    assert not list(reason(replace(ROW, their_pick=replace(THEIRS, step_s=10.9))))
    (faster,) = reason(replace(ROW, their_pick=replace(THEIRS, step_s=8.0, terms=(("matmul", 6.0),))))
    assert "shorter: our search hadn't come to it when its time was over" in faster
    (absent,) = reason(replace(ROW, their_pick=None, why_not="no plan fits"))
    assert absent.endswith("theirs can't be by our prediction: no plan fits")
    (late,) = reason(replace(ROW, our_pick=None))
    assert "our search had found nothing when its time was over" in late
    run = Run("python -m it", "2026-01-01T00:00:00", 120.0, (replace(ROW, our_pick=None),))
    assert "| 12.0 s | none in time |  |  |  |" in told(run)
