"""split_input: the first input is whole and becomes each rank's own part of the sequence; its gradient is
gathered. Here sequence parallelism begins, behind what looks at lengths (positions, masks): put it on the
first layer."""

from typing import Any

from torch import Tensor, nn

from shardwise.core.placement import Replicate, Shard
from shardwise.core.plan import Style
from shardwise.parallel import collectives
from shardwise.parallel.axis import Site
from shardwise.parallel.layers import SEQUENCE_DIM, refuse_uneven_sequence
from shardwise.parallel.leaves import HoldingContainer
from shardwise.parallel.own_forward import change_first_tensor, wrap
from shardwise.parallel.sharder import Assignment, Reasons, Work


class SplitInput(HoldingContainer):
    reasons = Reasons(
        "Each rank goes on with its own part of the sequence.",
        "Each rank went on with its own part of the sequence, and what stands before needs the gradient of "
        "all of it: the parts are gathered.",
    )
    below_gather_input = "Put split_input where no gather_input is above."

    def cuts_sequence(self, style: Style) -> bool:
        return True

    def apply(self, assignment: Assignment, work: Work) -> None:
        super().apply(assignment, work)
        site = work.site(assignment)

        def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = change_first_tensor(args, kwargs, lambda x: split_sequence(x, site), site)
            return inner(*args, **kwargs)

        wrap(assignment.module, around)


def split_sequence(x: Tensor, site: Site) -> Tensor:
    """[B, S, H] -> [B, S/T, H]; the gradient is gathered. Raises PlanError where S is no multiple of T."""
    refuse_uneven_sequence(x, site)
    placement, origin = Shard(SEQUENCE_DIM), site.origin(Replicate(), Shard(SEQUENCE_DIM))
    return collectives.split(x, SEQUENCE_DIM, site.axis, grad_placement=placement, origin=origin)


SHARDERS = {nn.Module: SplitInput()}
