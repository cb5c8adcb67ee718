"""Ranks as threads of this process, on a process group that keeps a copy of every buffer that went through
it.

Nothing global is changed but that torch.distributed is told, while they run, which ranks a group has: it
works beside a real process group and without one. For toys: all ranks share one interpreter. What a plan does
on a backend of its own (gloo's pairwise reduce-scatter) isn't chosen here.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.collective import CollectiveKind, Origin
from shardwise.core.errors import RunError
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.parallel.axis import Target, as_if_on
from shardwise.parallel.issuing import issuing
from shardwise.torch_private import told_ranks_of

T = TypeVar("T")

# a rank that waits this long waits for one that will not come: the work is a few milliseconds
TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Exchanged:
    """One collective as one rank issued it: the block for each destination, the block from each source, and
    what the rank was left with.

    In a gather and an all-reduce the blocks for all destinations are the same one.
    """

    kind: CollectiveKind
    origin: Origin
    sent: tuple[Tensor, ...]
    received: tuple[Tensor, ...]
    result: Tensor


class _Wire:
    """Where the ranks of a group meet: what each has laid down for the others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.blocks: list[tuple[CollectiveKind, tuple[Tensor, ...]] | None] = [None] * size
        ends = [(source, to) for source in range(size) for to in range(size)]
        self.mail: dict[tuple[int, int], SimpleQueue[Tensor]] = {each: SimpleQueue() for each in ends}


class _ThreadGroup(dist.ProcessGroup):
    """One rank's end of the wire, with the methods that torch.distributed calls."""

    def __init__(self, wire: _Wire, rank: int) -> None:
        super().__init__(rank, wire.size)  # type: ignore[call-arg]
        self.log: list[Exchanged] = []
        self._wire = wire
        self._rank = rank
        self._sent: tuple[Tensor, ...] = ()

    def _get_backend(self, device: torch.device) -> Any:
        """torch asks it since 2.14 whether several sends can go as one, which these can't."""
        return self

    @property
    def supports_coalescing(self) -> bool:
        return False

    def send(self, tensors: list[Tensor], dstRank: int, tag: int) -> None:  # type: ignore[override]
        block = tensors[0].detach().clone()
        self._sent = self._at(dstRank, block)
        self._wire.mail[self._rank, dstRank].put(block)

    def recv(self, tensors: list[Tensor], srcRank: int, tag: int) -> None:  # type: ignore[override]
        """Of a rank that sends to one and takes from one at a time, both are one entry of the log."""
        issue = issuing()
        if issue is None:
            raise AssertionError("a send: issued by nobody")
        try:
            block = self._wire.mail[srcRank, self._rank].get(timeout=TIMEOUT_S)
        except Empty:
            raise _stuck() from None
        tensors[0].detach().copy_(block)
        received = self._at(srcRank, block)
        self.log.append(Exchanged(CollectiveKind.SEND, issue.origin, self._sent, received, block))

    def _at(self, peer: int, block: Tensor) -> tuple[Tensor, ...]:
        """A block for or from one rank, and nothing for the others."""
        nothing = block.new_empty(0)
        return tuple(block if rank == peer else nothing for rank in range(self._wire.size))

    def all_to_all_single(  # type: ignore[override]
        self,
        output: Tensor,
        input: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = None,
    ) -> None:
        self._exchange(CollectiveKind.ALL_TO_ALL, input.split(input_splits), output, torch.cat)

    def reduce_scatter_single(  # type: ignore[override]
        self, output: Tensor, input: Tensor, opts: Any = None
    ) -> None:
        self._exchange(CollectiveKind.REDUCE_SCATTER, input.chunk(self._wire.size), output, _sum)

    def all_gather_single(  # type: ignore[override]
        self, output: Tensor, input: Tensor, opts: Any = None
    ) -> None:
        self._exchange(CollectiveKind.ALL_GATHER, [input] * self._wire.size, output, torch.cat)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> None:  # type: ignore[override]
        self._exchange(CollectiveKind.ALL_REDUCE, [tensors[0]] * self._wire.size, tensors[0], _sum)

    def _exchange(
        self,
        kind: CollectiveKind,
        blocks: Sequence[Tensor],
        output: Tensor,
        join: Callable[[tuple[Tensor, ...]], Tensor],
    ) -> None:
        issue = issuing()
        if issue is None:
            raise AssertionError(f"{kind}: issued by nobody")
        wire = self._wire
        with torch.no_grad():
            sent = tuple(block.detach().clone() for block in blocks)
            wire.blocks[self._rank] = (kind, sent)
            wire.barrier.wait(TIMEOUT_S)
            met = [block for block in wire.blocks if block is not None]
            kinds = [kind for kind, _ in met]
            if len(set(kinds)) > 1:
                raise RunError(f"ranks issued different collectives at one time: {', '.join(kinds)}.")
            received = tuple(block[self._rank] for _, block in met)
            wire.barrier.wait(TIMEOUT_S)
            output.detach().copy_(join(received).view_as(output))
        self.log.append(Exchanged(kind, issue.origin, sent, received, output.detach().clone()))


class _ThreadMesh(DeviceMesh):
    """A mesh "tp" of one thread's group, equal to itself alone: no cache takes it for another's."""

    def __init__(self, group: _ThreadGroup, rank: int, size: int) -> None:
        super().__init__(
            "cpu",
            torch.arange(size, device="cpu"),
            mesh_dim_names=(TENSOR_AXIS,),
            _init_backend=False,
            _rank=rank,
        )
        self._group = group
        self._own_rank = rank

    def get_group(self, mesh_dim: int | str | None = None) -> dist.ProcessGroup:
        return self._group

    def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
        return self._own_rank

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def on_threads(size: int, work: Callable[[int, DeviceMesh, list[Exchanged]], T]) -> list[T]:
    """work(rank, mesh, log of the rank's collectives) on `size` ranks at once -> what each returned.

    Raises what a rank raised (the first that wasn't merely waiting for it), or RunError where ranks wait for
    each other for ever.
    """
    wire = _Wire(size)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def rank_thread(rank: int) -> None:
        try:
            group = _ThreadGroup(wire, rank)
            with as_if_on(Target("cpu", "threads")), told_ranks_of(group, size):
                results[rank] = work(rank, _ThreadMesh(group, rank, size), group.log)
        except BaseException as error:
            errors.append(error)
            wire.barrier.abort()

    threads = [
        threading.Thread(target=rank_thread, args=(rank,), name=f"shardwise rank {rank}", daemon=True)
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
    if errors:
        raise next(
            (error for error in errors if not isinstance(error, threading.BrokenBarrierError)), _stuck()
        )
    if len(results) < size:
        wire.barrier.abort()
        raise _stuck()
    return [results[rank] for rank in range(size)]


def _stuck() -> RunError:
    return RunError(
        "ranks waited for each other: they did not issue the same collectives. This is a bug in a style."
    )


def _sum(blocks: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(blocks).sum(0)
