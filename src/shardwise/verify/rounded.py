"""How far FSDP's mixed precision alone takes a model from itself: measured on one process.

FSDP2 is put on the unsharded model over this rank alone, with the same policy. Its parameters, activations
and gradients are rounded where the sharded model's are, and nothing is divided among ranks, so how far it is
off the exact model is what rounding does. A sharded model rounds the same values and further sums of them;
with r what one process gives and e the exact one, it may be off e by

    max(what expected.py allows, TIMES ||r - e||, least ||e||)

least: LEAST_TOLERANCE of the coarser of the policy's dtypes. A wrong reduction is off by a half and more.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from shardwise.models.layers import find_layers
from shardwise.step.train import shard_with_fsdp
from shardwise.verify.expected import LEAST_TOLERANCE, Unsharded, trained
from shardwise.verify.held import local, relative, size
from shardwise.verify.observe import observe

TIMES = 4
"""How much further other sums of rounded values may be off: tiny Llama and GPT in bfloat16 on dp=2,fsdp=2,
fsdp=2,tp=2 and fsdp=4 are off at most 1.7 times as far."""


def is_mixed(policy: MixedPrecisionPolicy) -> bool:
    return policy.param_dtype is not None or policy.reduce_dtype is not None


def loosened(
    expected: Unsharded, make: Callable[[], nn.Module], policy: MixedPrecisionPolicy, device_type: str
) -> Unsharded:
    """The same with what the policy's rounding may do. make: the unsharded model. All ranks call it."""
    least = max(LEAST_TOLERANCE[dtype] for dtype in (policy.param_dtype, policy.reduce_dtype) if dtype)
    model = _alone(make(), policy, device_type)
    found = observe(model, expected.batches[0], expected.portion)
    exact, allowed = expected.observed, dict(expected.allowed)
    noise = max(relative(found.own_logits, exact.own_logits), abs(found.loss - exact.loss) / abs(exact.loss))
    for name, gradient in exact.gradients.items():
        if gradient is None:
            continue
        off = _off(found.gradients[name], gradient)
        allowed[name] = max(allowed[name], TIMES * off, least * size(gradient))
    weights = _weights_off(_alone(make(), policy, device_type), expected) if expected.norms else {}
    return replace(
        expected,
        noise=max(expected.noise, noise),
        tolerance=max(expected.tolerance, TIMES * noise, least),
        allowed=allowed,
        weights_allowed={name: TIMES * off for name, off in weights.items()},
    )


def _off(rounded: Tensor | None, exact: Tensor) -> float:
    return size(exact) if rounded is None else size(local(rounded).double() - exact.double())


def _weights_off(model: nn.Module, expected: Unsharded) -> dict[str, float]:
    """How far each parameter is off the exact one after the optimizer's steps, relative."""
    after, _ = trained(model, expected.batches, expected.portion, expected.max_norm)
    return {name: relative(local(after[name]).detach(), exact) for name, exact in expected.after.items()}


def _alone(model: nn.Module, policy: MixedPrecisionPolicy, device_type: str) -> nn.Module:
    """Under FSDP over this rank alone."""
    ranks = torch.arange(dist.get_world_size()).unsqueeze(1)
    mesh = DeviceMesh(device_type, ranks, mesh_dim_names=("each", "alone"))["alone"]
    found = find_layers(model)
    layers: Sequence[nn.Module] = list(found.modules(model)) if found is not None else []
    shard_with_fsdp(model, layers, mesh, policy)
    return model
