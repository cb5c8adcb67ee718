"""What ranks tell one another about a checkpoint: bytes, over a gloo group of its own, so that a thread may
talk while the training's collectives go on. Without other ranks nothing is sent."""

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist

T = TypeVar("T")


class Talk:
    """All ranks of the process group, or this process alone. All must make it at once, and call its methods
    in the same order."""

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.size, self._group = 0, 1, None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def gather(self, payload: bytes) -> list[bytes]:
        """What every rank gave, in order."""
        if self._group is None:
            return [payload]
        sizes = torch.zeros(self.size, dtype=torch.int64)
        dist.all_gather_into_tensor(sizes, torch.tensor([len(payload)]), group=self._group)
        most = max(1, int(sizes.max()))
        own = torch.zeros(most, dtype=torch.uint8)
        own[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else own[:0]
        every = torch.zeros(self.size * most, dtype=torch.uint8)
        dist.all_gather_into_tensor(every, own, group=self._group)
        return [every[rank * most :][:size].numpy().tobytes() for rank, size in enumerate(sizes.tolist())]

    def gather_as(self, kind: type[T], value: T) -> Sequence[T]:
        """The same of a noun, by JSON."""
        return [msgspec.json.decode(each, type=kind) for each in self.gather(msgspec.json.encode(value))]

    def first_problem(self, problem: str | None) -> str | None:
        """The same on all ranks: the first rank's that has one."""
        every = self.gather_as(str, problem or "")
        return next((each for each in every if each), None)
