"""What holds for all tests."""

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

from shardwise.launch import warm_ranks
from shardwise.launch.environment import cores
from shardwise.workers.garbage import collect_rarely

collect_rarely()  # as in the command: what a trace makes is many objects, and hardly any of them in cycles
# times differ tenfold on a busy machine
settings.register_profile("shardwise", deadline=None)
settings.load_profile("shardwise")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: tests that wait, for a timeout or for other ranks, leave theirs to the next."""
    return cores() + 1


# of those without processes, which come last: else one core would be at it when the other has nothing left
_LONG = "tests/unit/test_search_exact.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files go to cores in this order."""
    items.sort(key=lambda item: item.nodeid.startswith("tests/unit/") and not item.nodeid.startswith(_LONG))


def pytest_sessionfinish() -> None:
    """pytest ends with five collections, to hear of what was left open. One finds it, and takes a second of a
    core: the others get nothing to look at."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def ranks_that_start_at_once() -> Iterator[None]:
    """Ranks that tests start from their own process are forked from one that has imported PyTorch and
    transformers: else that is most of their time. test_launch.py and commands in processes of their own have
    ranks as users do."""
    with warm_ranks("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"):
        yield
