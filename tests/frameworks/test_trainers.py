"""Trainers of others train what one process does with a plan of ours: the recipes of docs/frameworks.md."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def losses(*command: str) -> tuple[list[float], list[float]]:
    """(sharded, of one process)"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("LOSSES ")]
    assert done.returncode == 0, done.stderr[-3000:]
    sharded, whole = json.loads(told[0].removeprefix("LOSSES "))
    return sharded, whole


def need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} isn't installed: make test-frameworks")


def test_lightning_s_model_parallel_strategy_trains_what_one_process_does() -> None:
    need("lightning")
    sharded, whole = losses("-m", "tests.frameworks.lightning_recipe")
    assert sharded == pytest.approx(whole, rel=1e-5)
    assert whole[-1] != whole[0]


def test_accelerate_trains_what_one_process_does() -> None:
    need("accelerate")
    start = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    sharded, whole = losses(*start, "-m", "tests.frameworks.accelerate_recipe")
    assert sharded == pytest.approx(whole, rel=1e-5)
