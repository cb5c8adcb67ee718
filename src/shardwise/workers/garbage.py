"""How often Python looks for garbage: rarely, in a command and in the processes that work for it."""

import gc

_NEW_OBJECTS = 200_000  # between two looks; with Python's 700, a fifth of importing PyTorch goes there


def collect_rarely() -> None:
    gc.set_threshold(_NEW_OBJECTS)
