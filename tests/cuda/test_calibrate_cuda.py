"""calibrate on GPUs that are there: everything is timed, nothing fails, attention included, and the file is
read again."""

import json
from pathlib import Path

import pytest
import torch

from shardwise.files.machine_file import machine_from_toml
from tests.e2e.command import shardwise

GPUS = torch.cuda.device_count()


@pytest.mark.skipif(GPUS < 1, reason="no GPU on this machine")
def test_a_quick_calibration_times_every_kernel_of_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.toml"
    ended = shardwise("calibrate", "--quick", "--device", "cuda", "--out", str(out), "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["failed"] == []
    machine = machine_from_toml(out.read_text(), "gpu")
    matmul, attention = machine.matmul("bfloat16"), machine.attention("bfloat16")
    assert matmul is not None
    assert attention is not None
    assert matmul.units > 1
    assert matmul.peak_flops > 1e12
    assert not machine.launch.unknown
    assert 0 < (machine.launch.forward_s or 0) < 1e-3
    assert 0 < (machine.launch.collective_s or 0) < 5e-3
    assert machine.within.is_known == (GPUS > 1)
