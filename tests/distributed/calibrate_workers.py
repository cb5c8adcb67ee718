"""What ranks do in test_calibrate_ranks.py."""

from dataclasses import replace

import msgspec
import torch

from shardwise.calibrate import kernels
from shardwise.calibrate.case import Case, Draw, Work
from shardwise.calibrate.ranks import CalibrateJob, measure
from shardwise.launch import RankContext

GOOD = kernels.matmul(64, 64, 64, "float32", "tn")


def _fails(error: Exception) -> Case:
    def make(draw: Draw) -> Work:
        raise error

    return replace(GOOD, variant=type(error).__name__, make=make)


def _fails_when_called() -> Case:
    def make(draw: Draw) -> Work:
        x = torch.ones(2, 3)
        return Work(lambda: x @ x, (x, x), (x,))

    return replace(GOOD, variant="called", make=make)


def failing(context: RankContext, payload: bytes) -> bytes:
    """Good kernels among such that fail in several ways."""
    cases = [
        GOOD,
        _fails(RuntimeError("no such\nkernel")),
        _fails(MemoryError()),
        _fails_when_called(),
        kernels.batched_matmul(2, 8, 8, 8, "float32"),
    ]
    return msgspec.json.encode(measure(context, CalibrateJob(quick=True, kernels_s=30.0), cases))


def hurried(context: RankContext, payload: bytes) -> bytes:
    """No time for kernels."""
    return msgspec.json.encode(measure(context, CalibrateJob(quick=True, kernels_s=0.0), [GOOD] * 7))
