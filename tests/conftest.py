"""What holds for all tests."""

from hypothesis import settings

# times differ tenfold on a busy machine
settings.register_profile("shardwise", deadline=None)
settings.load_profile("shardwise")
