"""Process groups of many cases in one launch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import distributed

_MADE_BY_MESHES = "mesh_"


@contextmanager
def shared_groups() -> Iterator[None]:
    """Within it, meshes have one process group for the same ranks, whichever mesh and axis it is of; and
    runs, one after another, have the groups that the first one made beside those. The axes of a mesh still
    have groups of their own, for no two go over the same ranks; so have threads, which set a timeout.

    A group of gloo has a thread that wakes a hundred times a second for as long as the process lives: those
    of fifty meshes on eight ranks took one core of two, and did nothing.
    """
    made: dict[tuple[Any, ...], Any] = {}
    new_group = distributed.new_group

    def once(
        ranks: Sequence[int] | None = None, timeout: Any = None, backend: Any = None, **named: Any
    ) -> Any:
        of_mesh = str(named.get("group_desc")).startswith(_MADE_BY_MESHES)
        key = (tuple(ranks) if ranks is not None else None, timeout, backend, of_mesh)
        if key not in made:
            made[key] = new_group(ranks, timeout, backend, **named)
        return made[key]

    with patch("torch.distributed.new_group", once), patch("torch.distributed.device_mesh.new_group", once):
        yield
