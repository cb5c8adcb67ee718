"""Sample: one kernel, collective or launch as it was timed on a machine; Calibration: what is fitted to all
of them."""

from dataclasses import dataclass

from shardwise.core.machine import Machine

ARRIVAL = "arrival"


@dataclass(frozen=True, slots=True)
class Sample:
    """`seconds`: the median of `repeats` timings, between the quartiles `low_s` and `high_s`.

    what: an OpKind, a CollectiveKind, "launch", or ARRIVAL: how long after the mean rank the last one comes
    to a collective. name: the op ("aten::mm"), with what sets it apart ("tn", "causal"). shape: a matmul's
    (batch, m, n, k), an attention's (batch, heads, KV heads, sequence, head dim), an arrival's nanoseconds
    of the work before it, else what the op's docstring says. read_bytes, write_bytes, flops: as
    core/program.py counts them. ranks: that took part, or that ran the same beside it.
    """

    what: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    seconds: float
    low_s: float
    high_s: float
    repeats: int
    flops: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    ranks: int = 1

    @property
    def n_bytes(self) -> int:
        return self.read_bytes + self.write_bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """A case that was left out, and why."""

    case: str
    reason: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """A machine as it was measured. notes: what a reader must know of what was not."""

    machine: Machine
    ranks: int
    samples: tuple[Sample, ...]
    failed: tuple[Failed, ...]
    notes: tuple[str, ...]
    schema_version: int = 1
