"""Statistics, the merging of ranks' records, verdicts, and the small instruments: all without processes."""

import math
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shardwise.core.collective import CollectiveCall, CollectiveKind
from shardwise.core.measurement import Measurement, MemoryUse, ModuleTimes, Ratio
from shardwise.measure.memory import kept_bytes
from shardwise.measure.record import RankReport, merge, uses_of
from shardwise.measure.sockets import sent_bytes, sent_since
from shardwise.measure.statistics import median_interval, paired_ratio
from shardwise.measure.verdict import noise_of, notes, standings, verdict

positive = st.floats(1e-3, 1e3)


def record(
    label: str,
    step_s: tuple[float, ...],
    *,
    repeats: str | None = None,
    calls: tuple[CollectiveCall, ...] = (),
    sent: int | None = 100,
    gradient_bytes: int = 10,
) -> Measurement:
    uses = uses_of(calls)
    return Measurement(
        label=label,
        repeats=repeats,
        plan_name=label,
        plan_toml="",
        engine="native",
        step_s=step_s,
        rank_step_s=(step_s,),
        losses=(2.0, 1.0),
        grad_norms=(1.0, 1.0),
        memory=MemoryUse(10, gradient_bytes, 20, resident_bytes=sent),
        collectives=uses,
        wire_bytes_largest_rank=sum(use.wire_bytes for use in uses),
        sent_bytes=sent,
        module_times=ModuleTimes("tok_embeddings", step_s, step_s),
        agreement=None,
    )


def call(
    wire: float, kind: CollectiveKind = CollectiveKind.ALL_TO_ALL, phase: str = "forward"
) -> CollectiveCall:
    return CollectiveCall(kind, "tp", 2, "float32", 100, wire, phase)


def measured(*plans: tuple[str, tuple[float, ...], str | None]) -> tuple[Measurement, ...]:
    return merge(
        [RankReport(tuple(record(label, times, repeats=repeats) for label, times, repeats in plans))]
    )


def test_the_interval_of_ten_values_leaves_out_one_at_each_end() -> None:
    # 1 - 2 P(Binomial(10, 1/2) < 2) = 1 - 2 x 11/1024
    low, high, reached = median_interval(range(10))
    assert (low, high) == (1, 8)
    assert reached == pytest.approx(1 - 22 / 1024)


def test_five_values_reach_less_than_95_percent_and_say_so() -> None:
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (1.0, 5.0, 1 - 2 / 32)


def test_the_interval_holds_the_median_as_often_as_it_claims() -> None:
    numbers = random.Random(1)
    samples = [[numbers.expovariate(1.0) for _ in range(12)] for _ in range(4000)]
    intervals = [median_interval(sample) for sample in samples]
    held = sum(low <= math.log(2) <= high for low, high, _ in intervals) / len(samples)
    claimed = intervals[0][2]
    assert held == pytest.approx(claimed, abs=4 * math.sqrt(claimed * (1 - claimed) / 4000))


@given(st.lists(positive, min_size=1, max_size=40))
def test_the_interval_holds_the_sample_s_own_median_and_no_more_than_its_range(values: list[float]) -> None:
    low, high, reached = median_interval(values)
    assert min(values) <= low <= sorted(values)[len(values) // 2] <= high <= max(values)
    assert 0 <= reached < 1


def test_no_values_have_no_median() -> None:
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


@given(st.lists(positive, min_size=1, max_size=20), positive)
def test_a_ratio_is_of_pairs_so_a_slow_round_that_hits_both_plans_cancels(
    values: list[float], slowness: float
) -> None:
    first = [slowness * (index + 1) for index in range(len(values))]
    twice = [2 * value for value in first]
    ratio = paired_ratio(twice, first)
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)


def test_pairs_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0], [1.0, 2.0])


def test_a_round_takes_as_long_as_its_slowest_rank() -> None:
    merged = merge([RankReport((record("a", (1.0, 4.0)),)), RankReport((record("a", (3.0, 2.0)),))])
    assert merged[0].step_s == (3.0, 4.0)
    assert merged[0].rank_step_s == ((1.0, 4.0), (3.0, 2.0))


def test_wire_bytes_are_the_mean_over_ranks_and_the_largest_rank_stands_beside() -> None:
    ranks = [
        RankReport((record("a", (1.0,), calls=(call(10), call(30))),)),
        RankReport((record("a", (1.0,), calls=(call(80), call(0))),)),
    ]
    merged = merge(ranks)[0]
    assert merged.wire_bytes == 60
    assert merged.wire_bytes_largest_rank == 80
    assert merged.collectives[0].count == 2
    assert merged.collectives[0].wire_bytes_largest_rank == 80


def test_memory_is_the_largest_rank_s_and_what_one_rank_did_not_measure_is_absent() -> None:
    merged = merge(
        [
            RankReport((record("a", (1.0,), sent=5),)),
            RankReport((record("a", (1.0,), sent=None, gradient_bytes=40),)),
        ]
    )[0]
    assert merged.memory.gradient_bytes == 40
    assert merged.memory.resident_bytes == 5
    assert merged.sent_bytes is None


def test_uses_sum_calls_of_one_kind_axis_and_phase() -> None:
    found = uses_of([call(1), call(2, phase="backward"), call(4)])
    assert [(use.phase, use.count, use.wire_bytes, use.payload_bytes) for use in found] == [
        ("forward", 2, 5, 200),
        ("backward", 1, 2, 100),
    ]


