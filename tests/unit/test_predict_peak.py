"""The peak is that of the true mesh: where few states are left of each rank's, activations make it."""

from dataclasses import replace

from shardwise.core.measurement import StepSettings
from shardwise.core.prediction import Setup
from shardwise.core.program import Block, MemoryChange, MemoryKind, Phase, Program
from shardwise.predict.machines import load_machine
from shardwise.predict.memory import forecast

GIB = 2**30
PEAKS = (
    MemoryChange(4 * GIB, MemoryKind.ACTIVATION, Phase.FORWARD, "", "a"),
    MemoryChange(-4 * GIB, MemoryKind.ACTIVATION, Phase.FORWARD, "", "a"),
    MemoryChange(6 * GIB, MemoryKind.GRADIENT, Phase.BACKWARD, "", "g"),
)
PROGRAM = Program(
    "m", "p", "native", "cuda", 0, (("fsdp", 2), ("tp", 1)), StepSettings(2, 8), 1, (Block(PEAKS),), (), (), ((MemoryKind.PARAMETER, GIB),)
)


def test_with_more_shards_the_peak_moves_to_the_activations() -> None:
    machine = load_machine("h100-sxm-80gb")
    as_traced = dict(forecast(PROGRAM, machine, Setup(), {"fsdp": 2, "tp": 1}).by_kind)
    assert as_traced == {MemoryKind.PARAMETER: GIB, MemoryKind.GRADIENT: 6 * GIB}
    larger = dict(forecast(PROGRAM, machine, Setup(), {"fsdp": 64, "tp": 1}).by_kind)
    assert larger == {MemoryKind.PARAMETER: GIB / 32, MemoryKind.ACTIVATION: 4 * GIB}


def test_more_shards_never_take_more() -> None:
    machine = load_machine("h100-sxm-80gb")
    found = [forecast(PROGRAM, machine, Setup(), {"fsdp": 2**power, "tp": 1}).active_bytes for power in range(1, 12)]
    assert found == sorted(found, reverse=True)


def test_a_pipeline_moves_it_too() -> None:
    machine = load_machine("h100-sxm-80gb")
    staged = dict(forecast(PROGRAM, machine, Setup(stages=2, micro_batches=8), {"fsdp": 2, "tp": 1}).by_kind)
    assert staged == {MemoryKind.PARAMETER: GIB / 2, MemoryKind.ACTIVATION: 4 * GIB}
    assert dict(forecast(replace(PROGRAM, blocks=()), machine, Setup(), {"fsdp": 2, "tp": 1}).by_kind) == {MemoryKind.PARAMETER: GIB}
