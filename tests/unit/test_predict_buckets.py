"""Gradients of replicas summed beside the backward: how they are cut into buckets, what outlasts the
backward, and that what is drawn and what is said agree. And with FSDP: each rank sums its own shard."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from shardwise.core.decomposition import decompose
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import Precision, Setup, Term
from shardwise.core.program import Phase
from shardwise.predict.buckets import bucket_bytes
from shardwise.predict.layout import Layout, lay_out
from shardwise.predict.predict import predict, prediction_of
from shardwise.predict.streams import run, sums_of_replicas
from shardwise.predict.timeline import timeline_of
from tests.unit.test_predict_timeline import machine, program

TRACED = "dp=2,tp=2"
BOTH = "dp=2,fsdp=2,tp=1"


def beside(mesh: str = "dp=8,tp=2", micro_batches: int = 1, **changes: float) -> Setup:
    setup = Setup(Mesh.parse(mesh), micro_batches, overlap_data=True)
    return replace(setup, **changes)  # type: ignore[arg-type]


def laid(traced: str, setup: Setup) -> Layout:
    return lay_out(program(traced), machine(), setup)


def term(layout: Layout, which: Term) -> float:
    return dict(prediction_of(layout).terms)[which]


def test_ddp_s_first_bucket_is_small_and_megatron_s_grow_with_the_ranks() -> None:
    assert bucket_bytes(Setup(), "bfloat16", 8) == (2.0**20, 25 * 2.0**20)
    megatron = Setup(precision=Precision.MASTER)
    assert bucket_bytes(megatron, "float32", 8) == (160e6, 160e6)
    assert bucket_bytes(megatron, "float32", 64) == (256e6, 256e6)
    assert bucket_bytes(Setup(bucket_mib=4), "float32", 64) == (2.0**22, 2.0**22)


def test_buckets_go_as_layers_from_the_last_one_fill_them_and_hold_all_gradients() -> None:
    layout = laid(TRACED, beside(bucket_mib=2.0))
    last, rows = layout.last, sums_of_replicas(layout.last)
    n_bytes = sum(holding.gradient_bytes for holding in program(TRACED).holdings)
    assert len(rows) == -(-n_bytes // 2**21)
    layers = [int(last.layer[row]) for row in rows]
    inside = [layer for layer in layers if layer >= 0]
    assert inside == sorted(inside, reverse=True)
    assert layers[-1] == -1  # the embedding's, which comes before the layers
    for row, layer in zip(rows, layers, strict=True):
        # nothing of that layer runs backward after its bucket went
        assert not (last.layer[row + 1 :][last.axis[row + 1 :] == 0] == layer).any()
    left = [layout.end.item(int(row)) for row in np.flatnonzero(layout.end.axis > 0)]
    assert not [item for item in left if item.phase is Phase.REDUCE and item.is_many]  # type: ignore[union-attr]


@pytest.mark.parametrize("spread_s", [None, 2e-3])
@pytest.mark.parametrize(("traced", "mesh"), [(TRACED, "dp=8,tp=2"), (BOTH, "dp=8,fsdp=8,tp=1")])
@pytest.mark.parametrize("bucket_mib", [None, 1.0])
def test_what_is_drawn_and_what_is_said_agree(
    traced: str, mesh: str, bucket_mib: float | None, spread_s: float | None
) -> None:
    setup = replace(beside(mesh), bucket_mib=bucket_mib, spread_s=spread_s)
    layout = laid(traced, setup)
    (drawn,) = decompose(timeline_of(layout))
    said_s = prediction_of(layout).step_s - term(layout, Term.SLOWED)
    assert drawn.parts.total_ns / 1e9 == pytest.approx(said_s, rel=1e-3, abs=2e-6)


def test_the_last_bucket_is_never_hidden_and_what_is_hidden_slows_compute_down() -> None:
    apart = laid(TRACED, replace(beside(), overlap_data=False))
    together = laid(TRACED, beside(bucket_mib=8.0))
    outlasts_s = run(together.last).length_s - run(together.busiest.backward).length_s
    last_bucket_s = float(together.last.device_s[sums_of_replicas(together.last)[-1]])
    assert outlasts_s >= last_bucket_s - 1e-9
    all_s = float(together.last.device_s[sums_of_replicas(together.last)].sum())
    slowed_s = term(together, Term.SLOWED) - term(apart, Term.SLOWED)
    assert slowed_s == pytest.approx(0.189 * (all_s - outlasts_s))


def test_on_a_cpu_nothing_is_summed_beside_the_backward() -> None:
    here, traced = machine(device="cpu"), program("dp=2,tp=1", "cpu")
    on = partial(predict, traced, here)
    assert on(Setup(overlap_data=True)).step_s == on(Setup()).step_s


@pytest.mark.parametrize("overlap", [False, True])
def test_replicas_of_fsdp_s_shards_sum_their_own_shard(overlap: bool) -> None:
    rescaled = replace(beside("dp=2,fsdp=4,tp=1"), overlap_data=overlap)
    derived, traced = (lay_out(program(mesh), machine(), rescaled) for mesh in (BOTH, "dp=2,fsdp=4,tp=1"))
    assert term(derived, Term.DATA) == pytest.approx(term(traced, Term.DATA), rel=0.01)


def test_stages_sum_their_own_gradients() -> None:
    whole, halves = (laid(TRACED, Setup(Mesh.parse(f"{stages}dp=8,tp=2"), 4)).end for stages in ("", "pp=2,"))
    rows = np.flatnonzero(whole.axis > 0)
    largest = rows[np.argmax(whole.device_s[rows])]
    assert halves.device_s[largest] < whole.device_s[largest]
    others = rows[rows != largest]  # of a number each, whatever the stages
    assert (halves.device_s[others] == whole.device_s[others]).all()
