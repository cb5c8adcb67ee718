"""Interleaved rounds: every plan once per round, the starting place rotating, so that drift and order fall on
all alike."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from shardwise.measure.subject import Subject
from shardwise.step.portion import MicroBatches

ROOM = 0.85
"""Of the device's memory: the rest is the allocator's, and the backend's."""


class Turns:
    """Subjects that share a device: all on it at once, or, where all of them with one's working memory would
    not fit, one at a time while the others wait in host memory."""

    def __init__(self, device: torch.device, n_subjects: int) -> None:
        self._device = device
        self._n_others = n_subjects - 1
        self._are_taken = False

    def built(self, subject: Subject) -> None:
        """After a subject's first step: sends it away where turns are taken. All ranks call it."""
        if self._device.type == "cuda":
            needed = subject.needed_bytes
            total = torch.cuda.get_device_properties(self._device).total_memory
            fits = needed is None or needed[0] * self._n_others + needed[1] <= ROOM * total
            is_full = torch.tensor(int(not fits), device=self._device)
            dist.all_reduce(is_full, op=dist.ReduceOp.MAX)
            self._are_taken |= bool(is_full.item())
        if self._are_taken:
            subject.park()

    @contextmanager
    def of(self, subject: Subject) -> Iterator[None]:
        """While it has the device."""
        subject.unpark()
        yield
        if self._are_taken:
            subject.park()


def run_rounds(
    subjects: Sequence[Subject],
    rounds: int,
    batch_at: Callable[[int], MicroBatches],
    *,
    first_step: int,
    module_only: bool,
    turns: Turns,
    on_timed: Callable[[int, int, float], None],
) -> None:
    """Times every subject in every round: a whole step (unless module_only) and its module alone, where it
    has one.

    batch_at(step): this rank's micro-batches, the same for all subjects. on_timed(round, subject's index,
    this rank's seconds) after each.
    """
    for round_ in range(rounds):
        for place in range(len(subjects)):
            index = (place + round_) % len(subjects)
            subject = subjects[index]
            with turns.of(subject):
                seconds = subject.timed_module()
                if module_only:
                    subject.step_s.append(seconds)
                else:
                    seconds = subject.timed_step(batch_at(first_step + round_))
            on_timed(round_, index, seconds)
