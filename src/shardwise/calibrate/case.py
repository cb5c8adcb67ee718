"""A kernel to time: what makes its tensors and its call, and the Sample that its timing gives.

A case makes its tensors when its turn comes and drops them after, on normally distributed numbers: zeros
would draw less power and run faster. Each is drawn from a generator of its own, before the call is captured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from shardwise.calibrate.clock import Timing, time_kernel
from shardwise.core.program import OpKind, TensorSpec
from shardwise.core.sample import Sample
from shardwise.trace.catalogue import flops_of, kind_of, traffic_of

REPEATED = 1 << 18


@dataclass(frozen=True, slots=True)
class Work:
    """A call to time, with the tensors that it reads (as the op takes them), makes and writes in place."""

    call: Callable[[], object]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] = ()
    written: tuple[Tensor, ...] = ()
    causal: bool = False
    graph: bool = True  # whether a CUDA graph can hold it


@dataclass(frozen=True, slots=True)
class Draw:
    """Makes a case's tensors."""

    device: torch.device
    dtype: torch.dtype

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        if (
            self.device.type == "cpu" and prod(shape) > REPEATED
        ):  # drawing would take longer than what is timed
            block = torch.randn(REPEATED, generator=self.generator()).to(self.dtype)
            return block.repeat(-(-prod(shape) // REPEATED))[: prod(shape)].view(shape)
        return torch.randn(*shape, dtype=self.dtype, device=self.device, generator=self.generator())

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    def rows(self, count: int, rows: int) -> Tensor:
        """Numbers of `count` of a table's rows."""
        return torch.randint(rows, (count,), device=self.device, generator=self.generator())


Make = Callable[[Draw], Work]


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel to time. op: its catalogue name; variant: what sets it apart from others of that op."""

    op: str
    variant: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int  # that the case's tensors take, about
    make: Make


def run_case(case: Case, device: torch.device) -> Sample:
    """Times one case. Raises RuntimeError where the device has no such kernel, or no memory for it."""
    return timed_case(case, device)[0]


def timed_case(case: Case, device: torch.device) -> tuple[Sample, Timing]:
    """run_case, and how its seconds came about."""
    work = case.make(Draw(device, getattr(torch, case.dtype)))
    timing = time_kernel(work.call, device, graph=work.graph)
    kind = kind_of(case.op, "cpu")
    inputs, outputs = ([_spec(tensor) for tensor in tensors] for tensors in (work.inputs, work.outputs))
    has_flops = kind in (OpKind.MATMUL, OpKind.ATTENTION)
    read, write = traffic_of(case.op, inputs, _sizes(work.inputs), _sizes(work.outputs), _sizes(work.written))
    sample = Sample(
        what=str(kind),
        name=f"{case.op} {case.variant}".strip(),
        dtype=case.dtype,
        shape=case.shape,
        seconds=timing.seconds,
        low_s=timing.low_s,
        high_s=timing.high_s,
        repeats=timing.repeats,
        flops=flops_of(case.op, inputs, outputs, causal=work.causal) if has_flops else 0,
        read_bytes=read,
        write_bytes=write,
    )
    return sample, timing


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _sizes(tensors: tuple[Tensor, ...]) -> list[int]:
    return [tensor.nbytes for tensor in tensors]
