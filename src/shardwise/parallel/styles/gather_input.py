"""gather_input: makes the input of a module that holds others whole, once for all of them. `from` says what
it is before: shard(1) is gathered, replicate is whole already. Inside, each rank's gradient is a part of the
sum: it is reduce-scattered or summed.

`every_input`: the gradients of its other tensors are parts, too, and are summed (what a router gives to
experts that are cut inside).

`parameters`: how those are held that the module owns, or reads by name of modules inside. `divide`: which of
its counts are of what is cut; `cut`: of which constants that its forward is given a rank takes its part.

`output`: of a module that itself gives each rank's summand (it reads the weights that are cut by name, and no
rowwise inside sums): what becomes of that, replicate or shard(1). A parameter that is "replicate" is then a
bias, added once, as under rowwise.
"""

import inspect
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle, PrepareModuleInput

from shardwise.core.held import Held
from shardwise.core.placement import Partial, Replicate, Shard
from shardwise.core.plan import Style
from shardwise.parallel.arguments import cut_arguments
from shardwise.parallel.axis import Site
from shardwise.parallel.layers import gather_input, sum_parts
from shardwise.parallel.leaves import HoldingContainer, held_for_sum, hold_and_run_on_local, wholes
from shardwise.parallel.own_forward import (
    change_first_output,
    change_first_tensor,
    change_other_tensors,
    wrap,
)
from shardwise.parallel.parameters import to_torch
from shardwise.parallel.sharder import Assignment, Fit, Work


class GatherInput(HoldingContainer):
    inputs = (Shard(1), Replicate())
    outputs = (Replicate(), Shard(1))
    gradients_inside = Partial()

    def cuts_sequence(self, style: Style) -> bool:
        return style.output == Shard(1)

    def held(self, assignment: Assignment) -> dict[str, Held]:
        told = super().held(assignment)
        return held_for_sum(told) if assignment.style.output is not None else told

    def check(self, assignment: Assignment, fit: Fit) -> None:
        super().check(assignment, fit)
        self.check_held_inside(assignment)

    def apply(self, assignment: Assignment, work: Work) -> None:
        site, before, after = work.site(assignment), self.input_of(assignment.style), assignment.style.output
        if after is None:
            hold_and_run_on_local(assignment, work)
        else:
            hold_and_run_on_local(assignment, work, wholes(super().held(assignment)))
        cut_arguments(assignment, site)

        def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
            if assignment.style.every_input:
                args, kwargs = change_other_tensors(args, kwargs, lambda x: _summed(x, site))
            args, kwargs = change_first_tensor(args, kwargs, lambda x: gather_input(x, before, site), site)
            output = inner(*args, **kwargs)
            if after is None:
                return output
            return change_first_output(output, lambda y: sum_parts(y, after, site), site)

        wrap(assignment.module, around)

    def twin(self, assignment: Assignment, *, keeps_dtensor: bool) -> ParallelStyle:
        others = [None] * (len(inspect.signature(assignment.module.forward).parameters) - 1)
        return PrepareModuleInput(
            input_layouts=(to_torch(self.input_of(assignment.style)), *others),
            desired_input_layouts=(to_torch(Replicate()), *others),
        )


def _summed(x: Tensor, site: Site) -> Tensor:
    """Whole, and the parts of its gradient are summed, if it has one."""
    return gather_input(x, Replicate(), site) if x.requires_grad else x


SHARDERS = {nn.Module: GatherInput()}
