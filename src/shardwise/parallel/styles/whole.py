"""whole: every rank runs the module on all of its input and computes the same. `input` says how the first
tensor comes, and others of its shape (a gate): cut along the sequence, or the last dim, it is gathered
(gradient: the own part, since all ranks compute the same); `output` how the first one goes: it is cut to the
own part (gradient gathered).

It holds for all modules inside that have no rule of their own. For what can't be cut between layers that are:
a norm of all heads, a mixture of experts, a recurrence.
"""

from typing import Any

from torch import Tensor, nn

from shardwise.core.errors import PlanError
from shardwise.core.held import Held
from shardwise.core.placement import Placement, Replicate, Shard
from shardwise.parallel import collectives
from shardwise.parallel.axis import Site
from shardwise.parallel.layers import SEQUENCE_DIM, refuse_uneven_sequence
from shardwise.parallel.leaves import hold_and_run_on_local, own_names
from shardwise.parallel.own_forward import change_alike, change_first_output, wrap
from shardwise.parallel.sharder import Assignment, Reasons, Sharder, Work, refuse_below_gather_input

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

    def check_below_gather_input(self, assignment: Assignment) -> None:
        if {self.input_of(assignment.style), self.output_of(assignment.style)} != {Shard(-1)}:
            refuse_below_gather_input(
                assignment, 'Use input = "shard(-1)" and output = "shard(-1)" for what is cut there.'
            )

    def apply(self, assignment: Assignment, work: Work) -> None:
        hold_and_run_on_local(assignment, work)
        before, after = self.input_of(assignment.style), self.output_of(assignment.style)
        site = work.site(assignment)

        def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(before, Shard):
                args, kwargs = change_alike(args, kwargs, lambda x: _gathered(x, before, site), site)
            output = inner(*args, **kwargs)
            if isinstance(after, Shard):
                return change_first_output(output, lambda y: _own_part(y, after, site), site)
            return output

        wrap(assignment.module, around)


def _gathered(x: Tensor, before: Shard, site: Site) -> Tensor:
    full = x.shape[before.dim] * site.axis.size
    grad: Placement = Replicate()
    origin = site.origin(before, Replicate())
    return collectives.all_gather(
        x, before.dim, site.axis, full_size=full, grad_placement=grad, origin=origin
    )


def _own_part(y: Tensor, after: Shard, site: Site) -> Tensor:
    if after.dim == SEQUENCE_DIM:
        refuse_uneven_sequence(y, site)
    elif y.shape[after.dim] % site.axis.size:
        raise PlanError(
            f"{site.module}: rule {site.rule} cuts a last dim of {y.shape[after.dim]} over "
            f"tp={site.axis.size}. Use a tp that divides it."
        )
    origin = site.origin(Replicate(), after)
    return collectives.split(y, after.dim, site.axis, grad_placement=after, origin=origin)


SHARDERS = dict.fromkeys((nn.Module, nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm), Whole())
