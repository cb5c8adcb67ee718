"""sequence_parallel: a module that works on each rank's own part of the sequence, token by token; its
parameters are whole, their gradients are summed."""

from torch import nn
from torch.distributed.tensor.parallel import SequenceParallel

from shardwise.core.placement import Partial
from shardwise.core.plan import Style
from shardwise.parallel.leaves import WholeLeaf
from shardwise.parallel.sharder import Sharder


class SequenceParallelLeaf(WholeLeaf):
    def gradient(self, style: Style) -> Partial:
        return Partial()


class SequenceParallelNorm(SequenceParallelLeaf):
    twin_style = SequenceParallel


SHARDERS: dict[type[nn.Module], Sharder] = {
    **dict.fromkeys((nn.Module, nn.Linear), SequenceParallelLeaf()),
    **dict.fromkeys((nn.RMSNorm, nn.LayerNorm), SequenceParallelNorm()),
}
