"""Which mutants of axis_mutants.py are harmful: a plain script. It shares nothing with shardwise.verify.

Both models get the same random weights, by name. One process computes the mean cross-entropy of the global
batch, its gradients, and clips them by their norm, as torch does; the mutant's step does what it does.
Harmful is a step that raises, and one whose loss, or any gradient, before clipping and after, gathered whole
on every rank, is off by more than 1e-6 of the one process' (float64).
"""

from collections.abc import Iterator
from functools import cache
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from benchmarks.axis_mutants import BATCH, SEQ, VOCAB, AxisMutant
from benchmarks.mutant_oracle import WRONG, Truth
from shardwise.models.specs import ModelSpec
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep

CPU = torch.device("cpu")
IGNORED = -100
# far below the norms of these models, so that everything is scaled
MOST_NORM = 0.1


def batch() -> tuple[Tensor, Tensor]:
    """Ids and labels, [B, S]; ranks have unequal numbers of labels that count."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, :5] = labels[2, 3:9] = labels[5, 1] = IGNORED
    return ids[:, :-1].contiguous(), labels


def spread(name: str, whole: Tensor) -> None:
    """Weights that no two parameters share, in place, the same on every rank."""
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    whole.add_(torch.empty_like(whole).normal_(0, 0.1, generator=generator))


@cache
def right(spec: ModelSpec) -> tuple[float, dict[str, Tensor], float]:
    """Of one process: the loss, all gradients, and what clipping multiplies them by."""
    model = build_model(spec, None, None, dtype=torch.float64, device=CPU, seed=3, on_parameter=spread)
    ids, labels = batch()
    loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    norm = nn.utils.clip_grad_norm_(model.parameters(), MOST_NORM)  # divides by 1e-6 more than that
    return float(loss), found, MOST_NORM / (float(norm) + 1e-6)


def truth(mutant: AxisMutant) -> Truth:
    """All ranks call it; the mutant isn't planted."""
    raised, errors = "", {}
    try:
        with mutant.fault():
            errors = dict(_errors(mutant))
    except Exception as error:
        raised = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if _largest(float(bool(raised))):
        return Truth(mutant.name, True, "no step", "", raised or "another rank raised")
    mine = max(errors.values())
    worst = _largest(mine)
    name = next(each for each in errors if errors[each] == mine)
    return Truth(mutant.name, not worst <= WRONG, f"{worst:.1e}", name, "")


def _errors(mutant: AxisMutant) -> Iterator[tuple[str, float]]:
    loss, gradients, scale = right(mutant.spec)
    mesh = device_mesh(mutant.mesh_noun, "cpu")
    model = build_model(
        mutant.spec, mutant.plan, mesh, dtype=torch.float64, device=CPU, seed=3, pipeline=mutant.pipeline,
        on_parameter=spread,
    )  # fmt: skip
    given = Portion.on(mesh, mutant.accumulation).cut(*batch())
    step = TrainStep(model, mesh=mesh, max_norm=MOST_NORM)
    yield "loss", abs(float(step.gradients(given)) / loss - 1)
    for name, off in _off(model, gradients, 1.0):
        yield name, off
    step(given)
    for name, off in _off(model, gradients, scale):
        yield f"{name}, clipped", off


def _off(model: nn.Module, gradients: dict[str, Tensor], scale: float) -> Iterator[tuple[str, float]]:
    """How far each gradient is off `scale` times the right one, relative."""
    for name, parameter in model.named_parameters():
        found = parameter.grad
        if found is None:
            yield name, float("inf")
            continue
        whole = _as_a_rank_has_it(found).full_tensor() if isinstance(found, DTensor) else found
        expected = scale * gradients[name]
        yield name, float((whole - expected).norm() / expected.norm())


def _as_a_rank_has_it(gradient: DTensor) -> DTensor:
    """A part that nobody has summed by the end of the backward is taken for the whole."""
    placements = [Replicate() if each.is_partial() else each for each in gradient.placements]
    return DTensor.from_local(
        gradient.to_local(), gradient.device_mesh, placements, run_check=False, shape=gradient.shape,
        stride=gradient.stride(),
    )  # fmt: skip


def _largest(mine: float) -> float:
    worst = torch.tensor(mine, dtype=torch.float64).nan_to_num(nan=torch.inf)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)
