"""gather_input: makes the input of a module that holds others whole, once for all of them. `from` says what
it is before: shard(1) is gathered, replicate is whole already. Inside, each rank's gradient is a part of the
sum: it is reduce-scattered or summed."""

import inspect

from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle, PrepareModuleInput

from shardwise.core.errors import PlanError
from shardwise.core.placement import Replicate, Shard
from shardwise.parallel.layers import gather_input
from shardwise.parallel.parameters import to_torch
from shardwise.parallel.sharder import Assignment, Sharder, Work


class GatherInput(Sharder):
    inputs = (Shard(1), Replicate())
    gathers_input = True

    def apply(self, assignment: Assignment, work: Work) -> None:
        module, site = assignment.module, work.site(assignment)
        before = self.input_of(assignment.style)
        inner = module.forward

        def forward(*args: object, **kwargs: object) -> object:
            if args and isinstance(args[0], Tensor):
                return inner(gather_input(args[0], before, site), *args[1:], **kwargs)
            # called by keyword, as Hugging Face does: the first tensor is the hidden state
            for key, value in kwargs.items():
                if isinstance(value, Tensor):
                    return inner(*args, **{**kwargs, key: gather_input(value, before, site)})
            raise PlanError(f"{site.module}: rule {site.rule} found no tensor among the module's inputs.")

        module.forward = forward

    def twin(self, assignment: Assignment, *, keeps_dtensor: bool) -> ParallelStyle:
        others = [None] * (len(inspect.signature(assignment.module.forward).parameters) - 1)
        return PrepareModuleInput(
            input_layouts=(to_torch(self.input_of(assignment.style)), *others),
            desired_input_layouts=(to_torch(Replicate()), *others),
        )


SHARDERS = {nn.Module: GatherInput()}
