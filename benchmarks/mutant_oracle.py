"""Which mutants are harmful: a plain script. It shares nothing with shardwise.verify: whole tensors, two
models side by side, one number.

Both models get the same random weights: whole ones by name, DTensors by distribute_tensor (rows of an
interleaved table by load_state_dict, which knows their order). A mutant is harmful where a step raises, where
a gradient, gathered whole on every rank, is off by more than 1e-6 of the unsharded one's norm (float64), or
where weights that were one have two gradients.
"""

from dataclasses import dataclass

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.mutants import CONFIG, MUTANTS, Mutant
from shardwise.launch import RankContext
from shardwise.parallel.apply import loss_of

WRONG = 1e-6


@dataclass(frozen=True, slots=True)
class Truth:
    """worst: the largest relative error of a gradient, of `parameter`; infinite where a step raises:
    `raised`."""

    name: str
    is_harmful: bool
    worst: str
    parameter: str
    raised: str


def run(context: RankContext, payload: bytes) -> bytes:
    """Entry of every rank: a Truth for each named mutant, as JSON. One that makes ranks part ends the run."""
    torch.set_default_dtype(torch.float64)
    mesh = init_device_mesh("cpu", (context.world_size,), mesh_dim_names=("tp",))
    truths = []
    for name in msgspec.json.decode(payload, type=list[str]):
        context.note(name)
        truths.append(_truth(MUTANTS[name], mesh))
        dist.barrier()
    return msgspec.json.encode(truths)


def _truth(mutant: Mutant, mesh: DeviceMesh) -> Truth:
    torch.manual_seed(7)
    whole = mutant.build()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.15)
    ids = torch.randint(CONFIG.vocab_size, (2, 12), generator=torch.Generator().manual_seed(8))
    labels = ids.roll(-1, 1)
    logits = whole(ids)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    raised = ""
    try:
        sharded = mutant.build(mesh)
        sharded.load_state_dict(_like(sharded, whole))
        loss = loss_of(sharded)(sharded(ids), labels)
        with loss_of(sharded).backward_context():
            loss.backward()
    except Exception as error:
        raised = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if _any(bool(raised)):
        return Truth(mutant.name, True, "no step", "", raised or "another rank raised")
    errors = {name: _error(parameter.grad, sharded, name) for name, parameter in whole.named_parameters()}
    name = max(errors, key=lambda each: errors[each])
    return Truth(mutant.name, not errors[name] <= WRONG, f"{errors[name]:.1e}", name, "")


def _like(sharded: nn.Module, whole: nn.Module) -> dict[str, Tensor]:
    """The whole weights, cut as the sharded model's state is."""
    from torch.distributed.tensor import distribute_tensor

    state = {}
    for name, kept in sharded.state_dict().items():
        value = whole.state_dict()[name]
        state[name] = (
            distribute_tensor(value, kept.device_mesh, kept.placements, src_data_rank=None)
            if isinstance(kept, DTensor)
            else value
        )
    return state


def _error(expected: Tensor | None, sharded: nn.Module, name: str) -> float:
    """Of one parameter, the largest over the ranks. Rows of an interleaved table are put in the order of
    their ids."""
    assert expected is not None
    found = dict(sharded.named_parameters(remove_duplicate=False))[name].grad
    if found is None:
        return float("inf")
    if isinstance(found, DTensor):
        partial = any(placement.is_partial() for placement in found.placements)
        is_torchs = "@dtensor" in str(getattr(getattr(sharded, "_shardwise", None), "plan", ""))
        found = found.to_local() if partial and not is_torchs else found.full_tensor()
    if "interleaved" in str(getattr(getattr(sharded, "_shardwise", None), "plan", "")) and name.startswith(
        "tok_embeddings"
    ):
        found = found.unflatten(0, (dist.get_world_size(), -1)).transpose(0, 1).flatten(0, 1)
    off = (found - expected).norm() / expected.norm()
    worst = torch.nan_to_num(off.detach().clone(), nan=torch.inf)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def _any(mine: bool) -> bool:
    flag = torch.tensor(float(mine))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())
