"""What the native engine's styles of linear layers, norms and containers share, as functions of plain local
tensors.

Shapes: activations [B, S, H] or [B, S/T, H] (sequence parallel).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from shardwise.core.errors import PlanError
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.parallel import collectives
from shardwise.parallel.axis import Site
from shardwise.parallel.ownership import Order
from shardwise.parallel.parameters import local_weight
from shardwise.parallel.sharder import Assignment, Fit, Sharder, check_no_empty_shard, divisors

SEQUENCE_DIM = 1


def gather_input(x: Tensor, before: Placement, site: Site) -> Tensor:
    """Makes x whole for work of which every rank does a part: Shard(1) -> Replicate, or Replicate as it is;
    gradients are summed."""
    axis, origin = site.axis, site.origin(before, Replicate())
    if before == Replicate():
        return collectives.fan_out(x, axis, grad_placement=Partial(), origin=origin)
    full = x.shape[SEQUENCE_DIM] * axis.size
    return collectives.all_gather(
        x, SEQUENCE_DIM, axis, full_size=full, grad_placement=Partial(), origin=origin
    )


def local_or_none(parameter: Tensor | None, grad: Placement) -> Tensor | None:
    """local_weight() of a bias, or of a norm's weight, which may be left out."""
    return None if parameter is None else local_weight(parameter, grad)


def refuse_uneven_sequence(x: Tensor, site: Site) -> None:
    """Raises PlanError for a whole sequence that the ranks can't share out evenly."""
    size = x.shape[SEQUENCE_DIM] if x.dim() > SEQUENCE_DIM else 1
    if size % site.axis.size:
        raise PlanError(
            f"{site.module}: rule {site.rule} cuts a sequence of {size} over tp={site.axis.size}. Use a "
            f"multiple of {site.axis.size}."
        )


def gather_features(y: Tensor, full: int, order: Order | None, site: Site, grad: Placement) -> Tensor:
    """Shard(-1) -> Replicate, in the model's own order where ranks have theirs in another."""
    origin = site.origin(Shard(-1), Replicate())
    whole = collectives.all_gather(y, -1, site.axis, full_size=full, grad_placement=grad, origin=origin)
    return in_own_order(whole, order)


def in_own_order(whole: Tensor, order: Order | None) -> Tensor:
    """Features of all ranks, one rank's after the other's, in the model's own order."""
    if order is None:
        return whole
    kept = torch.cat([order.ids_of(rank) for rank in range(order.axis_size)])
    return whole.index_select(-1, torch.argsort(kept).to(whole.device))


def sum_parts(y: Tensor, after: Placement, site: Site) -> Tensor:
    """Summands to their sum, or to the own part of it."""
    axis, origin = site.axis, site.origin(Partial(), after)
    if after == Replicate():
        return collectives.all_reduce(y, axis, grad_placement=Replicate(), origin=origin)
    refuse_uneven_sequence(y, site)
    return collectives.reduce_scatter(y, SEQUENCE_DIM, axis, grad_placement=after, origin=origin)


class LinearSharder(Sharder):
    """What all styles that cut a linear layer share: heads stay whole, and parts aren't empty."""

    what: ClassVar[str]

    def check(self, assignment: Assignment, fit: Fit) -> None:
        module = assignment.module
        assert self.cut_dim is not None
        width = module.weight.shape[self.cut_dim]
        parent_name, _, _ = assignment.name.rpartition(".")
        parent = fit.modules.get(parent_name)
        pieces = assignment.style.pieces
        per_head = _features_per_head(module, parent, self.cut_dim, pieces)
        is_gathered = self.cut_dim == 0 and self.output_of(assignment.style) != Shard(-1)
        for size in () if is_gathered else pieces or (width,):  # heads may lie across what is gathered again
            if per_head and size % per_head == 0 and (size // per_head) % fit.tp:
                heads = size // per_head
                is_kv = size < max(pieces, default=0) or _is_narrower(module, parent, self.cut_dim)
                if heads == 1 and not is_kv:  # as wide as a head by chance
                    continue
                raise PlanError(
                    f"rule {assignment.rule} splits {heads} {'KV heads' if is_kv else 'heads'} of "
                    f"{parent_name} over tp={fit.tp}. Use tp in {divisors(heads)}."
                )
        check_no_empty_shard(assignment, fit, width, self.what)


def _features_per_head(
    module: nn.Linear, parent: nn.Module | None, cut_dim: int, pieces: tuple[int, ...]
) -> int:
    """Of the dim that is cut; 0 where the module around it doesn't say, or it has no heads in it: where a
    sibling makes something else of what it gives (a low rank), or its pieces are no query, key and value. A
    projection that gives several times what its sibling takes back has so many tensors of a head side by
    side."""
    head_dim = getattr(parent, "head_dim", None)
    if not isinstance(head_dim, int) or parent is None:
        return 0
    if pieces and not (len(pieces) == 3 and pieces[0] >= pieces[1] == pieces[2]):
        return 0
    if cut_dim == 0:
        beside = [o.out_features for o in _siblings(module, parent) if o.in_features == module.out_features]
    else:
        beside = [o.in_features for o in _siblings(module, parent) if o.out_features == module.in_features]
    if beside and module.weight.shape[1 - cut_dim] not in beside:
        return 0
    taken_back = max((other.in_features for other in _siblings(module, parent)), default=0)
    is_fused = not pieces and cut_dim == 0 and taken_back and module.out_features % taken_back == 0
    return head_dim * (module.out_features // taken_back if is_fused else 1)


def _is_narrower(module: nn.Linear, parent: nn.Module | None, cut_dim: int) -> bool:
    """Whether it gives less than another projection of the same input: keys and values that heads share."""
    alike = [o for o in _siblings(module, parent) if o.in_features == module.in_features]
    return cut_dim == 0 and any(other.out_features > module.out_features for other in alike)


def _siblings(module: nn.Linear, parent: nn.Module | None) -> list[nn.Linear]:
    children = parent.children() if parent is not None else ()
    return [child for child in children if isinstance(child, nn.Linear) and child is not module]
