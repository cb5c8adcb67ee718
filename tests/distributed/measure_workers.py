"""What ranks do in test_measure_ranks.py."""

import msgspec
import torch

from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.launch import RankContext
from shardwise.measure.subject import Subject
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.step.build import device_mesh

TINY = ModelSpec("tiny", LlamaConfig(257, 96, 2, 12, 4, 160), "")


def both(context: RankContext, payload: bytes) -> bytes:
    """What park and alone give, in one launch."""
    return msgspec.json.encode([park(context), alone(context)])


def park(context: RankContext) -> tuple[list[float], list[float], int]:
    """Losses of a subject that is parked between its steps, those of one that isn't, and the bytes that
    storages held while parked."""
    mesh = device_mesh(Mesh.parse("tp=2"), context.device.type)
    ids = torch.arange(48).view(2, 24)
    batch = [(ids, ids + 1)]
    subjects = [
        Subject(TINY, builtin_plan("rowwise"), mesh, StepSettings(2, 24), context.device) for _ in range(2)
    ]
    held = 0
    for subject in subjects:
        subject.first_step(batch)
    for _ in range(3):
        subjects[0].park()
        held += sum(tensor.untyped_storage().nbytes() for tensor in subjects[0]._kept_tensors())
        subjects[0].unpark()
        for subject in subjects:
            subject.timed_step(batch)
    return subjects[0].losses, subjects[1].losses, held


def alone(context: RankContext) -> list[float]:
    """Times of modules alone, and whether that changed anything in the model."""
    mesh = device_mesh(Mesh.parse("tp=2"), context.device.type)
    ids = torch.arange(48).view(2, 24)
    times = []
    for plan in ("routed", "rowwise@dtensor"):
        subject = Subject(TINY, builtin_plan(plan), mesh, StepSettings(2, 24), context.device)
        subject.first_step([(ids, ids + 1)])
        before = [parameter.detach().clone() for parameter in subject.model.parameters()]
        for name in ("tok_embeddings", "layers.1.attention", "layers.0.attention_norm", "output"):
            subject.take_alone(name, (ids, ids + 1))
            times.append(subject.timed_module())
        for old, new in zip(before, subject.model.parameters(), strict=True):
            assert torch.equal(getattr(old, "_local_tensor", old), getattr(new, "_local_tensor", new))
    return times
