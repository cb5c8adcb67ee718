"""The predicted step as a Timeline: what decompose() finds in it is what the terms say, and stages play the
schedule."""

import functools
import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from shardwise.core.case import StepSettings
from shardwise.core.decomposition import decompose
from shardwise.core.machine import Machine
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import COMPUTE_TERMS, Setup, Term
from shardwise.core.program import IN_LAYERS, Collective, Program
from shardwise.core.timeline import NONE, SpanKind
from shardwise.files.perfetto import perfetto_trace
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.predict.layout import balanced_counts, lay_out
from shardwise.predict.machines import load_machine
from shardwise.predict.predict import predict, prediction_of
from shardwise.predict.step import step_of
from shardwise.predict.streams import beside_layers
from shardwise.predict.timeline import launch_bound, launch_waits, pipeline_timelines, timeline_of
from shardwise.trace.trace import trace
from tests.matrix import thinned

SPEC = ModelSpec("small", LlamaConfig(1024, 512, 6, 8, 4, 1024), "")
# a host so fast that the device is seldom waited for, and one that is always waited for
HOSTS = {"fast": 1e-7, "slow": 5e-5}
SETUPS = [
    (mesh, *setup)
    for mesh in ("tp=2", "fsdp=2,tp=2", "dp=2,tp=2", "fsdp=2,tp=1")
    for setup in ((Setup(), "none"), (Setup(compiled=True), "none"), (Setup(), "selective-ops"))
]


@functools.cache
def program(mesh: str, device: str = "cuda", recompute: str = "none") -> Program:
    shape = Mesh.parse(mesh)
    dtype = "bfloat16" if device == "cuda" else "float32"
    settings = StepSettings(2 * shape.data_parallel, 256, dtype=dtype, recompute=recompute)
    return trace(SPEC, builtin_plan("rowwise"), shape, settings, device=device)


def machine(host: str = "fast", device: str = "cuda") -> Machine:
    found = load_machine("h100-sxm-80gb")
    launch = replace(found.launch, forward_s=HOSTS[host], backward_s=HOSTS[host], collective_s=HOSTS[host])
    return replace(found, launch=launch, device=device)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("mesh", "setup", "recompute"),
    thinned(SETUPS, lambda mesh, _, recompute: recompute == "none" or mesh == "fsdp=2,tp=2"),
)
def test_a_timeline_decomposes_into_its_terms(mesh: str, setup: Setup, recompute: str, host: str) -> None:
    traced = program(mesh, recompute=recompute)
    found = predict(traced, machine(host), setup)
    terms = dict(found.terms)
    (parts,) = (one.parts for one in decompose(timeline_of(lay_out(traced, machine(host), setup))))
    close = functools.partial(pytest.approx, rel=1e-3, abs=2e-6)  # each span is rounded to a nanosecond
    assert parts.total_ns / 1e9 == close(found.step_s - terms[Term.SLOWED])
    assert parts.compute_ns / 1e9 == close(sum(terms[term] for term in COMPUTE_TERMS))
    # what is gathered before the first layer is neither hidden nor waited for by a rank: which of the two it
    # counts to differs by little
    idle_ns = parts.cpu_bound_idle_ns + parts.other_idle_ns
    assert (parts.exposed_transfer_ns + idle_ns) / 1e9 == close(
        terms[Term.TENSOR] + terms[Term.DATA] + terms[Term.LAUNCH]
    )
    assert parts.exposed_waiting_ns == parts.exposed_communication_ns == parts.exposed_copy_ns == 0
    if mesh == "tp=2":
        assert parts.exposed_transfer_ns / 1e9 == close(terms[Term.TENSOR])
        assert idle_ns / 1e9 == close(terms[Term.LAUNCH])


def test_on_a_cpu_all_of_an_op_is_its_own() -> None:
    here = machine(device="cpu")
    found = predict(program("tp=2", "cpu"), here, Setup())
    (parts,) = (one.parts for one in decompose(timeline_of(lay_out(program("tp=2", "cpu"), here, Setup()))))
    assert parts.total_ns / 1e9 == pytest.approx(found.step_s, rel=1e-3)
    assert parts.cpu_bound_idle_ns + parts.other_idle_ns < 0.001 * parts.total_ns


