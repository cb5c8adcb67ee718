"""The verb train: checked.py says what may begin, verb.py runs it through failures, ranks.py is what a rank
enters by."""

from shardwise.verbs.train.verb import BATCH, SEQ, Live, train

__all__ = ["BATCH", "SEQ", "Live", "train"]
