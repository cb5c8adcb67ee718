"""How often each micro-batch is in a gradient that is wrong. What sums `.grad` over ranks after each backward
sums what earlier micro-batches gave once more: of k of them on n ranks the first is in it n^(k-1) times."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.core.mesh import TENSOR_AXIS
from shardwise.step.portion import Portion
from shardwise.verify.exchange import device_of
from shardwise.verify.expected import Differences, Unsharded
from shardwise.verify.held import held_over, size

_NEAR = 1e-4
"""Of a whole number of times."""


def in_micro_batches(
    model: nn.Module,
    given: Mapping[str, Sequence[Tensor]],
    gradients: Mapping[str, Tensor | None],
    expected: Unsharded,
    differences: Differences,
    portion: Portion,
) -> dict[str, tuple[float, ...]]:
    """Of the wrong gradients that a rank holds whole and that are sums of what micro-batches give: how often
    each is in it, in their order. given: what each backward of the unsharded model gave on this rank's
    portion. All ranks call it."""
    if portion.micro_batches < 2 or portion.part.cuts_sequence:
        return {}
    found = {}
    for name in differences.wrong_gradients:
        whole, held = expected.observed.gradients[name], held_over(gradients.get(name), model, (TENSOR_AXIS,))
        parts = _of_all_ranks(given.get(name, ()), portion)
        if whole is None or held is None or parts is None or held.shape != whole.shape:
            continue
        bound = expected.allowed[name]
        times = _times(held.double(), parts, bound)
        is_all = size(sum(parts) - whole.double()) <= bound
        if times is not None and is_all and any(abs(each - 1) > _NEAR for each in times):
            found[name] = times
    return found


def _of_all_ranks(parts: Sequence[Tensor], portion: Portion) -> list[Tensor] | None:
    """What each micro-batch gives on all data-parallel ranks together."""
    if len(parts) != portion.micro_batches:
        return None
    total = torch.stack([each.double() for each in parts]).to(device_of(None))
    dist.all_reduce(total)
    alike = dist.get_world_size() // portion.part.places
    return list((total / alike).to(parts[0].device))


def _times(held: Tensor, parts: Sequence[Tensor], bound: float) -> tuple[float, ...] | None:
    """How often each is in it, if it is nothing but a sum of them."""
    columns = torch.stack([each.flatten() for each in parts], 1)
    times = torch.linalg.lstsq(columns, held.flatten().unsqueeze(1)).solution.squeeze(1)
    off = size(columns @ times - held.flatten())
    return tuple(times.tolist()) if off <= bound * max(1.0, float(times.abs().max())) else None
