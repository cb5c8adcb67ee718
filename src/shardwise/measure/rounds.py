"""Interleaved rounds: every plan once per round, the starting place rotating, so that drift and order fall on all alike."""

from collections.abc import Callable, Sequence

from shardwise.measure.subject import MicroBatches, ModuleAlone, Subject


def run_rounds(
    subjects: Sequence[Subject],
    rounds: int,
    batch_at: Callable[[int], MicroBatches],
    *,
    first_step: int,
    alone: Sequence[ModuleAlone | None],
    module_only: bool,
    parked: bool,
    on_timed: Callable[[int, int, float], None],
) -> None:
    """Times every subject in every round: a whole step (unless module_only) and its module alone, where it has one.

    batch_at(step): this rank's micro-batches, the same for all subjects. parked: subjects wait in host memory between their turns.
    on_timed(round, subject's index, this rank's seconds) after each.
    """
    for round_ in range(rounds):
        for place in range(len(subjects)):
            index = (place + round_) % len(subjects)
            subject = subjects[index]
            if parked:
                subject.unpark()
            module = alone[index]
            seconds = 0.0
            if module is not None:
                seconds = subject.timed_module(module)
            if module_only:
                subject.step_s.append(seconds)
            else:
                seconds = subject.timed_step(batch_at(first_step + round_))
            if parked:
                subject.park()
            on_timed(round_, index, seconds)
