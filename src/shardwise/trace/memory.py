"""What each storage of a traced step is for, and its coming and going as items of the Program."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from shardwise.core.program import Item, MemoryChange, MemoryKind, Op, Phase
from shardwise.step.train import TrainStep
from shardwise.torch_private import local_part
from shardwise.trace.routes import Routes
from shardwise.trace.storages import Came, Event, Routed, Storage, Storages, Went

STATES = (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)  # shards by their kind
Kinds = dict[int, MemoryKind]
"""Storage number -> kind."""


def resident_kinds(storages: Storages, step: TrainStep) -> Kinds:
    """Of what lives from step to step."""
    kinds: Kinds = {}
    for parameter in step.model.parameters():
        kinds[storages.note(local_part(parameter), "parameter")] = MemoryKind.PARAMETER
    for buffer in step.model.buffers():
        kinds.setdefault(storages.note(local_part(buffer), "buffer"), MemoryKind.BUFFER)
    for state in step.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                kinds[storages.note(local_part(value), "optimizer")] = MemoryKind.OPTIMIZER
    return kinds


def gradient_kinds(storages: Storages, model: nn.Module) -> Kinds:
    """Of the gradients that the step left."""
    gradients = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    numbers = (storages.number_of(local_part(gradient)) for gradient in gradients)
    return {number: MemoryKind.GRADIENT for number in numbers if number is not None}


def resident_bytes(storages: Storages, kinds: Kinds) -> dict[MemoryKind, int]:
    """By kind."""
    resident = dict.fromkeys(kinds.values(), 0)
    for number, kind in kinds.items():
        resident[kind] += storages.seen[number].n_bytes
    return resident


def items_of(events: list[Event], storages: list[Storage], known: Kinds, routes: Routes) -> Iterator[Item]:
    """Events as items. known: kinds of resident storages, and of those that the step leaves."""
    kinds = _kinds_by_life(events, storages) | known
    made = {event.storage for event in events if isinstance(event, Came)}
    stays = known.keys() - made
    living: defaultdict[MemoryChange, _Alike] = defaultdict(_Alike)
    for event in events:
        match event:
            case Came(number):
                came = _change(storages[number], kinds.get(number, MemoryKind.TEMPORARY))
                living[_but_for_size(came)].numbers.append(number)
                yield came
            case Went(number):
                if number in kinds and number not in stays:
                    came = _change(storages[number], kinds[number])
                    nth = living[_but_for_size(came)].take(number)
                    yield replace(came, n_bytes=-came.n_bytes, nth=nth)
            case Routed(collective, sends):
                yield routes.with_all_ranks(collective, sends)
            case _:
                yield event


def _change(storage: Storage, kind: MemoryKind) -> MemoryChange:
    return MemoryChange(
        storage.n_bytes,
        kind,
        storage.phase,
        storage.module,
        storage.maker,
        storage.stream,
        is_shard=storage.is_shard and kind not in STATES,
        is_gathered=storage.is_gathered,
    )


def _but_for_size(change: MemoryChange) -> MemoryChange:
    """Sizes that happen to be equal are others in a larger batch."""
    return replace(change, n_bytes=0, is_shard=False, is_gathered=False)


class _Alike:
    """Storages that live and are alike but for their sizes, the eldest first."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._from_youngest = False

    def take(self, number: int) -> int:
        """Where it stood among them, from the nearer end: so it is the same at any depth of the model. The
        one in the middle, such as the last, is counted as the one before it was."""
        at, count = self.numbers.index(number), len(self.numbers)
        del self.numbers[at]
        if 2 * at != count - 1:
            self._from_youngest = 2 * at > count - 1
        return at - count if self._from_youngest else at


def _kinds_by_life(events: list[Event], storages: list[Storage]) -> Kinds:
    """Activations: made before some op of the backward, in forward, loss or recompute, and gone after it. The
    rest is temporary."""
    kinds: Kinds = {}
    came: dict[int, int] = {}
    backward_ops = 0
    for event in events:
        match event:
            case Op(phase=Phase.BACKWARD):
                backward_ops += 1
            case Came(number):
                came[number] = backward_ops
                kinds[number] = MemoryKind.TEMPORARY
            case Went(number) if number in came:
                made_forward = storages[number].phase in (Phase.FORWARD, Phase.LOSS, Phase.RECOMPUTE)
                if made_forward and backward_ops > came[number]:
                    kinds[number] = MemoryKind.ACTIVATION
            case _:
                pass
    return kinds
