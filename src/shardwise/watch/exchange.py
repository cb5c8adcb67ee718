"""What ranks tell each other at a check: one number for each set of axes, in one all-gather; and every item's
digest, only where those numbers differ.

Only ranks that hold something alike tell each other, over however many others: the stages of a pipeline never
wait for one another here.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.core.drift import Drift, Held
from shardwise.watch.alike import Alike

_ORDER = tuple(Held)


@dataclass(frozen=True, slots=True)
class Item:
    """Something that these ranks hold alike, and its digest, a scalar on its device. is_placed: a DTensor
    says so."""

    held: Held
    subject: str
    alike: Alike
    digest: Tensor
    is_placed: bool = False

    @property
    def factor(self) -> int:
        """Odd, another for each name: so that two items which change places differ."""
        return crc32(f"{self.held} {self.subject}".encode()) * 2 + 1


@dataclass(frozen=True, slots=True)
class Gathered:
    """A check that is under way. sums: by rank and set of axes, once they are here; ready: None on a host."""

    step: int
    items: tuple[Item, ...]
    sums: Tensor
    ready: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank tells of an item where something differs."""

    held: Held
    subject: str
    alike: Alike
    digest: int
    is_placed: bool


class Exchange:
    """Between this rank and all that hold something alike with it, or with those. All ranks make one at once.
    alike: all sets of ranks that this one may ever need."""

    def __init__(self, alike: Collection[Alike], device: torch.device) -> None:
        own = {each.axes: each.members for each in alike}
        every: list[dict[tuple[str, ...], tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, own)
        together = _joined([set(members) for of_rank in every for members in of_rank.values()])
        self._ranks: tuple[int, ...] = ()
        self._group: dist.ProcessGroup | None = None
        for ranks in together:
            group = dist.group.WORLD if len(ranks) == len(every) else dist.new_group(ranks)
            if dist.get_rank() in ranks:
                assert isinstance(group, dist.ProcessGroup)
                self._ranks, self._group = tuple(ranks), group
        self._slots = sorted({axes for rank in self._ranks for axes in every[rank]})
        self._members = {rank: every[rank] for rank in self._ranks}
        on_device = self._group is not None and "nccl" in str(dist.get_backend_config(self._group))
        self._device = device if device.type == "cuda" and on_device else torch.device("cpu")

    @property
    def is_alone(self) -> bool:
        """Whether this rank holds nothing alike with others."""
        return self._group is None

    def knows(self, alike: Alike) -> bool:
        return self._members.get(dist.get_rank(), {}).get(alike.axes) == alike.members

    def begin(self, step: int, items: Sequence[Item]) -> Gathered:
        """Sends what the items come to. Doesn't wait for a GPU."""
        assert self._group is not None
        sums = torch.stack([self._sum(items, axes) for axes in self._slots])
        gathered = torch.empty(len(self._ranks) * len(sums), dtype=torch.int64, device=self._device)
        parts = list(gathered.split(len(sums)))
        dist.all_gather(parts, sums, group=self._group)
        if self._device.type == "cpu":
            return Gathered(step, tuple(items), gathered, None)
        here = torch.empty(gathered.shape, dtype=torch.int64, pin_memory=True)
        here.copy_(gathered, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Gathered(step, tuple(items), here, ready)

    def end(self, gathered: Gathered) -> Drift | None:
        """What differs first; None where nothing does. All ranks come to the same."""
        if gathered.ready is not None:
            gathered.ready.synchronize()
        by_rank = dict(zip(self._ranks, gathered.sums.view(len(self._ranks), -1).tolist(), strict=True))
        for rank in self._ranks:
            for axes, members in self._members[rank].items():
                at = self._slots.index(axes)
                if any(by_rank[other][at] != by_rank[rank][at] for other in members):
                    return self._first_difference(gathered)
        return None

    def _sum(self, items: Sequence[Item], axes: tuple[str, ...]) -> Tensor:
        of_axes = [each for each in items if each.alike.axes == axes]
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        for each in of_axes:
            total += each.digest.to(self._device, non_blocking=True) * each.factor
        return total

    def _first_difference(self, gathered: Gathered) -> Drift | None:
        own = [
            _Told(each.held, each.subject, each.alike, int(each.digest), each.is_placed)
            for each in gathered.items
        ]
        every: list[list[_Told]] = [[] for _ in self._ranks]
        dist.all_gather_object(every, own, group=self._group)
        return first_difference(gathered.step, dict(zip(self._ranks, every, strict=True)))


def first_difference(step: int, told: Mapping[int, Sequence[_Told]]) -> Drift | None:
    """Of what each rank told. The input explains random states, these weights; else what comes first in the
    model."""
    by_rank = {rank: {(each.held, each.subject): each for each in items} for rank, items in told.items()}
    keys = list(dict.fromkeys(key for items in by_rank.values() for key in items))
    keys.sort(key=lambda key: _ORDER.index(key[0]))  # stable: then as the model has them
    first: Drift | None = None
    more = 0
    for key in keys:
        holders = [items[key] for items in by_rank.values() if key in items]
        for alike in dict.fromkeys(each.alike for each in holders):
            values = [of.digest if (of := by_rank[rank].get(key)) else None for rank in alike.members]
            if len(set(values)) > 1:
                if first is None:
                    ranks = _by_value(alike.members, values)
                    axes, placed = alike.differing(values), holders[0].is_placed
                    first = Drift(step, *key, axes, ranks, is_placed=placed)
                else:
                    more += key != (first.held, first.subject)
                break
    return None if first is None else Drift(*_fields(first), more=more, is_placed=first.is_placed)


def _fields(drift: Drift) -> tuple[int, Held, str, tuple[str, ...], tuple[tuple[int, ...], ...]]:
    return drift.step, drift.held, drift.subject, drift.axes, drift.ranks


def _by_value(members: Sequence[int], values: Sequence[object]) -> tuple[tuple[int, ...], ...]:
    groups: dict[object, list[int]] = {}
    for rank, value in zip(members, values, strict=True):
        groups.setdefault(value, []).append(rank)
    return tuple(sorted(map(tuple, groups.values()), key=lambda ranks: (-len(ranks), ranks)))


def _joined(sets: Sequence[set[int]]) -> list[list[int]]:
    """Sets that have a rank in common become one."""
    found: list[set[int]] = []
    for each in sets:
        apart = [other for other in found if not other & each]
        found = [*apart, each.union(*(other for other in found if other & each))]
    return sorted(sorted(each) for each in found)
