"""Linear, norm and input styles of the native engine, as functions of plain local tensors.

Shapes: activations [B, S, H] or [B, S/T, H] (sequence parallel); a colwise weight is [out/T, in], a rowwise one [out, in/T].

    style         input                             output                         gradient of the weight / of a rowwise bias
    colwise       replicate: its gradient is summed shard(-1): as computed         own rows
                  over the ranks (fan_out); shard(1):   replicate: gathered
                  gathered, its gradient reduce-
                  scattered; below a gather_input:
                  taken as it is
    rowwise       shard(-1): taken as it is;        replicate: all-reduced         own columns / whole
                  replicate: own slice                shard(1): reduce-scattered     own columns / a part, by the own tokens
    gather_input  shard(1): gathered; replicate: as it is. The gradient of what stands inside is Partial: it is reduce-scattered or summed.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.parallel import collectives
from shardwise.parallel.axis import Site

SEQUENCE_DIM = 1


@dataclass(frozen=True, slots=True)
class ColwiseLinear:
    """input is None below a gather_input: whole already, its gradient summed there."""

    site: Site
    input: Placement | None
    output: Placement
    out_features: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        axis = self.site.axis
        if self.input is not None:
            x = gather_input(x, self.input, self.site)
        y = F.linear(x, weight, bias)
        if self.output == Shard(-1):
            return y
        return collectives.all_gather(
            y,
            -1,
            axis,
            full_size=self.out_features,
            grad_placement=Replicate(),
            origin=self.site.origin(Shard(-1), Replicate()),
        )


@dataclass(frozen=True, slots=True)
class RowwiseLinear:
    site: Site
    input: Placement
    output: Placement

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        axis = self.site.axis
        if self.input == Replicate():
            x = collectives.split(
                x, -1, axis, grad_placement=Shard(-1), origin=self.site.origin(Replicate(), Shard(-1))
            )
        y = F.linear(x, weight)
        if self.output == Shard(SEQUENCE_DIM):
            check_sequence(y.shape[SEQUENCE_DIM], self.site)
            y = collectives.reduce_scatter(
                y,
                SEQUENCE_DIM,
                axis,
                grad_placement=Shard(SEQUENCE_DIM),
                origin=self.site.origin(Partial(), Shard(SEQUENCE_DIM)),
            )
        else:
            y = collectives.all_reduce(
                y, axis, grad_placement=Replicate(), origin=self.site.origin(Partial(), Replicate())
            )
        return y if bias is None else y + bias


def gather_input(x: Tensor, before: Placement, site: Site) -> Tensor:
    """Makes x whole for work of which every rank does a part: Shard(1) -> Replicate, or Replicate as it is; gradients are summed."""
    if before == Shard(SEQUENCE_DIM):
        return collectives.all_gather(
            x,
            SEQUENCE_DIM,
            site.axis,
            full_size=x.shape[SEQUENCE_DIM] * site.axis.size,
            grad_placement=Partial(),
            origin=site.origin(Shard(SEQUENCE_DIM), Replicate()),
        )
    return collectives.fan_out(
        x, site.axis, grad_placement=Partial(), origin=site.origin(Replicate(), Replicate())
    )


def check_sequence(size: int, site: Site) -> None:
    """Sequence parallelism cuts the sequence in equal parts."""
    if size % site.axis.size:
        from shardwise.core.errors import PlanError

        raise PlanError(
            f"{site.module}: rule {site.rule} cuts a sequence of {size} over tp={site.axis.size}. Use a multiple of {site.axis.size}."
        )
