"""What `shardwise launcher` writes for torchrun, run as two hosts that are one machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.e2e.command import PATIENCE_S, shardwise
from tests.matrix import FULL

MODEL = "llama3-debug?n_layers=2,vocab_size=256"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@FULL
def test_two_hosts_meet_and_one_of_them_tells_that_the_plan_is_right(tmp_path: Path) -> None:
    asked = ["rowwise", "--model", MODEL, "--mesh", "tp=2", "--device", "cpu", "--hosts", "2"]
    asked += ["--command", "verify", "--port", str(free_port()), "--max-restarts", "0", "--out", "."]
    assert shardwise("launcher", *asked, cwd=tmp_path).returncode == 0
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    hosts = [
        subprocess.Popen(
            ["bash", "shardwise.sh", "127.0.0.1"],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for _ in range(2)
    ]
    try:
        told = [host.communicate(timeout=PATIENCE_S)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], told
    assert sum("Right: outputs, loss, all 21 gradients" in text for text in told) == 1