def test_a_collective_says_who_asked_what_it_moves_and_that_nobody_waits() -> None:
    timeline = timeline_of(lay_out(program("fsdp=2,tp=2"), machine(), Setup(Mesh.parse("fsdp=64,tp=2"))))
    found, spans = timeline.collectives, timeline.spans
    assert (spans.kind[found.span] == SpanKind.COLLECTIVE).all()
    assert (found.arrival_ns == spans.start_ns[found.span]).all()
    assert {timeline.names[index] for index in found.op} >= {"all_gather", "reduce_scatter"}
    origins = {timeline.names[index] for index in found.origin}
    assert {"layers.0.attention", "layers.3.attention", "layers.5.attention"} <= origins
    by_axis = dict(zip((group.name for group in timeline.groups), timeline.groups, strict=True))
    assert by_axis["tp"].ranks == (0, 1)
    assert by_axis["fsdp"].ranks == tuple(range(0, 128, 2))
    assert {lane.count for lane in timeline.lanes} == {128}


def test_every_device_span_hangs_on_the_host_span_that_issued_it() -> None:
    timeline = timeline_of(lay_out(program("tp=2"), machine("slow"), Setup()))
    spans = timeline.spans
    on_device = spans.kind <= SpanKind.COPY
    assert (spans.parent[on_device] != NONE).all()
    assert (spans.end_ns[spans.parent[on_device]] == spans.launched_ns[on_device]).all()
    assert (spans.start_ns[on_device] >= spans.launched_ns[on_device] - 1).all()
    assert (spans.end_ns >= spans.start_ns).all()


def test_what_the_device_waits_for_is_found_by_module() -> None:
    waits = launch_bound(lay_out(program("tp=2"), machine("slow"), Setup()))
    assert any(each.module.startswith("layers.*.") for each in waits)
    assert [each.waits_s for each in waits] == sorted((each.waits_s for each in waits), reverse=True)
    quick = predict(program("tp=2"), machine("fast"), Setup())
    assert (
        sum(each.waits_s for each in launch_bound(lay_out(program("tp=2"), machine("fast"), Setup())))
        <= dict(quick.terms)[Term.LAUNCH] + 1e-9
    )
    assert launch_bound(lay_out(program("tp=2", "cpu"), machine(device="cpu"), Setup())) == ()


def test_waits_for_launches_are_those_of_the_step_though_collectives_lie_between() -> None:
    waits = launch_waits(lay_out(program("tp=2"), machine("slow"), Setup()))
    terms = dict(predict(program("tp=2"), machine("slow"), Setup()).terms)
    assert sum(waits.values()) == pytest.approx(terms[Term.LAUNCH], rel=1e-9)


def test_what_a_step_adds_up_over_fsdp_s_ranks_runs_in_order_with_its_compute() -> None:
    work = lay_out(program("fsdp=2,tp=2"), machine(), Setup()).work
    beside = [work.item(row) for row in np.flatnonzero(beside_layers(work)).tolist()]
    assert {each.phase for each in beside} <= set(IN_LAYERS)
    assert {each.call.kind.value for each in beside if isinstance(each, Collective)} == {
        "all_gather",
        "reduce_scatter",
    }


@pytest.mark.parametrize("term", [Term.MATMUL, Term.TENSOR, Term.LAUNCH])
def test_on_a_cpu_a_term_that_is_switched_off_leaves_nothing_below_nothing(term: Term) -> None:
    layout = lay_out(program("tp=2", "cpu"), machine(device="cpu"), Setup(without=(term,)))
    found = prediction_of(layout, replays=False)
    step = step_of(layout, found, layout.program.settings)
    assert min(line.use.ns for line in step.lines) >= 0
    assert min(ns for _, ns in step.terms) >= 0
    assert sum(line.use.ns for line in step.lines) == pytest.approx(1e9 * found.step_s)
    (parts,) = (one.parts for one in decompose(timeline_of(layout)))
    assert parts.total_ns / 1e9 == pytest.approx(found.step_s, rel=1e-3)


def test_on_a_cpu_no_collective_is_hidden_by_a_matmul() -> None:
    here, traced = machine(device="cpu"), program("tp=2", "cpu")
    plain, beside = (predict(traced, here, Setup(overlap_tensor=each)) for each in (False, True))
    assert beside.terms == plain.terms


