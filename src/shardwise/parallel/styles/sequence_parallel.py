"""sequence_parallel: a norm of each rank's own part of the sequence; its weights are whole, their gradients
are summed."""

from torch import nn
from torch.distributed.tensor.parallel import SequenceParallel

from shardwise.core.placement import Partial
from shardwise.parallel.layers import apply_to_norm
from shardwise.parallel.sharder import Assignment, Sharder, Work


class SequenceParallelNorm(Sharder):
    twin_style = SequenceParallel

    def apply(self, assignment: Assignment, work: Work) -> None:
        apply_to_norm(assignment, work, Partial())


SHARDERS = dict.fromkeys((nn.RMSNorm, nn.LayerNorm), SequenceParallelNorm())
