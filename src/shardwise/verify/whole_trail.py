"""The unsharded model's trail for what one rank sees: its sequences of the batch, and its tokens of each."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from shardwise.core.batch_part import BatchPart
from shardwise.step.portion import Portion
from shardwise.verify.observe import Batch, Observed, observe
from shardwise.verify.trail import NOTHING, Change


def whole_trail(
    model: nn.Module, batch: Batch, portion: Portion, change: Mapping[int, Change] = NOTHING
) -> Observed:
    """What the unsharded model gives for this rank's sequences, with a trail. Where ranks share them it has
    run them whole, and so counted each label as often as there are such ranks. change: see observe()."""
    part = portion.part
    if not part.cuts_sequence:
        return observe(model, batch, portion, trail=True, change=change)
    seq = batch[0].shape[1]
    times = part.n_chunks // len(part.chunks)
    uncut = replace(portion, part=BatchPart(part.place, part.places))
    whole = observe(model, batch, uncut, trail=True, change=change)
    for point in whole.points:
        point.value, point.gradient = (
            None if each is None else own_tokens(each, portion, seq) for each in (point.value, point.gradient)
        )
        if point.gradient is not None:
            point.gradient = point.gradient * times
    return replace(whole, logits=own_tokens(whole.own_logits, portion, seq))


def own_tokens(tensor: Tensor, portion: Portion, seq: int) -> Tensor:
    """A rank's part of what is there for each token of whole sequences: [B, S, ...]."""
    if tensor.dim() < 2 or tensor.shape[1] != seq:
        return tensor
    return torch.cat([tensor[:, each] for each in portion.part.tokens(seq)], 1)


def of_own_tokens(portion: Portion, seq: int) -> Callable[[Tensor], Tensor]:
    """A change of gradients: of other ranks' tokens nothing comes back."""

    def change(gradient: Tensor) -> Tensor:
        if gradient.dim() < 2 or gradient.shape[1] != seq:
            return gradient
        kept = torch.zeros_like(gradient)
        for each in portion.part.tokens(seq):
            kept[:, each] = gradient[:, each]
        return kept

    return change