def test_stages_play_the_schedule() -> None:
    setup = Setup(Mesh.parse("pp=3,tp=2"), micro_batches=4)
    found = pipeline_timelines(lay_out(program("tp=2"), machine(), setup))
    assert [timeline.lanes[0].process for timeline in found] == ["stage 0", "stage 1", "stage 2"]
    assert [timeline.ranks for timeline in found] == [(0,), (2,), (4,)]
    last = [found[2].name(span) for span in range(len(found[2].spans))]
    last = [name for name in last if name != "bubble"]
    assert last == [name for index in range(4) for name in (f"forward {index}", f"backward {index}")]
    first = ["forward 0", "forward 1", "forward 2", "bubble", "backward 0"]
    assert [found[0].name(span) for span in range(5)] == first
    terms = dict(predict(program("tp=2"), machine(), setup).terms)
    (parts,) = (
        one.parts
        for one in decompose(
            max(
                found,
                key=lambda timeline: int(
                    (timeline.spans.end_ns - timeline.spans.start_ns)[
                        timeline.spans.kind == int(SpanKind.COMPUTE)
                    ].sum()
                ),
            )
        )
    )
    assert (parts.cpu_bound_idle_ns + parts.other_idle_ns) / 1e9 == pytest.approx(
        terms[Term.BUBBLE], rel=1e-3, abs=1e-6
    )


def test_a_schedule_of_a_million_micro_batches_is_cut_and_says_so() -> None:
    found = pipeline_timelines(
        lay_out(program("tp=2"), machine(), Setup(Mesh.parse("pp=2,tp=2"), micro_batches=1_000_000))
    )
    passes = [np.count_nonzero(timeline.spans.kind == int(SpanKind.COMPUTE)) for timeline in found]
    assert sum(passes) <= 20_000
    assert found[0].facts == (("left out", "995000 further micro-batches"),)


def test_balanced_stages_are_no_busier_than_even_ones() -> None:
    traced, setup = program("tp=2"), Setup(Mesh.parse("pp=2,tp=2"), micro_batches=2)
    counts = balanced_counts(traced, machine(), setup)
    assert traced.layers is not None
    assert sum(counts) == traced.layers[1]
    even, dealt = (
        lay_out(traced, machine(), replace(setup, layers=layers)).busiest.times.total_s
        for layers in ((), counts)
    )
    assert dealt <= even


def test_without_stages_there_are_no_passes() -> None:
    assert pipeline_timelines(lay_out(program("tp=2"), machine(), Setup())) == ()


@pytest.mark.parametrize("chunks", [1, 2])
def test_every_stage_and_chunk_has_a_lane_and_the_bubble_is_a_span_of_its_own(chunks: int) -> None:
    setup = Setup(Mesh.parse("pp=2,tp=2"), chunks=chunks, micro_batches=4)
    layout = lay_out(program("tp=2"), machine(), setup)
    for stage, timeline in enumerate(pipeline_timelines(layout)):
        threads = ["chunk 0", "chunk 1"] if chunks == 2 else ["passes"]
        assert [lane.thread for lane in timeline.lanes] == [*threads, "bubble"]
        assert {lane.process for lane in timeline.lanes} == {f"stage {stage}"}
        (window,) = timeline.windows
        spans = timeline.spans
        lengths = spans.end_ns - spans.start_ns
        waits = spans.kind == int(SpanKind.RANGE)
        assert {timeline.name(int(row)) for row in np.flatnonzero(waits)} == {"bubble"}
        assert np.count_nonzero(~waits) == 2 * 4 * chunks
        # what a stage works and how long it waits are the step
        assert int(lengths.sum()) == pytest.approx(window.length_ns, abs=len(spans))


def test_the_bubble_of_the_terms_is_what_the_busiest_stage_waits() -> None:
    for chunks in (1, 2):
        setup = Setup(Mesh.parse("pp=2,tp=2"), chunks=chunks, micro_batches=4)
        layout = lay_out(program("tp=2"), machine(), setup)
        waits_ns = [
            int((timeline.spans.end_ns - timeline.spans.start_ns)[timeline.spans.kind == 5].sum())
            for timeline in pipeline_timelines(layout)
        ]
        bubble = dict(prediction_of(layout).terms)[Term.BUBBLE]
        assert min(waits_ns) == pytest.approx(bubble * 1e9, rel=1e-3)


def test_the_trace_opens_as_json_with_a_lane_for_host_device_and_communication() -> None:
    document = json.loads(
        gzip.decompress(perfetto_trace([timeline_of(lay_out(program("tp=2"), machine(), Setup()))]))
    )
    lanes = {
        event["args"]["name"]
        for event in document["traceEvents"]
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    assert {"thread issues", "stream compute", "stream communication tp"} <= lanes
