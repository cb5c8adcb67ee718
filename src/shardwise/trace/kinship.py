"""Which collectives are about one tensor: that gather a tensor which another has gathered, and whose sums are
added up. Tensors are compared, never names.

A tensor is where its elements lie: its storage, how often that was written, and which part of it. A copy is
what it was copied from. A sum is followed as long as it is moved and added to only: who computes with it
needs it by itself.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from shardwise.core.collective import CollectiveCall, CollectiveKind
from shardwise.core.mesh import Role, role_of
from shardwise.core.program import REPLICATED_PARAMETERS, Collective, Item, OpKind
from shardwise.trace.ops import Work
from shardwise.trace.storages import Storages

_ADDITIONS = frozenset({"aten::add", "aten::add_"})
_SUMS = _ADDITIONS | {"aten::sum"}
# an all-to-all is a reduce-scatter's, where its parts are summed
_SUMMING = frozenset({CollectiveKind.ALL_REDUCE, CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_TO_ALL})


@dataclass(frozen=True, slots=True)
class _Elements:
    """Elements of a storage, by its number, after so many writes."""

    storage: int
    writes: int
    start: int
    count: int


class Kinship:
    """Told every op and collective of a step, in order."""

    def __init__(self, storages: Storages) -> None:
        self._storages = storages
        self._writes: Counter[int] = Counter()
        self._copied: dict[int, _Elements] = {}  # by the storage of a copy, until that is written
        self._gathered: dict[tuple[_Elements, str], int] = {}  # on an axis -> by which collective
        self._sums: dict[int, int] = {}  # storage -> the last collective whose sum is in it
        self._again: dict[int, int] = {}
        self._added: dict[int, int] = {}
        self._phases: list[str] = []  # of each collective

    def exchanges(self, call: CollectiveCall, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """A collective that is written down."""
        place = len(self._phases)
        self._phases.append(call.phase)
        if call.kind is CollectiveKind.ALL_GATHER:
            parts = [each for each in inputs if _n_bytes(each) == call.payload_bytes // call.axis_size]
            elements = self._elements(parts[-1]) if parts else None
            if elements is not None:
                first = self._gathered.get((elements, call.axis))
                if first is not None and self._phases[first] == call.phase:
                    self._again[place] = place - first
                self._gathered[elements, call.axis] = place
        made = outputs or inputs[:1]
        for tensor in made:
            self._write(tensor)
        if call.kind in _SUMMING:
            self._note_sum(made, place)

    def computes(self, name: str, kind: OpKind, work: Work) -> None:
        """An op that is no view."""
        numbers = list(map(self._number, work.inputs))
        sums = sorted({self._sums[number] for number in numbers if number in self._sums})
        moves = kind is OpKind.COPY and len(work.inputs) == 1
        for tensor in work.written:
            self._write(tensor)
        if moves and work.made:
            self._note_copy(work.inputs[0], work.made[0])
        if not sums:
            return
        if not moves and name not in _SUMS:
            for number in numbers:
                self._sums.pop(number, None)
            return
        is_sum_of_two = name in _ADDITIONS and len(sums) == 2 and work.inputs[0].shape == work.inputs[1].shape
        if is_sum_of_two and len({self._phases[place] for place in sums}) == 1:
            self._added[sums[1]] = sums[1] - sums[0]
        self._note_sum(work.made or work.written, sums[-1])

    def told(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; collectives with their kin, as far as they are about what passes between modules:
        parameters are gathered, and their gradients added up, over and over."""
        place = 0
        for item in items:
            if not isinstance(item, Collective):
                yield item
                continue
            is_between = role_of(item.call.axis) is Role.CUTS_TENSORS and item.module != REPLICATED_PARAMETERS
            again, added = (own.get(place) if is_between else None for own in (self._again, self._added))
            yield item if again is None and added is None else replace(item, again=again, added_to=added)
            place += 1

    def _note_sum(self, tensors: Iterable[Tensor], place: int) -> None:
        self._sums |= {number: place for number in map(self._number, tensors) if number >= 0}

    def _note_copy(self, source: Tensor, copy: Tensor) -> None:
        elements, number = self._elements(source), self._number(copy)
        if elements is not None and number >= 0 and elements.count == copy.numel():
            self._copied[number] = elements

    def _elements(self, tensor: Tensor) -> _Elements | None:
        """None where its storage isn't known, or it is a part of a copy."""
        number = self._number(tensor)
        if number in self._copied:
            copied = self._copied[number]
            return copied if copied.count == tensor.numel() else None
        if number < 0:
            return None
        return _Elements(number, self._writes[number], int(tensor.storage_offset()), tensor.numel())

    def _write(self, tensor: Tensor) -> None:
        number = self._number(tensor)
        self._writes[number] += 1
        self._copied.pop(number, None)
        self._sums.pop(number, None)

    def _number(self, tensor: Tensor) -> int:
        """Of its storage; negative: not known."""
        number = self._storages.number_of(tensor)
        return -1 if number is None else number


def _n_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
