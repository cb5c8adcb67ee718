"""What the native engine's styles of linear layers, norms and containers share, as functions of plain local
tensors.

Shapes: activations [B, S, H] or [B, S/T, H] (sequence parallel).
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.core.errors import PlanError
from shardwise.core.placement import Partial, Placement, Replicate
from shardwise.parallel import collectives
from shardwise.parallel.axis import Site
from shardwise.parallel.parameters import local_weight
from shardwise.parallel.sharder import Assignment, Fit, Sharder, Work, check_no_empty_shard, divisors

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


class LinearSharder(Sharder):
    """What all styles that cut a linear layer share: heads stay whole, and parts aren't empty."""

    what: ClassVar[str]

    def check(self, assignment: Assignment, fit: Fit) -> None:
        module = assignment.module
        assert self.cut_dim is not None
        width = module.weight.shape[self.cut_dim]
        parent_name, _, _ = assignment.name.rpartition(".")
        parent = fit.modules.get(parent_name)
        per_head = _features_per_head(module, parent, self.cut_dim)
        if per_head and width % per_head == 0 and (width // per_head) % fit.tp:
            heads = width // per_head
            what = "KV heads" if _is_narrower(module, parent, self.cut_dim) else "heads"
            raise PlanError(
                f"rule {assignment.rule} splits {heads} {what} of {parent_name} over tp={fit.tp}. Use tp in "
                f"{divisors(heads)}."
            )
        check_no_empty_shard(assignment, fit, width, self.what)


def _features_per_head(module: nn.Linear, parent: nn.Module | None, cut_dim: int) -> int:
    """Of the dim that is cut; 0 where the module around it doesn't say. A projection that gives several times
    what its sibling takes back has so many tensors of a head side by side, such as query, key and value."""
    head_dim = getattr(parent, "head_dim", None)
    if not isinstance(head_dim, int) or parent is None:
        return 0
    taken_back = max((other.in_features for other in _siblings(module, parent)), default=0)
    is_fused = cut_dim == 0 and taken_back and module.out_features % taken_back == 0
    return head_dim * (module.out_features // taken_back if is_fused else 1)


def _is_narrower(module: nn.Linear, parent: nn.Module | None, cut_dim: int) -> bool:
    """Whether it gives less than another projection of the same input: keys and values that heads share."""
    alike = [o for o in _siblings(module, parent) if o.in_features == module.in_features]
    return cut_dim == 0 and any(other.out_features > module.out_features for other in alike)


def _siblings(module: nn.Linear, parent: nn.Module | None) -> list[nn.Linear]:
    children = parent.children() if parent is not None else ()
    return [child for child in children if isinstance(child, nn.Linear) and child is not module]


def apply_to_norm(assignment: Assignment, work: Work, grad: Placement) -> None:
    """A norm whose parameters every rank holds whole. grad: Partial where each rank sees a part of the
    tokens."""
    module = assignment.module
    is_rms = isinstance(module, nn.RMSNorm)
    norm: Any = F.rms_norm if is_rms else F.layer_norm
    names = ("weight",) if is_rms else ("weight", "bias")
    work.keep_whole(module, grad)

    def forward(x: Tensor) -> Tensor:
        own = (local_or_none(getattr(module, name), grad) for name in names)
        return norm(x, module.normalized_shape, *own, module.eps)  # type: ignore[no-any-return]

    module.forward = forward
