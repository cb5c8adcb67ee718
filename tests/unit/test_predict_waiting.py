"""Waiting for late ranks: the maximum of n normal variates, and what ranks that are drawn by chance wait for
one another, beside what is predicted."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardwise.core.decomposition import decompose
from shardwise.core.machine import Spread
from shardwise.core.mesh import Mesh
from shardwise.core.order_statistics import expected_maximum, variance_of_maximum
from shardwise.core.prediction import Setup, Term
from shardwise.predict.layout import Layout, lay_out
from shardwise.predict.predict import predict, prediction_of, step_s
from shardwise.predict.streams import beside_layers, is_gather, needed_by
from shardwise.predict.timeline import timeline_of
from shardwise.predict.work import Work, joined
from tests.unit.test_predict_timeline import machine, program

SPREAD_S = 2e-3
TRIALS = 400


# Harter 1961, Expected values of normal order statistics; David and Nagaraja 2003, table of variances
@pytest.mark.parametrize(
    ("count", "mean", "variance"),
    [(1, 0, 1), (2, 0.56419, 0.68169), (3, 0.84628, 0.55947), (5, 1.16296, 0.44753), (10, 1.53875, 0.34434)],
)
def test_the_largest_of_n_is_as_tables_have_it(count: int, mean: float, variance: float) -> None:
    assert expected_maximum(count) == pytest.approx(mean, abs=1e-5)
    assert variance_of_maximum(count) == pytest.approx(variance, abs=2e-5)


@given(st.integers(3, 1_000_000))
@settings(max_examples=20, deadline=None)
def test_the_largest_of_n_is_near_blom_s_approximation_and_grows(count: int) -> None:
    blom = NormalDist().inv_cdf((count - 0.375) / (count + 0.25))
    assert expected_maximum(count) == pytest.approx(blom, rel=0.03)
    assert expected_maximum(count - 1) < expected_maximum(count)
    assert variance_of_maximum(count - 1) > variance_of_maximum(count)


def on(mesh: str, micro_batches: int = 1, spread_s: float | None = SPREAD_S) -> Setup:
    return Setup(Mesh.parse(mesh), micro_batches, spread_s=spread_s)


def waiting_s(traced: str, setup: Setup) -> float:
    return dict(predict(program(traced), machine(), setup).terms)[Term.WAITING]


def test_nothing_is_waited_for_where_nobody_says_how_far_apart_ranks_come_or_no_rank_is_there() -> None:
    assert waiting_s("fsdp=2,tp=2", on("fsdp=2,tp=2", spread_s=None)) == 0
    assert waiting_s("fsdp=2,tp=2", on("fsdp=2,tp=2", spread_s=0.0)) == 0
    assert waiting_s("fsdp=2,tp=2", replace(on("fsdp=2,tp=2"), without=(Term.WAITING,))) == 0
    assert waiting_s("tp=1", on("tp=1")) == 0


def test_a_machine_s_spread_counts_unless_another_is_given() -> None:
    here = replace(machine(), spread=Spread(SPREAD_S))
    traced, as_it_says = program("tp=2"), on("tp=2", spread_s=None)
    assert step_s(traced, here, as_it_says) == step_s(traced, machine(), on("tp=2"))
    assert step_s(traced, here, on("tp=2", spread_s=0.0)) == step_s(traced, machine(), as_it_says)
    at_collectives = replace(here, spread=Spread(SPREAD_S, 1e-5))
    assert step_s(traced, at_collectives, as_it_says) > step_s(traced, here, as_it_says)


@pytest.mark.parametrize("mesh", ["tp=2", "fsdp=2,tp=2", "dp=2,tp=2"])
def test_waiting_is_added_to_the_step_and_moves_no_other_term(mesh: str) -> None:
    apart, together = (
        predict(program(mesh), machine(), on(mesh, 3, spread_s)) for spread_s in (SPREAD_S, None)
    )
    terms, before = dict(apart.terms), dict(together.terms)
    added_s = terms.pop(Term.WAITING)
    assert added_s > 0 == before.pop(Term.WAITING)
    assert terms == pytest.approx(before)
    assert apart.step_s == pytest.approx(together.step_s + added_s)


def test_more_ranks_wait_longer_as_the_maximum_of_so_many_grows() -> None:
    replicas = (2, 8, 512)
    waits = [waiting_s("dp=2,tp=1", on(f"dp={ranks},tp=1")) for ranks in replicas]
    expected = [expected_maximum(ranks) for ranks in replicas]
    assert waits[1] / waits[0] == pytest.approx(expected[1] / expected[0], rel=0.02)
    assert waits[2] / waits[0] == pytest.approx(expected[2] / expected[0], rel=0.02)


@pytest.mark.parametrize("mesh", ["tp=2", "fsdp=2,tp=2"])
def test_a_timeline_s_ranks_wait_as_long_as_the_term_says(mesh: str) -> None:
    layout = lay_out(program(mesh), machine(), on(mesh))
    punctual = lay_out(program(mesh), machine(), on(mesh, spread_s=None))
    apart, together = decompose(timeline_of(layout)), decompose(timeline_of(punctual))
    added_ns = apart[0].parts.total_ns - together[0].parts.total_ns
    assert added_ns / 1e9 == pytest.approx(dict(prediction_of(layout).terms)[Term.WAITING], rel=1e-3)
    if mesh == "tp=2":
        assert apart[0].parts.exposed_waiting_ns == pytest.approx(added_ns, rel=1e-3)


@pytest.mark.parametrize(
    ("mesh", "micro_batches", "within"),
    [
        ("tp=2", 1, 0.1),
        ("dp=8,tp=2", 1, 0.1),
        ("dp=32,tp=2", 4, 0.1),
        ("dp=16,tp=1", 2, 0.1),
        ("fsdp=4,tp=2", 3, 0.1),
        # what a late rank costs transfers that run one behind the other is counted too low
        ("fsdp=8,tp=1", 1, 0.35),
        ("fsdp=8,tp=1", 3, 0.35),
    ],
)
def test_ranks_that_are_late_by_chance_wait_as_long_as_is_predicted(
    mesh: str, micro_batches: int, within: float
) -> None:
    traced = ",".join(f"{name}=2" if size > 1 else f"{name}=1" for name, size in Mesh.parse(mesh).axes)
    layout = lay_out(program(traced), machine(), on(mesh, micro_batches))
    punctual = lay_out(program(traced), machine(), on(mesh, micro_batches, None))
    drawn_s = _drawn_s(layout, micro_batches, SPREAD_S) - _drawn_s(layout, micro_batches, 0.0)
    predicted_s = prediction_of(layout).step_s - prediction_of(punctual).step_s
    assert predicted_s == pytest.approx(drawn_s, rel=within)


Times = NDArray[np.float64]


def _drawn_s(layout: Layout, micro_batches: int, spread_s: float) -> float:
    """A step's mean length over trials: every rank of a grid (data ranks, tensor ranks) works for itself."""
    sizes = dict(layout.mesh.axes)
    tensor = sizes.pop("tp")
    data = int(np.prod(list(sizes.values())))
    random = np.random.default_rng(0)
    now: Times = np.zeros((TRIALS, data, tensor))
    passes = [layout.busiest.forward, layout.busiest.backward] * micro_batches
    communicated = now
    for work in passes:
        now, communicated = _walked(work, now, communicated, spread_s, random)
    now, _ = _walked(layout.end, np.maximum(now, communicated), communicated, spread_s, random)
    return float(now.max((1, 2)).mean())


