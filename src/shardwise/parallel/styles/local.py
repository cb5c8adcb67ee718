"""local: not there yet; see core/plan.py."""

from torch import nn

from shardwise.parallel.sharder import Sharder

SHARDERS: dict[type[nn.Module], Sharder] = {}
