"""What `shardwise launcher` writes for torchrun, run as two hosts that are one machine."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.e2e.command import PATIENCE_S, children_of, shardwise, wait_until
from tests.matrix import FULL

MODEL = "llama3-debug?n_layers=2,vocab_size=256"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def on_two_hosts(
    folder: Path, *asked: str, meanwhile: Callable[[list[subprocess.Popen[str]]], None] = lambda hosts: None
) -> list[str]:
    """What both said; both end well."""
    given = ["launcher", "rowwise", "--model", MODEL, "--device", "cpu", "--hosts", "2", *asked]
    made = shardwise(*given, "--port", str(free_port()), "--out", ".", cwd=folder)
    assert made.returncode == 0, made.stderr
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    hosts, logs = [], []
    for name in ("a", "b"):
        with (folder / name).open("w") as log:
            hosts.append(
                subprocess.Popen(
                    ["bash", "shardwise.sh", "127.0.0.1"],
                    cwd=folder,
                    env={**os.environ, "PATH": path},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
    try:
        meanwhile(hosts)
        codes = [host.wait(timeout=PATIENCE_S) for host in hosts]
    finally:
        for host in hosts:
            for child in children_of(host):
                child.kill()
            host.kill()
        logs = [(folder / name).read_text() for name in ("a", "b")]
    assert codes == [0, 0], logs
    return logs


@FULL
def test_two_hosts_meet_and_one_of_them_tells_that_the_plan_is_right(tmp_path: Path) -> None:
    told = on_two_hosts(tmp_path, "--mesh", "tp=2", "--command", "verify", "--max-restarts", "0")
    assert sum("Right: outputs, loss, all 21 gradients" in text for text in told) == 1


@FULL
def test_a_rank_that_is_killed_costs_a_run_on_two_hosts_nothing(tmp_path: Path) -> None:
    """All ranks of both are started anew, and the losses are those of one host that nothing disturbs, to the
    last bit."""
    add = "--steps 12 --save-every 2 --no-verify --held-out 4 --out run"
    asked = ("--mesh", "tp=2", "--batch", "2", "--seq", "32", "--add", add)

    def kills_one(hosts: list[subprocess.Popen[str]]) -> None:
        steps = tmp_path / "run" / "steps.jsonl"
        wait_until(lambda: steps.exists() and len(steps.read_text().splitlines()) >= 5)
        ranks = [child for child in children_of(hosts[1]) if "train" in child.cmdline()]
        min(ranks, key=lambda child: len(child.children())).kill()

    told = "".join(on_two_hosts(tmp_path, *asked, meanwhile=kills_one))
    assert "exitcode: -9" in told
    whole = tmp_path / "undisturbed"
    whole.mkdir()
    given = ("--model", MODEL, "--device", "cpu", *asked[: asked.index("--add")], *add.split())
    assert shardwise("train", "rowwise", *given, cwd=whole).returncode == 0
    losses = [losses_of(folder / "run") for folder in (whole, tmp_path)]
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]


def losses_of(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "steps.jsonl").read_text().splitlines()]