def _walked(
    work: Work, now: Times, communicated: Times, spread_s: float, random: np.random.Generator
) -> tuple[Times, Times]:
    """When each rank has a pass behind it, and when its transfers beside the layers have ended."""
    beside, came = beside_layers(work), now
    arrives: dict[int, Times] = {}
    for row in range(len(work)):
        takes_s, needed = float(work.device_s[row]), needed_by(work, row)
        axis = 1 if work.axis[row] and work.axes[int(work.axis[row]) - 1] != "tp" else 2
        if beside[row]:
            early = is_gather(work, row) and needed == int(work.layer[row])
            communicated = np.maximum(communicated, came if early else now).max(axis, keepdims=True) + takes_s
            communicated = np.broadcast_to(communicated, now.shape)
            if is_gather(work, row):
                arrives[needed] = communicated
            continue
        if row and beside[row - 1]:
            now = came = np.maximum(now, arrives.pop(int(work.layer[row]), now))
        if work.axis[row] == 0:
            now = now + takes_s + random.standard_normal(now.shape) * spread_s * takes_s**0.5
        elif takes_s:
            now = np.broadcast_to(now.max(axis, keepdims=True) + takes_s, now.shape)
    return now, communicated


def test_work_is_joined_with_its_waits() -> None:
    layout = lay_out(program("tp=2"), machine(), on("tp=2"))
    both = joined([layout.busiest.forward, layout.busiest.backward])
    waits_s = layout.busiest.forward.waits_s.sum() + layout.busiest.backward.waits_s.sum()
    assert both.waits_s.sum() == pytest.approx(waits_s)
    assert not both.punctual.waits_s.any()
