"""One small sum over all ranks a step: how long it took and in what, who waited longest for text, and whether
anybody was asked to stop.

It is begun at a step's end and read at the next one's, so nobody waits for it; what it says, all ranks learn
at the same step.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Beat:
    """The most that any rank said. stop: whether one was asked to; saving: one was writing a checkpoint;
    held_bytes: 0 where it isn't known. phases_s: alike many on all ranks. data_rank: the rank of data_s."""

    seconds: float
    data_s: float
    held_bytes: int
    stop: bool
    saving: bool = False
    phases_s: tuple[float, ...] = ()
    data_rank: int = 0


class Pulse:
    """All ranks make one, and call it alike. The numbers travel between hosts, not GPUs: nothing on a GPU
    waits."""

    def __init__(self) -> None:
        self._ranks = dist.get_world_size()
        self._group = dist.new_group(backend="gloo") if self._ranks > 1 else None
        self._begun: tuple[torch.Tensor, dist.Work | None] | None = None

    def begin(self, beat: Beat) -> None:
        """Sends what this rank has to say of a step."""
        assert self._begun is None
        # whole microseconds, and the rank in what is left: the largest one tells whose it is
        waited = round(beat.data_s * 1e6) * self._ranks + dist.get_rank()
        said = [beat.seconds, beat.data_s, beat.held_bytes, beat.stop, beat.saving, waited, *beat.phases_s]
        numbers = torch.tensor(said, dtype=torch.float64, device="cpu")
        work = None
        if self._group is not None:
            work = dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._begun = (numbers, work)

    def end(self) -> Beat | None:
        """What all said of the step before; None before the first one."""
        if self._begun is None:
            return None
        (numbers, work), self._begun = self._begun, None
        if work is not None:
            work.wait()
        seconds, data_s, held_bytes, stop, saving, waited, *phases_s = numbers.tolist()
        return Beat(
            seconds,
            data_s,
            int(held_bytes),
            bool(stop),
            bool(saving),
            tuple(phases_s),
            int(waited) % self._ranks,
        )
