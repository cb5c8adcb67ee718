"""Samples that a known machine would give, fitted: that machine comes back."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from shardwise.core.case import StepSettings
from shardwise.core.collective import TIMED, CollectiveKind, wire_bytes
from shardwise.core.errors import MachineError
from shardwise.core.machine import FRESH, AttentionRate, Launch, Machine, MatmulRate, Spread, Tile, on_curve
from shardwise.core.order_statistics import expected_maximum
from shardwise.core.prediction import Setup
from shardwise.core.program import Block, Op, OpKind, Phase, Program, TensorSpec
from shardwise.core.sample import ARRIVAL, Sample
from shardwise.files.machine_file import machine_from_toml
from shardwise.files.machine_text import to_toml
from shardwise.predict.costs import collective_s, fresh_memory_s
from shardwise.predict.curves import curve, median_curve, monotone
from shardwise.predict.draft import Hardware
from shardwise.predict.fit import fit
from shardwise.predict.groups import RankGroup
from shardwise.predict.search import minimise
from shardwise.predict.work import work_of

GPU = Hardware("synthetic", "cuda", "made up", 4, 80e9, 1e9, units=132)
CPU = Hardware("synthetic", "cpu", "made up", 2, 8e9, 3e8)
MATMUL = MatmulRate(
    900e12,
    132,
    (Tile(128, 256, 0.7), Tile(128, 128, 0.6), Tile(64, 128, 0.45), Tile(64, 64, 0.3)),
    3e-6,
    80.0,
)
ATTENTION = AttentionRate(600e12, 450e12, 400.0, 8e-6)
NOISE = 0.03


def sample(
    what: str,
    name: str,
    seconds: float,
    shape: tuple[int, ...] = (),
    *,
    dtype: str = "float32",
    **counts: int,
) -> Sample:
    return Sample(what, name, dtype, shape, seconds, seconds, seconds, 9, **counts)


def synthetic(noise: float = NOISE) -> Iterator[Sample]:
    """Of a machine with MATMUL, ATTENTION, copies at 2 us + bytes / 2 TB/s, and a link at 10 us + sent / 300
    GB/s."""
    random = np.random.default_rng(0)

    def about(seconds: float) -> float:
        return seconds * float(np.exp(random.normal(0, noise)))

    for m, n, k in product((256, 1024, 8192, 32768), (512, 1792, 4096, 14336), (512, 4096, 8192)):
        yield sample(
            "matmul",
            "aten::mm tn",
            about(MATMUL.time_s(1, m, n, k)),
            (1, m, n, k),
            dtype="bfloat16",
            flops=2 * m * n * k,
        )
    for seq, heads, backward in product((512, 1024, 4096, 8192), (4, 32), (False, True)):
        flops = (5 if backward else 2) * seq * seq * 128 * heads
        name = "aten::_scaled_dot_product_flash_attention" + ("_backward" if backward else "") + " causal"
        seconds = about(ATTENTION.time_s(flops, seq, backward=backward))
        yield sample("attention", name, seconds, (1, heads, heads, seq, 128), dtype="bfloat16", flops=flops)
    for name, kind in (("aten::clone", OpKind.COPY), ("aten::add", OpKind.ELEMENTWISE)):
        for power in range(10, 30, 2):
            yield sample(
                kind,
                name,
                about(2e-6 + 2**power / 2e12),
                (2**power // 8,),
                read_bytes=2 ** (power - 1),
                write_bytes=2 ** (power - 1),
            )
    for rows, width, ids in product((16000, 128000), (256, 4096), (1024, 8192, 65536)):
        elements = ids * width
        yield sample(
            OpKind.EMBEDDING,
            "aten::embedding any row",
            about(3e-6 + max(8 * elements / 2e12, elements / 160e9)),
            (rows, width, ids),
            read_bytes=4 * elements,
            write_bytes=4 * elements,
        )
    for collective, ranks, power in product(TIMED, (2, 4), range(10, 28, 3)):
        sent = round(wire_bytes(collective, 2**power, ranks))
        yield sample(
            collective,
            collective,
            about(1e-5 * ranks + sent / 3e11),
            (2**power,),
            write_bytes=sent,
            ranks=ranks,
        )


@pytest.fixture(scope="module")
def machine() -> Machine:
    return fit(list(synthetic()), GPU)


def test_matmuls_of_a_known_machine_are_predicted_at_sizes_that_were_not_timed(machine: Machine) -> None:
    found = machine.matmul("bfloat16")
    assert found is not None
    errors = [
        abs(math.log(found.time_s(1, m, n, k) / MATMUL.time_s(1, m, n, k)))
        for m, n, k in product((512, 2048, 16384), (1024, 3072, 6144, 28672), (1024, 2048, 14336))
    ]
    assert np.median(errors) < 0.05
    assert max(errors) < 0.25


def test_attention_of_a_known_machine_comes_back(machine: Machine) -> None:
    found = machine.attention("bfloat16")
    assert found is not None
    for flops, seq, backward in product((1e10, 1e12), (700, 2048, 16384), (False, True)):
        assert found.time_s(flops, seq, backward=backward) == pytest.approx(
            ATTENTION.time_s(flops, seq, backward=backward), rel=0.2
        )


def test_kernels_and_collectives_follow_their_samples(machine: Machine) -> None:
    for n_bytes in (5e4, 3e6, 2e8):
        assert machine.kernel("aten::clone").time_s(n_bytes) == pytest.approx(2e-6 + n_bytes / 2e12, rel=0.15)
    look_up = machine.kernel("aten::embedding")
    assert look_up.elements_per_s == pytest.approx(160e9, rel=0.05)
    assert look_up.start_s == pytest.approx(3e-6, rel=0.5)
    assert machine.kernel("aten::never", "copy") == dict(machine.kernels)["copy"]
    for kind in TIMED:
        sent = wire_bytes(kind, 1 << 20, 4)
        seconds = collective_s(machine, kind, sent, 1 << 20, RankGroup(((1, 4),)))
        assert seconds == pytest.approx(4e-5 + sent / 3e11, rel=0.2)


def test_the_machine_is_what_its_file_says_and_every_constant_says_what_it_was_measured_by(
    machine: Machine,
) -> None:
    assert machine_from_toml(to_toml(machine)) == machine
    sources = {each.path: each.source for each in machine.constants}
    assert all(each.startswith(("measured", "not measured")) for each in sources.values())
    assert "48 samples, median residual" in sources["matmul.bfloat16.tiles"]


def test_a_busy_cpu_makes_kernels_slower_and_leaves_collectives() -> None:
    samples = [replace(each, dtype="float32") for each in synthetic(0.0)]
    quiet, busy = (fit(samples, replace(CPU, share=share)) for share in (1.0, 0.5))
    for one, two in ((quiet.kernel("aten::add"), busy.kernel("aten::add")),):
        assert two.time_s(1e6) == pytest.approx(2 * one.time_s(1e6), rel=1e-3)
    matmuls = [each.matmul("float32") for each in (quiet, busy)]
    assert matmuls[0] is not None
    assert matmuls[1] is not None
    assert matmuls[1].time_s(1, 512, 512, 512) == pytest.approx(
        2 * matmuls[0].time_s(1, 512, 512, 512), rel=0.05
    )
    assert quiet.within == busy.within
    assert (
        "a rank got 50% of its core"
        in {each.path: each.source for each in busy.constants}["kernels.aten::add.points"]
    )


def test_fresh_memory_costs_more_only_above_the_size_at_which_it_shows() -> None:
    samples = list(synthetic())
    for power in (20, 24, 25, 26, 27):
        samples.append(
            sample(OpKind.FILL, "aten::zeros_like", 2**power / 1e10, (2**power,), write_bytes=2**power)
        )
        later = 2**power / (1e10 if power < 25 else 2e9)
        samples.append(sample(OpKind.FILL, FRESH, later, (2**power,), dtype="uint8", write_bytes=2**power))
    machine = fit(samples, CPU)

    def extra(elements: int) -> float:
        out = TensorSpec("float32", (elements,))
        return fresh_memory_s(
            Op(
                "aten::add",
                OpKind.ELEMENTWISE,
                Phase.FORWARD,
                "",
                (out,),
                (out,),
                0,
                8 * elements,
                4 * elements,
            ),
            machine,
        )

    assert extra(2**21) < 1e-6
    assert extra(2**24) == pytest.approx(2**26 * (1 / 2e9 - 1 / 1e10), rel=0.01)
    assert FRESH not in dict(fit(list(synthetic()), CPU).kernels)


def test_without_collectives_the_links_are_those_of_the_base_or_there_are_none(machine: Machine) -> None:
    alone = [each for each in synthetic() if each.what not in TIMED]
    based = fit(alone, replace(GPU, devices_per_node=1), base=machine)
    assert based.within == machine.within
    assert {each.path: each.source for each in based.constants}["links.within.bandwidth"].startswith(
        "not measured, taken from synthetic: measured"
    )
    bare = fit(alone, replace(GPU, devices_per_node=1))
    assert not bare.within.is_known
    with pytest.raises(MachineError, match="has no link: none was measured"):
        collective_s(bare, CollectiveKind.ALL_GATHER, 1e6, 2e6, RankGroup(((1, 2),)))


def arrivals(spread: Spread, ranks: int) -> list[Sample]:
    last_after_mean = expected_maximum(ranks)
    return [
        sample(
            ARRIVAL, "last", last_after_mean * spread.variance(ms / 1e3) ** 0.5, (ms * 10**6,), ranks=ranks
        )
        for ms in (0, 10, 40)
    ]


def test_how_far_apart_ranks_come_is_one_spread_whatever_the_ranks_and_the_work() -> None:
    true = Spread(0.02, 3e-4)
    found = fit([*synthetic(), *arrivals(true, 2), *arrivals(true, 8)], GPU)
    assert found.spread is not None
    assert (found.spread.work_s, found.spread.collective_s) == pytest.approx((0.02, 3e-4), rel=1e-2)
    source = {each.path: each.source for each in found.constants}["spread.work"]
    assert source.startswith("measured: arrivals of 2, 8 ranks after up to 40 ms of work, 6 samples")


def test_neither_part_of_a_spread_is_below_nothing() -> None:
    falling = [sample(ARRIVAL, "last", 1e-3 / (1 + at), (at * 10**7,), ranks=2) for at in range(3)]
    found = fit([*synthetic(), *falling], GPU).spread
    assert found is not None
    assert found.work_s == 0 < found.collective_s


def test_a_spread_that_was_not_measured_is_the_base_s_or_unknown(machine: Machine) -> None:
    assert machine.spread is None
    based = fit([*synthetic(), *arrivals(Spread(0.02), 2)], GPU)
    kernels_only = [each for each in synthetic() if each.what not in TIMED]
    taken = fit(kernels_only, GPU, base=based)
    assert taken.spread == based.spread
    assert {each.path: each.source for each in taken.constants}["spread.work"].startswith(
        f"not measured, taken from {based.name}: measured: arrivals"
    )


def program(engine: str, ops: int) -> Program:
    """`ops` additions of a few bytes in the forward, twice as many in the backward."""
    few = TensorSpec("float32", (8,))
    items = tuple(
        Op("aten::add", OpKind.ELEMENTWISE, phase, "", (few, few), (few,), 0, 64, 32)
        for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.BACKWARD)
        for _ in range(ops)
    )
    return Program(
        "tiny", engine, engine, "cpu", 0, (("tp", 1),), StepSettings(1, 8), 1, (Block(items),), (), (), ()
    )


def test_launches_are_what_small_steps_take_beyond_their_kernels_and_dtensor_has_its_own() -> None:
    samples = [replace(each, dtype="float32") for each in synthetic(0.0)]
    kernel_s = fit(samples, CPU).kernel("aten::add").time_s(96)
    programs = {"native": program("native", 10), "dtensor": program("dtensor", 10)}
    for name, issue_s in (("native", 5e-6), ("dtensor", 50e-6)):
        samples += [
            sample("launch", f"{name} {phase}", ops * (issue_s + kernel_s))
            for phase, ops in (("forward", 10), ("backward", 20))
        ]
    machine = fit([*samples, sample("launch", "collective", 7e-6)], CPU, programs)
    near = (pytest.approx(seconds, rel=0.01) for seconds in (5e-6, 5e-6, 7e-6, 50e-6, 50e-6))
    assert machine.launch == Launch(*near)  # type: ignore[arg-type]
    for name, issue_s in (("native", 5e-6), ("dtensor", 50e-6)):
        assert work_of(programs[name], machine, Setup()).host_s == pytest.approx(
            np.full(30, issue_s), rel=0.01
        )


def test_a_launch_that_was_not_measured_is_unknown_and_not_nothing(machine: Machine) -> None:
    assert machine.launch == Launch()
    assert machine.launch.unknown == ("launch.forward", "launch.backward", "launch.collective")
    assert not any(each.path.startswith("launch") for each in machine.constants)


def test_steps_that_take_no_longer_than_their_kernels_leave_the_launch_unknown() -> None:
    samples = [replace(each, dtype="float32") for each in synthetic(0.0)]
    samples += [sample("launch", f"native {phase}", 1e-12) for phase in ("forward", "backward")]
    assert fit(samples, CPU, {"native": program("native", 10)}).launch == Launch()


def test_a_curve_never_falls_and_goes_through_the_middle_of_like_sizes() -> None:
    assert curve([(100, 1.0), (105, 3.0), (110, 2.0), (1000, 5.0), (2000, 4.0)]) == (
        (105.0, 2.0),
        (1000.0, 4.472),
        (2000.0, 4.472),
    )
    assert monotone(np.array([1.0, 3.0, 2.0]), [1, 1, 3]) == [1.0, 2.25, 2.25]
    assert on_curve(
        median_curve([((1.0, 1.0), (16.0, 16.0)), ((1.0, 3.0), (16.0, 48.0)), ((4.0, 8.0),)]), 4.0
    ) == pytest.approx(8.0)


def test_the_search_finds_a_valley_with_kinks() -> None:
    found, cost = minimise(
        lambda at: abs(math.log(at[0] / 7.0)) + abs(math.log(at[1] * at[0] / 0.21)), np.array([1.0, 1.0])
    )
    assert found == pytest.approx([7.0, 0.03], rel=0.05)
    assert cost < 0.02
