"""whole: every rank runs the module on all of its input and computes the same. `input` says how the first
tensor comes, and others of its shape (a gate): cut along the sequence, or the last dim, it is gathered
(gradient: the own part, since all ranks compute the same); `output` how the first one goes: it is cut to the
own part (gradient gathered).

`pieces`: of a last dim that is several things laid one after the other, of each of which a rank has its part:
they are put into the model's own order, and taken out of it again.

It holds for all modules inside that have no rule of their own. For what can't be cut between layers that are:
a norm of all heads, a mixture of experts, a recurrence.
"""

from typing import Any

import torch
from torch import Tensor, nn

from shardwise.core.errors import PlanError
from shardwise.core.held import Held, format_pieces, why_not_shared
from shardwise.core.placement import Placement, Replicate, Shard
from shardwise.parallel import collectives
from shardwise.parallel.axis import Site
from shardwise.parallel.layers import SEQUENCE_DIM, in_own_order, refuse_uneven_sequence
from shardwise.parallel.leaves import hold_and_run_on_local, own_names
from shardwise.parallel.own_forward import change_alike, change_first_output, wrap
from shardwise.parallel.ownership import Order, PieceOrder
from shardwise.parallel.sharder import Assignment, Fit, Reasons, Sharder, Work, refuse_below_gather_input

PLACEMENTS = (Shard(SEQUENCE_DIM), Shard(-1), Replicate())


class Whole(Sharder):
    inputs = PLACEMENTS
    outputs = PLACEMENTS
    gradients_inside = Replicate()
    reasons = Reasons(
        "Each rank has a part of what the module takes, and runs it on all of that: the parts are gathered.",
        "Each rank kept its part of what came out, and needs the gradient of all of it, as it computed all.",
    )
    holds_below = True

    def held(self, assignment: Assignment) -> dict[str, Held]:
        paths = own_names(assignment.module)
        for name in assignment.below:
            paths += [f"{name}.{own}" for own in own_names(assignment.module.get_submodule(name))]
        return dict.fromkeys(paths, Held(Replicate()))

    def check(self, assignment: Assignment, fit: Fit) -> None:
        style = assignment.style
        if style.pieces and Shard(-1) not in (self.input_of(style), self.output_of(style)):
            raise PlanError(
                f"rule {assignment.rule} has pieces, and {assignment.shown} takes and gives whole features. "
                'Leave pieces out, or say input = "shard(-1)".'
            )
        why_not = why_not_shared(style.pieces, style.parts, fit.tp)
        if any(style.parts) or why_not is not None:
            why_not = why_not or "ranks use the same parts, which can't be gathered"
            pieces = format_pieces(style.pieces, style.parts)
            raise PlanError(f"rule {assignment.rule} has pieces {pieces}, and {why_not}. Give others.")

    def check_below_gather_input(self, assignment: Assignment) -> None:
        if {self.input_of(assignment.style), self.output_of(assignment.style)} != {Shard(-1)}:
            refuse_below_gather_input(
                assignment, 'Use input = "shard(-1)" and output = "shard(-1)" for what is cut there.'
            )

    def apply(self, assignment: Assignment, work: Work) -> None:
        hold_and_run_on_local(assignment, work)
        before, after = self.input_of(assignment.style), self.output_of(assignment.style)
        site, pieces = work.site(assignment), assignment.style.pieces
        order = PieceOrder(pieces, work.axis.size) if pieces and work.axis.size > 1 else None

        def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(before, Shard):
                args, kwargs = change_alike(args, kwargs, lambda x: _gathered(x, before, order, site), site)
            output = inner(*args, **kwargs)
            if isinstance(after, Shard):
                return change_first_output(output, lambda y: _own_part(y, after, order, site), site)
            return output

        wrap(assignment.module, around)


def _gathered(x: Tensor, before: Shard, order: Order | None, site: Site) -> Tensor:
    full = x.shape[before.dim] * site.axis.size
    grad: Placement = Replicate()
    origin = site.origin(before, Replicate())
    whole = collectives.all_gather(
        x, before.dim, site.axis, full_size=full, grad_placement=grad, origin=origin
    )
    return whole if before.dim == SEQUENCE_DIM else in_own_order(whole, order)


def _own_part(y: Tensor, after: Shard, order: Order | None, site: Site) -> Tensor:
    if after.dim == SEQUENCE_DIM:
        refuse_uneven_sequence(y, site)
    elif y.shape[after.dim] % site.axis.size:
        raise PlanError(
            f"{site.module}: rule {site.rule} cuts a last dim of {y.shape[after.dim]} over "
            f"tp={site.axis.size}. Use a tp that divides it."
        )
    if order is not None and after.dim != SEQUENCE_DIM:
        kept = torch.cat([order.ids_of(rank) for rank in range(order.axis_size)])
        y = y.index_select(after.dim, kept.to(y.device))
    origin = site.origin(Replicate(), after)
    return collectives.split(y, after.dim, site.axis, grad_placement=after, origin=origin)


SHARDERS = dict.fromkeys((nn.Module, nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm), Whole())
