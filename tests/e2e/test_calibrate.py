"""`shardwise calibrate` as a user meets it: the file, JSON, bad input, Ctrl-C."""

import json
import os
import signal
from pathlib import Path

import msgspec
import pytest

from shardwise.core.collective import TIMED
from shardwise.core.sample import Sample
from shardwise.files.machine_file import machine_from_toml
from tests.e2e.command import PATIENCE_S, gone, ranks_of, shardwise, start, wait_for_line
from tests.matrix import FULL


def test_a_quick_calibration_of_two_ranks_writes_a_file_that_is_read_again(tmp_path: Path) -> None:
    out, samples = tmp_path / "here.toml", tmp_path / "here.json"
    ended = shardwise(
        "calibrate",
        "--quick",
        "--ranks",
        "2",
        "--device",
        "cpu",
        "--name",
        "here",
        "--out",
        str(out),
        "--samples",
        str(samples),
        "--json",
    )
    assert ended.returncode == 0, ended.stderr
    machine = machine_from_toml(out.read_text(), "here")
    assert (machine.name, machine.device, machine.devices_per_node) == ("here", "cpu", 2)
    assert "2 ranks" in machine.about
    document = json.loads(ended.stdout)
    assert [each["path"] for each in document["constants"]] == [each.path for each in machine.constants]
    assert document["failed"] == []
    assert "Measured with --quick" in document["notes"][0]
    written = msgspec.json.decode(samples.read_bytes())
    kept = msgspec.convert(written["samples"], tuple[Sample, ...])
    assert len(kept) == document["sample_count"]
    # how many kernels there was time for is the machine's to say; the telling ones come first, and the rest
    # has no limit
    assert {each.what for each in kept} >= {"matmul", "launch", *map(str, TIMED)}
    assert "left)" in ended.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["here.json", "here.toml"]


@FULL  # what it says: test_calibrate_notes.py; what it takes of a base: test_fit.py
def test_one_rank_says_that_it_has_measured_no_link_and_takes_a_bases(tmp_path: Path) -> None:
    ended = shardwise(
        "calibrate", "--quick", "--ranks", "1", "--device", "cpu", "--base", "h100-sxm-80gb", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    said = "Collectives were not measured, one rank having nobody to talk to; the links are taken from"
    assert said in " ".join(ended.stdout.split())
    machine = machine_from_toml((tmp_path / "machine.toml").read_text())
    assert machine.within.is_known
    assert all(
        each.source.startswith("not measured, taken from")
        for each in machine.constants
        if each.path.startswith("links.within")
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--device", "gpu"), '--device is "gpu". Did you mean "cpu"? Allowed: auto, cpu, cuda.'),
        (
            ("--ranks", "0"),
            "Invalid value for '--ranks': Input should be greater than or equal to 1. "
            "Try: shardwise calibrate --help.",
        ),
        (("--name", " "), "--name is empty. Give the machine a name."),
        (("--out", "."), ". is a folder. Name a file to write."),
        (
            ("--out", "none/here.toml"),
            "none/here.toml: there is no folder none. Make it, or name another file.",
        ),
        (("--base", "h10-sxm"), 'unknown machine "h10-sxm".'),
    ],
)
def test_bad_input_ends_with_2_and_one_line_before_anything_is_measured(
    given: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    ended = shardwise("calibrate", *given, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"shardwise: {said}")
    assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@FULL  # compare shows it of the same launch
def test_ctrl_c_ends_with_130_and_leaves_no_rank_and_no_file(tmp_path: Path) -> None:
    running = start("calibrate", "--ranks", "2", "--device", "cpu", cwd=tmp_path)
    wait_for_line(running, "(0 of ")
    ranks = ranks_of(running)
    assert len(ranks) == 2
    os.kill(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130
    assert "stopped by Ctrl-C; no rank was left behind." in said
    assert gone(ranks)
    assert not list(tmp_path.iterdir())
