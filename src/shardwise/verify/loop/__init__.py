"""A user's own training step, held against one process: their loss, clipping, optimizer and sharding.

named.py: what goes to the ranks by name; loop.py: the step and what goes with it, and how it is called;
record.py: what a run of it did; differences.py: how far two runs are apart, and how far they may be;
causes.py and
gradients.py: why; words.py: in lines; hold.py: all of it on the ranks.
"""
