"""What the ranks of test_made_plans.py run beside proofs: checkpoints of made plans."""

import json
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.plan import Plan
from shardwise.launch import RankContext
from shardwise.models.model_source import ModelSource
from shardwise.models.source import find_model
from shardwise.parallel.apply import parallelize
from tests.distributed.own_modules_workers import AT_TP_2, Subject, checkpoints, meshes_of_four, shaken


def small_one(name: str) -> ModelSource:
    """Of a large model the twin that four ranks can cut."""
    source = find_model(name)
    return source.small(4) or source


def subject(name: str, plans: dict[str, str]) -> Subject:
    """plans: TOML by tp size."""

    def unsharded(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return shaken(small_one(name).build(dtype=torch.float64, device="cpu"))

    def sharded(mesh: DeviceMesh, seed: int) -> nn.Module:
        return parallelize(unsharded(seed), Plan.from_toml(plans[str(mesh["tp"].size())]), mesh)

    return Subject(name, unsharded, sharded)


def run(context: RankContext, payload: bytes) -> bytes:
    """On four ranks. payload: a folder for checkpoints, and of each model its plans by tp size."""
    folder, plans = json.loads(payload)
    meshes = meshes_of_four()
    answer = {}
    for name, by_tp in plans.items():
        context.note(name)
        answer[name] = checkpoints(subject(name, by_tp), meshes, Path(folder), AT_TP_2[:1])
    return json.dumps(answer).encode()
