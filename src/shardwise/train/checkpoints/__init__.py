"""Checkpoints: the state of a run on disk, by the model's own names and in its own order, so that another
mesh or plan takes it up. Saved beside the training, counted once they are published, told apart when they
are damaged."""

from shardwise.train.checkpoints.checkpoints import Checkpoints as Checkpoints
from shardwise.train.checkpoints.checkpoints import Outcome as Outcome
from shardwise.train.checkpoints.finding import Found as Found
from shardwise.train.checkpoints.finding import find as find
