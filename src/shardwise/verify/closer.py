"""Looking closer, where something is wrong: both models once more with an eye on every module, and all ranks'
pieces of what differs.

Data-parallel ranks look at their own portions, so a tensor-parallel group finds its own evidence; what all
must do together they agree on.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.core.batch_part import BatchPart
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.step.portion import Portion
from shardwise.torch_private import StridedShard
from shardwise.verify.along import unsummed
from shardwise.verify.exchange import all_agree, gathered, gathered_ints, smallest
from shardwise.verify.expected import Differences, Unsharded
from shardwise.verify.held import held_over, local, size
from shardwise.verify.observe import Batch, Call, Observed, observe
from shardwise.verify.reasons import Evidence, Recut, Seen
from shardwise.verify.relation import Related, cut_apart, relate


def evidence(
    model: nn.Module, whole_model: nn.Module, expected: Unsharded, differences: Differences, portion: Portion
) -> Evidence:
    """How what the ranks hold relates to the whole: wrong gradients, the logits, each module's outputs and
    what came back to them."""
    group, batch = portion.tp_group, expected.batches[0]
    whole = _whole_calls(whole_model, batch, portion)
    sharded = observe(model, batch, portion, trail=True)
    gradients = _related_gradients(model, sharded, expected, differences, group)
    output, parts = None, {}
    if differences.is_output_wrong and sharded.logits is not None:
        pieces = [each for (each,) in gathered([sharded.logits], group)]
        output = relate(pieces, whole.own_logits, tolerance=expected.tolerance)
    if not differences.is_output_wrong and portion.mesh is not None and portion.mesh.size() > group.size():
        parts = unsummed(model, sharded.gradients, expected, list(gradients), portion)
    seen = _seen(whole.calls, sharded.calls, expected.tolerance, group)
    known = Evidence(model, dist.get_world_size(group), differences, output, gradients, seen, along=parts)
    first = known.first_wrong_output
    at = smallest(seen.index(first) if first is not None else len(seen))
    if at == len(seen):
        return known
    weights = {name: parameter.detach() for name, parameter in whole_model.named_parameters()}
    return replace(known, recut=_recut(model, weights, expected, at, whole.calls[at], portion))


def _whole_calls(model: nn.Module, batch: Batch, portion: Portion) -> Observed:
    """What the unsharded model gives for this rank's sequences. Where ranks share them it has run them whole,
    and so counted each label as often as there are such ranks."""
    part = portion.part
    if not part.cuts_sequence:
        return observe(model, batch, portion, trail=True)
    seq, tokens = batch[0].shape[1], part.tokens(batch[0].shape[1])
    times = part.n_chunks // len(part.chunks)
    whole = observe(model, batch, replace(portion, part=BatchPart(part.place, part.places)), trail=True)

    def own(tensor: Tensor | None, scale: int = 1) -> Tensor | None:
        if tensor is None or tensor.dim() < 2 or tensor.shape[1] != seq:
            return tensor
        return torch.cat([tensor[:, each] for each in tokens], 1) * scale

    for call in whole.calls:
        call.output, call.gradient = own(call.output), own(call.gradient, times)
    return replace(whole, logits=torch.cat([whole.own_logits[:, each] for each in tokens], 1))


def _related_gradients(
    model: nn.Module,
    sharded: Observed,
    expected: Unsharded,
    differences: Differences,
    group: dist.ProcessGroup,
) -> dict[str, Related]:
    names = list(differences.wrong_gradients)
    pieces = gathered(
        [held_over(sharded.gradients.get(name), model, (TENSOR_AXIS,)) for name in names], group
    )
    related = {}
    for at, name in enumerate(names):
        whole = expected.observed.gradients[name]
        assert whole is not None
        own = size(whole)
        tolerance = expected.allowed[name] / own if own else expected.tolerance
        related[name] = relate([each[at] for each in pieces], whole, tolerance=tolerance)
    return related


def _seen(
    whole: Sequence[Call], sharded: Sequence[Call], tolerance: float, group: dist.ProcessGroup
) -> tuple[Seen, ...]:
    """Empty where the sharded model's calls aren't the unsharded one's."""
    n_calls = min(gathered_ints(len(sharded), group))
    calls = sharded[:n_calls]
    is_same = [call.module for call in calls] == [call.module for call in whole[:n_calls]]
    on_ranks = gathered([each for call in calls for each in (call.output, call.gradient)], group)
    if not all_agree(is_same):
        return ()
    seen = []
    for at, (call, other) in enumerate(zip(calls, whole, strict=False)):
        output = gradient = None
        if other.output is not None:
            output = relate([each[2 * at] for each in on_ranks], other.output, tolerance=tolerance)
        if other.gradient is not None:
            # gradients that are far smaller than the largest are rounding
            pieces = [each[2 * at + 1] for each in on_ranks]
            gradient = relate(pieces, other.gradient, tolerance=10 * tolerance)
        seen.append(Seen(call.module, output, gradient))
    return tuple(seen)


def _recut(
    model: nn.Module, weights: dict[str, Tensor], expected: Unsharded, at: int, call: Call, portion: Portion
) -> Recut | None:
    """Cuts each sharded parameter of the first wrong module in another way, for a trial, and looks whether
    the module is then right."""
    group = portion.tp_group
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    for own_name, parameter in model.get_submodule(call.module).named_parameters(recurse=False):
        name = f"{call.module}.{own_name}"
        dim = _cut_dim(parameter)
        if dim is None or name not in weights or call.output is None:
            continue
        kept = local(parameter).detach()
        for parts in (2, 3, 1):
            if weights[name].shape[dim] % (parts * n):
                continue
            trial = cut_apart(weights[name], dim, parts, n, rank)
            if trial.shape != kept.shape or all_agree(torch.equal(trial, kept)):
                continue
            before = kept.clone()
            kept.copy_(trial)
            calls = observe(model, expected.batches[0], portion, trail=True).calls
            kept.copy_(before)
            pieces = [each for (each,) in gathered([calls[at].output if at < len(calls) else None], group)]
            if all_agree(relate(pieces, call.output, tolerance=expected.tolerance).is_right):
                return Recut(name, parts)
    return None


def _cut_dim(parameter: nn.Parameter) -> int | None:
    """The dim along which tp alone cuts it."""
    if not isinstance(parameter, DTensor) or len(parameter.placements) != 1:
        return None
    (placement,) = parameter.placements
    if not placement.is_shard() and not isinstance(placement, StridedShard):
        return None
    return placement.dim  # type: ignore[attr-defined, no-any-return]
