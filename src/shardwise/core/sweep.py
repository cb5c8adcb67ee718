"""Sweep: predictions of one model over meshes, stages and micro-batches on a number of devices, best first.
Standard library."""

from dataclasses import dataclass

from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import MemoryForecast, Setup, Term
from shardwise.core.prediction_run import MachineFacts


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One way to use the devices. micro_batch: sequences of a data-parallel rank at a time; micro_batches: of
    them, in a step. terms: seconds, adding up to step_s. chunks: of layers that each stage holds."""

    plan: str
    axes: tuple[tuple[str, int], ...]
    micro_batch: int
    micro_batches: int
    tokens: int
    step_s: float
    terms: tuple[tuple[Term, float], ...]
    memory: MemoryForecast
    chunks: int = 1

    @property
    def stages(self) -> int:
        return Mesh(self.axes).stages

    @property
    def devices(self) -> int:
        return Mesh(self.axes).world_size

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens / self.step_s / self.devices

    @property
    def fits(self) -> bool:
        return self.memory.fits


@dataclass(frozen=True, slots=True)
class Refusal:
    """Meshes that can't be, by reason: how many points were left out for it."""

    plan: str
    reason: str
    points: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """points: those that fit first, each part by throughput. settings: batch is 0 where it follows from each
    point. setup: its mesh has the axes that all points share. traces: Programs that were traced; all others
    were derived from them."""

    model: str
    machine: MachineFacts
    devices: int
    settings: StepSettings
    setup: Setup
    points: tuple[SweepPoint, ...]
    refused: tuple[Refusal, ...]
    traces: int
    schema_version: int = 1
