"""What holds for all tests."""

import gc

from hypothesis import settings

# as in the command: what a trace makes is many objects, and hardly any of them in cycles
gc.set_threshold(200_000)
# times differ tenfold on a busy machine
settings.register_profile("shardwise", deadline=None)
settings.load_profile("shardwise")