def plans_of(slow: float, noise: float = 1.0) -> tuple[Measurement, ...]:
    first = tuple(1.0 + 0.01 * index for index in range(10))
    return measured(
        ("rowwise", first, None),
        ("colwise", tuple(slow * value for value in first), None),
        (
            "rowwise (again)",
            tuple(noise * value * (1 + 0.02 * (-1) ** index) for index, value in enumerate(first)),
            "rowwise",
        ),
    )


def lines(measurements: tuple[Measurement, ...], backend: str = "nccl") -> list[str]:
    found = standings(measurements, 100)
    return [
        line
        for line in verdict(measurements, found, what="step", backend=backend)
        if not line.startswith("tok_embeddings alone")
    ]


def test_a_plan_whose_interval_leaves_out_one_is_called_faster_with_its_numbers() -> None:
    assert lines(plans_of(0.8))[0] == (
        "colwise is faster than rowwise: 0.800 (98 % interval 0.800 to 0.800, 10 pairs) of its time per "
        "step, 20 % less."
    )


def test_a_plan_whose_interval_holds_one_is_called_no_different() -> None:
    first = tuple(1.0 for _ in range(10))
    even = measured(("a", first, None), ("b", tuple(1 + 0.1 * (-1) ** index for index in range(10)), None))
    assert lines(even)[0].startswith("No difference seen between b and a: 1.000")


def test_a_difference_within_the_noise_is_said_to_be() -> None:
    assert lines(plans_of(1.01))[0].endswith("That is within this machine's noise.")


def test_a_noise_floor_that_leaves_out_one_warns() -> None:
    assert "this machine was not quiet" in lines(plans_of(0.8, noise=1.3))[1]


def test_two_rounds_are_too_few_to_claim_anything() -> None:
    few = measured(("a", (1.0, 1.0), None), ("b", (0.5, 0.5), None))
    assert lines(few) == [
        "b against a: 0.500 (50 % interval 0.500 to 0.500, 2 pairs) of its time per step. Too few rounds "
        "to tell a difference; use --rounds 6 or more."
    ]


def test_gloo_brings_the_warning_that_the_ranking_need_not_hold_on_nccl_and_nccl_does_not() -> None:
    assert "need not hold on NCCL" in lines(plans_of(0.8), "gloo")[-1]
    assert not any("NCCL" in line for line in lines(plans_of(0.8), "nccl"))


def test_the_module_alone_has_a_ratio_of_its_own() -> None:
    measurements = plans_of(0.5)
    found = standings(measurements, 100)
    ratio = found[1].module_ratio
    assert ratio is not None
    assert ratio.median == pytest.approx(0.5)
    assert found[0].module_ratio is None
    assert noise_of(measurements, found) == found[2].ratio


def test_notes_tell_of_gradients_larger_than_parameters_and_of_a_hot_rank() -> None:
    hot = merge(
        [
            RankReport((record("routed", (1.0,), calls=(call(10),), gradient_bytes=3 << 20),)),
            RankReport((record("routed", (1.0,), calls=(call(90),), gradient_bytes=3 << 20),)),
        ]
    )
    text = "\n".join(notes(hot))
    assert "routed: gradients take 3,072 KiB" in text
    assert "routed: the rank that sends most sends 1.80 times the mean" in text


def test_a_plan_without_a_backend_reduce_scatter_is_noted_once_for_all() -> None:
    pair = merge([RankReport(tuple(record(label, (1.0,), calls=(call(1),)) for label in ("a", "b")))])
    assert sum("an all-to-all and a local sum" in line for line in notes(pair)) == 1
    real = merge(
        [RankReport((record("a", (1.0,), calls=(call(1), call(1, CollectiveKind.REDUCE_SCATTER))),))]
    )
    assert notes(real) == ()


def test_an_interval_says_whether_it_holds_one() -> None:
    ratio = Ratio(1.1, 1.0, 1.2, 0.95, 10)
    assert ratio.holds_one
    assert not replace(ratio, low=1.05).holds_one


def test_kept_bytes_are_counted_from_the_tensors() -> None:
    model = nn.Linear(3, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert kept_bytes(model, optimizer) == (80, 0, 0)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert kept_bytes(model, optimizer) == (80, 80, 80)


def test_bytes_sent_on_a_socket_are_seen() -> None:
    before = sent_bytes()
    if before is None:
        pytest.skip("this system doesn't tell what a socket sent")
    with connected() as (client, received):
        sent(client, received, 5000)
        assert sent_since(before) == 5000


def test_a_socket_that_closes_meanwhile_takes_nothing_from_what_the_others_sent() -> None:
    with connected() as (client, received):
        with connected() as (old_client, old_received):
            sent(old_client, old_received, 9000)
            before = sent_bytes()
            if before is None:
                pytest.skip("this system doesn't tell what a socket sent")
        sent(client, received, 5000)
        assert sent_since(before) == 5000


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        received, _ = server.accept()
        with received:
            yield client, received


def sent(client: socket.socket, received: socket.socket, n_bytes: int) -> None:
    client.sendall(b"x" * n_bytes)
    assert len(received.recv(n_bytes, socket.MSG_WAITALL)) == n_bytes


def test_every_pair_of_order_statistics_is_symmetric() -> None:
    for low, high in combinations(range(8), 2):
        values = [float(value) for value in (low, high, 3, 4, 5, 6)]
        mirrored = [-value for value in values]
        low_, high_, reached = median_interval(values)
        assert median_interval(mirrored) == (-high_, -low_, reached)
