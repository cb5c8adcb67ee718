"""local: a module whose input stays as it is. `parameters` says how those are held that it owns, or reads by
name of modules inside; `divide` which of its counts are of what is cut; `cut` of which constants
that its forward is given a rank takes its part."""

from torch import nn

from shardwise.parallel.leaves import HoldingContainer

SHARDERS = dict.fromkeys((nn.Module, nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm), HoldingContainer())
