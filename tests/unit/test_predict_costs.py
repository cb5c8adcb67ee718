"""What items cost, how they run beside each other, how stages play together, and what lives: on a machine
made of round numbers."""

import functools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.core.collective import CollectiveCall, CollectiveKind, wire_bytes
from shardwise.core.grouped import GROUPED
from shardwise.core.machine import (
    AttentionRate,
    CollectiveRate,
    KernelRate,
    Launch,
    Link,
    Machine,
    MatmulRate,
    Tile,
    local_ranks,
    on_curve,
)
from shardwise.core.mesh import Mesh
from shardwise.core.pipeline import Pipeline, Schedule
from shardwise.core.prediction import AttentionKernel, Precision, Setup, Term
from shardwise.core.program import (
    LOSS_MODULE,
    Block,
    Collective,
    MemoryKind,
    Op,
    OpKind,
    Phase,
    Program,
    TensorSpec,
    memory_peak,
)
from shardwise.predict.costs import FUSED_LOSS_TRAFFIC, FUSED_TRAFFIC, collective_cost, collective_s, op_cost
from shardwise.predict.groups import RankGroup, group_of
from shardwise.predict.layout import lay_out
from shardwise.predict.memory import forecast, peak_by_kind
from shardwise.predict.pipeline import PartTimes, gaps, pipeline_s, play
from shardwise.predict.predict import predict
from shardwise.predict.streams import run
from shardwise.predict.work import AFTER, BEFORE, work_of
from tests.golden.programs import SPEC, Small

MACHINE = Machine(
    name="round",
    device="cuda",
    about="",
    devices_per_node=8,
    memory_bytes=80e9,
    memory_bytes_per_s=1e12,
    context_bytes=1e9,
    power_w=None,
    matmuls=(
        ("float32", MatmulRate(100e12, 100, (Tile(100, 100, 0.5),), 1e-6, 0.0)),
        ("bfloat16", MatmulRate(200e12, 100, (Tile(100, 100, 0.5),), 0.0)),
    ),
    attentions=(("float32", AttentionRate(50e12, 25e12, 0.0, 0.0)),),
    kernels=(("default", KernelRate(0.0, 1e12)), ("embedding", KernelRate(0.0, 1e12, 1e11))),
    launch=Launch(2e-6, 3e-6, 5e-6),
    within=Link(100e9, ((None, (CollectiveRate(2, 1e-6, 100e9), CollectiveRate(8, 8e-6, 80e9))),)),
    between=Link(10e9),
)

NODE = RankGroup(((1, 8),))


def op(
    name: str,
    kind: OpKind,
    *inputs: tuple[int, ...],
    out: tuple[int, ...],
    phase: Phase = Phase.FORWARD,
    **counts: int,
) -> Op:
    specs = tuple(TensorSpec("float32", shape) for shape in inputs)
    return Op(
        name,
        kind,
        phase,
        "m",
        specs,
        (TensorSpec("float32", out),),
        counts.get("flops", 0),
        counts.get("read", 0),
        counts.get("write", 0),
    )


def test_a_matmul_waits_for_its_last_wave_whole() -> None:
    rate = MatmulRate(100e12, 100, (Tile(100, 100, 0.5),), 0.0)
    one_wave = rate.time_s(1, 1000, 1000, 500)
    assert one_wave == pytest.approx(2 * 100 * 100 * 500 / (1e12 * 0.5))
    assert rate.time_s(1, 1000, 1001, 500) == 2 * one_wave
    assert rate.time_s(2, 1000, 1000, 500) == 2 * one_wave


def test_a_matmul_of_few_rows_takes_what_its_bytes_take() -> None:
    thin = op("aten::mm", OpKind.MATMUL, (1, 64), (64, 4096), out=(1, 4096), read=67_108_864, write=16_384)
    assert op_cost(thin, MACHINE, Setup()).device_s == pytest.approx((67_108_864 + 16_384) / 1e12)


def test_a_grouped_matmul_takes_each_group_s_tiles_and_what_a_group_costs_beside() -> None:
    shapes = (
        TensorSpec("bfloat16", (1000, 64)),
        TensorSpec("bfloat16", (10, 64, 100)),
        TensorSpec("int32", (10,)),
    )
    grouped = replace(op(GROUPED, OpKind.MATMUL, out=(1000, 100)), inputs=shapes)
    # 10 groups of 100 rows: a tile each, side by side
    tile_s = 2 * 100 * 100 * 64 / (2e12 * 0.5)
    assert op_cost(grouped, MACHINE, Setup()).device_s == pytest.approx(tile_s)
    fast, slow = (rate for _, rate in MACHINE.matmuls)
    beside = replace(MACHINE, matmuls=(("float32", fast), ("bfloat16", replace(slow, group_s=1e-6))))
    assert op_cost(grouped, beside, Setup()).device_s == pytest.approx(tile_s + 10e-6)
    # a thousand experts of a row each take ten times the waves
    few = replace(
        grouped, inputs=(shapes[0], TensorSpec("bfloat16", (1000, 64, 100)), TensorSpec("int32", (1000,)))
    )
    assert op_cost(few, MACHINE, Setup()).device_s == pytest.approx(10 * tile_s)


def test_look_ups_go_by_elements_where_those_are_slower() -> None:
    look_up = op(
        "aten::embedding", OpKind.EMBEDDING, (1000, 64), (500,), out=(500, 64), read=128_000, write=128_000
    )
    assert op_cost(look_up, MACHINE, Setup()).device_s == pytest.approx(500 * 64 / 1e11)
    assert op_cost(look_up, MACHINE, Setup()).term is Term.EMBEDDING


def attention(*, backward: bool) -> Op:
    shapes = ((2, 4, 128, 32),) * 3
    name = "aten::_scaled_dot_product_efficient_attention"
    if backward:
        return op(
            f"{name}_backward",
            OpKind.ATTENTION,
            *shapes,
            (2, 4, 128, 32),
            out=(2, 4, 128, 32),
            flops=10**9,
            phase=Phase.BACKWARD,
        )
    return op(name, OpKind.ATTENTION, *shapes, out=(2, 4, 128, 32), flops=4 * 10**8)


def test_fused_attention_goes_by_its_flops_and_grows_with_the_ranks_that_share_a_sequence() -> None:
    assert op_cost(attention(backward=False), MACHINE, Setup()).device_s == pytest.approx(4e8 / 50e12)
    assert op_cost(attention(backward=True), MACHINE, Setup()).device_s == pytest.approx(1e9 / 25e12)
    shared = op_cost(attention(backward=False), MACHINE, Setup(), context=4)
    assert shared.device_s == pytest.approx(4 * 4e8 / 50e12)


def test_an_older_kernel_goes_by_its_own_rate_where_the_machine_has_one() -> None:
    slow = AttentionRate(25e12, 10e12, 0.0, 0.0)
    older = replace(MACHINE, attentions=(*MACHINE.attentions, ("float32 flash-2", slow)))
    forward = attention(backward=False)
    second, first = (Setup(attention=kernel) for kernel in (AttentionKernel.FLASH_2, AttentionKernel.FLASH_1))
    assert op_cost(forward, older, second).device_s == pytest.approx(4e8 / 25e12)
    assert op_cost(forward, older, first) == op_cost(forward, older, Setup())


def test_unfused_attention_reads_and_writes_its_scores_and_a_selective_recompute_runs_it_again() -> None:
    unfused = Setup(attention=AttentionKernel.UNFUSED)
    matmul = MACHINE.matmuls[0][1]
    products = matmul.time_s(8, 128, 128, 32), matmul.time_s(8, 128, 32, 128)
    scores = 8 * 128 * 128 * 4 / 1e12
    forward = op_cost(attention(backward=False), MACHINE, unfused)
    assert forward.device_s == pytest.approx(sum(products) + 4 * scores)
    backward = op_cost(attention(backward=True), MACHINE, unfused)
    assert backward.device_s == pytest.approx(2 * sum(products) + 5 * scores)
    again = op_cost(attention(backward=True), MACHINE, replace(unfused, recompute_attention=True))
    assert again.device_s == pytest.approx(forward.device_s + backward.device_s)
    assert forward.host_s == pytest.approx(6 * 2e-6)


def test_scores_of_a_batch_that_the_fused_softmax_doesn_t_take_are_scaled_masked_and_normed_apart() -> None:
    unfused = Setup(attention=AttentionKernel.UNFUSED)

    def of_two_heads(*, backward: bool) -> Op:
        op = attention(backward=backward)
        return replace(op, inputs=tuple(replace(spec, shape=(1, 2, *spec.shape[2:])) for spec in op.inputs))

    matmul, scores = MACHINE.matmuls[0][1], 2 * 128 * 128 * 4 / 1e12
    products = matmul.time_s(2, 128, 128, 32) + matmul.time_s(2, 128, 32, 128)
    forward = op_cost(of_two_heads(backward=False), MACHINE, unfused)
    assert forward.device_s == pytest.approx(products + 20 * scores)
    assert forward.host_s == pytest.approx(10 * 2e-6)
    backward = op_cost(of_two_heads(backward=True), MACHINE, unfused)
    assert backward.device_s == pytest.approx(2 * products + 22 * scores)
    fused = op_cost(of_two_heads(backward=False), MACHINE, Setup())
    assert fused.host_s == pytest.approx(2e-6)


@pytest.mark.parametrize(
    ("phase", "shapes", "aligned"),
    [
        (Phase.FORWARD, ((512, 256), (256, 1001)), True),  # both lie along k
        (Phase.RECOMPUTE, ((512, 256), (256, 1001)), True),
        (Phase.FORWARD, ((512, 1001), (1001, 256)), False),
        (Phase.BACKWARD, ((512, 1001), (1001, 256)), False),  # of the input: the gradient lies along k
        (Phase.BACKWARD, ((1001, 512), (512, 256)), False),  # of the weight: the gradient lies along m
        (Phase.BACKWARD, ((1002, 512), (512, 256)), True),
    ],
)
def test_a_half_precision_matmul_whose_rows_begin_at_odd_places_has_a_share_of_its_rate(
    phase: Phase, shapes: tuple[tuple[int, int], tuple[int, int]], aligned: bool
) -> None:
    half = MatmulRate(100e12, 100, (Tile(100, 100, 0.5),), 0.0, unaligned=0.25)
    machine = replace(MACHINE, matmuls=(*MACHINE.matmuls, ("bfloat16", half)))
    (m, k), (_, n) = shapes

    def product_of(dtype: str) -> Op:
        a, b, out = (TensorSpec(dtype, shape) for shape in (*shapes, (m, n)))
        return Op("aten::mm", OpKind.MATMUL, phase, "m", (a, b), (out,), 2 * m * n * k, 0, 0)

    whole_s = half.time_s(1, m, n, k)
    assert op_cost(product_of("bfloat16"), machine, Setup()).device_s == pytest.approx(
        whole_s if aligned else 4 * whole_s
    )
    full = op_cost(product_of("float32"), machine, Setup()).device_s
    assert full == pytest.approx(MACHINE.matmuls[0][1].time_s(1, m, n, k))  # four bytes: always aligned


def test_megatron_s_gradients_lie_in_one_float32_buffer_and_are_copied_for_no_sum_or_norm() -> None:
    for phase in (Phase.REDUCE, Phase.CLIP):
        inside = op("aten::_to_copy", OpKind.COPY, (1000, 64), out=(1000, 64), read=128_000, write=256_000)
        copy = replace(inside, phase=phase)
        assert op_cost(copy, MACHINE, Setup()).device_s > 0
        kept = op_cost(copy, MACHINE, Setup(precision=Precision.MASTER))
        assert (kept.device_s, kept.host_s) == (0.0, 0.0)
        norm = replace(copy, kind=OpKind.REDUCTION)
        assert op_cost(norm, MACHINE, Setup(precision=Precision.MASTER)).device_s > 0


def test_a_compiler_fuses_layers_and_loss_each_where_it_is_said_to() -> None:
    inside = op("aten::silu", OpKind.ELEMENTWISE, (1000, 64), out=(1000, 64), read=256_000, write=256_000)
    loss = replace(inside, module=LOSS_MODULE)
    eager = op_cost(inside, MACHINE, Setup())
    assert (
        op_cost(loss, MACHINE, Setup(compiled=True))
        == op_cost(inside, MACHINE, Setup(compiled_loss=True))
        == eager
    )
    for fused, share in (
        (op_cost(inside, MACHINE, Setup(compiled=True)), FUSED_TRAFFIC),
        (op_cost(loss, MACHINE, Setup(compiled_loss=True)), FUSED_LOSS_TRAFFIC),
    ):
        assert fused.device_s == pytest.approx(eager.device_s * share)
        assert fused.host_s == 0.0


def test_an_op_that_nobody_knows_counts_by_its_bytes_and_is_named() -> None:
    cost = op_cost(op("mine::op", OpKind.UNKNOWN, (4,), out=(4,), read=10**6, write=10**6), MACHINE, Setup())
    assert cost.device_s == pytest.approx(2e-6)
    assert not cost.known


def collective(kind: CollectiveKind, axis: str, size: int, payload: int) -> Collective:
    return Collective(
        CollectiveCall(kind, axis, size, "float32", payload, wire_bytes(kind, payload, size), "forward"), "m"
    )


@pytest.mark.parametrize(("size", "rate", "start"), [(2, 100e9, 1e-6), (8, 80e9, 8e-6)])
def test_a_collective_goes_by_what_a_rank_sends_at_the_rate_of_its_group(
    size: int, rate: float, start: float
) -> None:
    each = collective(CollectiveKind.ALL_GATHER, "tp", size, 10**9)
    cost = collective_cost(each, MACHINE, Setup(), RankGroup(((1, size),)))
    assert cost.device_s == pytest.approx(start + (size - 1) / size * 1e9 / rate)
    assert cost.term is Term.TENSOR


def test_a_ring_over_nodes_runs_at_the_nics_of_its_local_ranks() -> None:
    alone = collective_s(
        MACHINE, CollectiveKind.ALL_REDUCE, 1e9, 1e9, RankGroup(((8, 4),))
    )  # tp=8 within: one rank of the group on each node
    eight = collective_s(MACHINE, CollectiveKind.ALL_REDUCE, 1e9, 1e9, RankGroup(((1, 32),)))
    assert alone == pytest.approx(1e9 / 10e9)
    assert eight == pytest.approx(1e9 / 80e9, rel=0.01)
    # of 15 ranks that each sends to, 8 lie on the other node, behind its own NIC
    exchange = collective_s(MACHINE, CollectiveKind.ALL_TO_ALL, 1.5e9, 1e9, RankGroup(((1, 16),)))
    assert exchange == pytest.approx(8e8 / 10e9)
    assert [local_ranks(8, 4, 8), local_ranks(1, 32, 8), local_ranks(2, 2, 8), local_ranks(16, 2, 8)] == [
        1,
        8,
        2,
        1,
    ]


def test_a_group_lies_where_its_axes_do_on_the_whole_mesh() -> None:
    mesh = "pp=2,dp=4,fsdp=2,cp=2,ep=2,tp=2"
    traced = replace(of_rowwise(), axes=(("dp", 2), ("fsdp", 2), ("ep", 2), ("tp", 2)))

    def ranks(axis: str) -> list[int]:
        return list(group_of(axis, traced, Setup(Mesh.parse(mesh))).ranks())

    assert ranks("tp") == [0, 1]
    assert ranks("ep") == [0, 2]
    # context ranks, which the program was traced without, share FSDP's shards
    assert ranks("fsdp") == [0, 4, 8, 12]
    assert ranks("dp") == [0, 16, 32, 48]
    assert ranks("dp+ep") == [0, 2, 16, 18, 32, 34, 48, 50]
    apart = group_of("dp+ep", traced, Setup(Mesh.parse(mesh)))
    assert (apart.local(8), apart.local(32), apart.local(64), apart.stride) == (2, 4, 8, 2)


@pytest.mark.parametrize(
    ("axis", "phase", "term"),
    [
        ("ep", Phase.FORWARD, Term.EXPERTS),
        ("ep", Phase.REDUCE, Term.DATA),
        ("ep", Phase.LOSS, Term.DATA),
        ("cp", Phase.BACKWARD, Term.CONTEXT),
        ("dp+ep", Phase.REDUCE, Term.DATA),
        ("fsdp+cp", Phase.BACKWARD, Term.DATA),
    ],
)
def test_what_layers_exchange_counts_to_its_axis_and_sums_to_data(
    axis: str, phase: Phase, term: Term
) -> None:
    each = collective(CollectiveKind.ALL_TO_ALL, axis, 8, 1000)
    each = replace(each, call=replace(each.call, phase=phase))
    assert collective_cost(each, MACHINE, Setup(), NODE).term is term


def test_hidden_collectives_are_gathers_and_scatters_of_the_tp_axis() -> None:
    hidden = Setup(overlap_tensor=True)
    for kind, axis, less in (
        (CollectiveKind.ALL_GATHER, "tp", True),
        (CollectiveKind.REDUCE_SCATTER, "tp", True),
        (CollectiveKind.ALL_REDUCE, "tp", False),
        (CollectiveKind.ALL_GATHER, "fsdp", False),
    ):
        each = collective(kind, axis, 8, 10**9)
        shown = collective_cost(each, MACHINE, Setup(), NODE).device_s
        assert (collective_cost(each, MACHINE, hidden, NODE).device_s < shown) is less


@given(
    st.lists(
        st.tuples(st.floats(1, 1e12), st.floats(1e-9, 10)),
        min_size=2,
        max_size=8,
        unique_by=lambda point: point[0],
    ),
    st.floats(1, 1e13),
)
def test_a_growing_curve_never_says_that_more_is_faster(points: list[tuple[float, float]], x: float) -> None:
    sizes, seconds = sorted(size for size, _ in points), sorted(seconds for _, seconds in points)
    curve = tuple(zip(sizes, seconds, strict=True))
    assert on_curve(curve, x) <= on_curve(curve, x * 1.5) * (1 + 1e-9)
    assert on_curve(curve, sizes[-1]) == pytest.approx(seconds[-1])


PIPELINES = [
    Pipeline(3),
    Pipeline(3, 1, Schedule.GPIPE),
    Pipeline(3, 2, Schedule.INTERLEAVED),
    Pipeline(3, 3, Schedule.INTERLEAVED),
]


@pytest.mark.parametrize("micro_batches", [1, 2, 8, 100])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_equal_stages_take_m_plus_p_minus_1_slots(stages: int, micro_batches: int) -> None:
    times = [PartTimes(1.0, 2.0)] * stages
    assert pipeline_s(Pipeline(stages), times, micro_batches, 0.0) == pytest.approx(
        3.0 * (micro_batches + stages - 1)
    )


@pytest.mark.parametrize("micro_batches", [4, 8, 64])
@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaving_divides_the_bubble_by_the_chunks(chunks: int, micro_batches: int) -> None:
    pipeline = Pipeline(4, chunks, Schedule.INTERLEAVED)
    times = [PartTimes(1.0 / chunks, 2.0 / chunks)] * pipeline.parts
    assert pipeline_s(pipeline, times, micro_batches, 0.0) == pytest.approx(
        3.0 * micro_batches + 3 * 3.0 / chunks
    )


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda each: f"{each.schedule}-{each.chunks}")
def test_a_long_schedule_adds_what_its_busiest_stage_takes(pipeline: Pipeline) -> None:
    uneven = [PartTimes(1.0, 2.0), PartTimes(1.5, 2.5), PartTimes(1.0, 2.0)] * pipeline.chunks
    played = max(each.end_s for each in play(pipeline, uneven, 60, 0.1))
    assert pipeline_s(pipeline, uneven, 60, 0.1) == pytest.approx(played, rel=0.03)


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda each: f"{each.schedule}-{each.chunks}")
def test_no_stage_does_two_things_at_once_and_nothing_starts_before_what_it_needs(pipeline: Pipeline) -> None:
    times = [PartTimes(1.0, 2.0), PartTimes(2.0, 1.0), PartTimes(0.5, 0.5)] * pipeline.chunks
    passes = play(pipeline, times, 6, 0.25)
    ends = {(each.part, each.backward, each.micro_batch): each.end_s for each in passes}
    assert len(ends) == len(passes) == 2 * pipeline.parts * 6
    for stage in range(3):
        own = sorted((each.start_s, each.end_s) for each in passes if each.stage == stage)
        assert all(first[1] <= second[0] + 1e-12 for first, second in pairwise(own))
        worked = sum(end - start for start, end in own)
        waited = sum(gap.end_s - gap.start_s for gap in gaps(passes, stage, 100.0))
        assert worked + waited == pytest.approx(100.0)
    for each in passes:
        if not each.backward and each.part:
            assert each.start_s >= ends[each.part - 1, False, each.micro_batch] + 0.25
        if each.backward and each.part < pipeline.parts - 1:
            assert each.start_s >= ends[each.part + 1, True, each.micro_batch] + 0.25


@functools.cache
def of_rowwise() -> Program:
    return Small(SPEC, "rowwise", "cuda").program()


def test_every_item_has_its_place_in_the_model() -> None:
    work = work_of(of_rowwise(), MACHINE, Setup())
    assert len(work) == sum(1 for item in of_rowwise().items() if isinstance(item, Op | Collective))
    forward = work.where(work.in_phases(Phase.FORWARD))
    assert forward.layer[0] == BEFORE
    assert forward.layer[-1] == AFTER
    backward = work.where(work.in_phases(Phase.BACKWARD))
    assert backward.layer[0] == AFTER
    assert backward.layer[-1] == BEFORE


def test_a_host_that_issues_at_once_leaves_the_device_no_gap() -> None:
    work = work_of(of_rowwise(), MACHINE, Setup())
    quick = replace(work, host_s=np.zeros_like(work.host_s))
    assert run(quick).length_s == pytest.approx(float(work.device_s.sum()))
    slow = replace(work, device_s=np.zeros_like(work.device_s))
    assert run(slow).length_s == pytest.approx(float(work.host_s.sum()))
    both = run(work)
    assert (
        max(work.device_s.sum(), work.host_s.sum())
        <= both.length_s
        <= work.device_s.sum() + work.host_s.sum() + 1e-12
    )
    assert np.all(both.start_s >= both.issued_s - 1e-12)


def test_a_host_that_waits_for_the_device_begins_every_pass_with_nothing_in_flight() -> None:
    ahead, waiting = (
        lay_out(of_rowwise(), MACHINE, Setup(micro_batches=3, waits_for_device=waits)).busiest
        for waits in (False, True)
    )
    for way in ("forward", "backward"):
        alone_s = run(getattr(waiting, way)).length_s
        assert getattr(waiting.times, f"{way}_s") == alone_s
        assert getattr(ahead.times, f"{way}_s") < alone_s
    made = predict(of_rowwise(), MACHINE, Setup(micro_batches=3, waits_for_device=True))
    assert sum(seconds for _, seconds in made.terms) == pytest.approx(made.step_s)


def test_terms_add_up_and_one_that_is_off_is_0() -> None:
    machine = replace(MACHINE, launch=Launch())
    made = predict(of_rowwise(), machine, Setup(micro_batches=3))
    assert sum(seconds for _, seconds in made.terms) == pytest.approx(made.step_s)
    off = predict(of_rowwise(), machine, Setup(micro_batches=3, without=(Term.TENSOR,)))
    assert dict(off.terms)[Term.TENSOR] == 0.0
    assert off.step_s < made.step_s
    (note,) = (each for each in made.notes if machine.name in each)
    assert note.endswith(
        "doesn't say launch.forward, launch.backward, launch.collective: issuing counts as nothing there"
    )


def test_stages_send_over_the_link_that_joins_them_on_the_whole_mesh() -> None:
    """Traced with two data-parallel ranks, whose stages would share a node."""
    traced = replace(of_rowwise(), axes=(("fsdp", 2), ("tp", 2)), layers=("layers", 2))
    meshes = Mesh.parse("pp=2,fsdp=2,tp=2"), Mesh.parse("pp=2,fsdp=4,tp=2")
    on_a_node, on_two = (lay_out(traced, MACHINE, Setup(mesh, 4)).transfer_s for mesh in meshes)
    assert on_two == pytest.approx(10 * on_a_node)


def test_a_ring_s_shift_is_hidden_by_the_attention_behind_it_and_sending_takes_nothing_more() -> None:
    def shift(kind: CollectiveKind) -> Collective:
        return collective(kind, "cp", 2, 10**8)

    flash = attention(backward=False)
    items = (shift(CollectiveKind.SEND), shift(CollectiveKind.RECV), flash, shift(CollectiveKind.RECV))
    ring = replace(of_rowwise(), axes=(("cp", 2), ("tp", 2)), blocks=(Block(items),))
    alone_s = collective_cost(items[1], MACHINE, Setup(), RankGroup(((2, 2),))).device_s
    work = work_of(ring, MACHINE, Setup())
    sent, taken, kernel, last = work.device_s
    assert list(work.hidden_s) == [0.0, kernel, 0.0, 0.0]
    assert sent == 0.0
    assert alone_s > kernel > 0.0
    assert taken == pytest.approx(alone_s - kernel)
    assert last == pytest.approx(alone_s)


def test_what_comes_home_at_the_end_of_a_ring_isn_t_hidden_by_another_layer_s_attention() -> None:
    last = collective(CollectiveKind.RECV, "cp", 2, 10**6)
    others = replace(attention(backward=False), module="layers.1.attention")
    ring = replace(of_rowwise(), axes=(("cp", 2), ("tp", 2)), blocks=(Block((last, others)),))
    alone_s = collective_cost(last, MACHINE, Setup(), RankGroup(((2, 2),))).device_s
    assert work_of(ring, MACHINE, Setup()).device_s[0] == pytest.approx(alone_s)


def test_attention_beside_which_keys_come_is_slowed_down() -> None:
    def step(n_bytes: int) -> dict[Term, float]:
        items = (collective(CollectiveKind.RECV, "cp", 2, n_bytes), attention(backward=False))
        ring = replace(of_rowwise(), axes=(("cp", 2), ("tp", 2)), blocks=(Block(items),))
        return dict(predict(ring, MACHINE, Setup()).terms)

    shift_s = collective_s(MACHINE, CollectiveKind.RECV, 1e4, 1e4, RankGroup(((2, 2),)))
    hidden = step(10**4)
    assert hidden[Term.CONTEXT] == 0
    assert hidden[Term.SLOWED] == pytest.approx(0.189 * shift_s)


def test_the_peak_by_blocks_is_the_peak_item_by_item() -> None:
    peak = memory_peak(of_rowwise())
    found = peak_by_kind(of_rowwise(), Setup())
    assert {kind: int(n_bytes) for kind, n_bytes in found.items()} == dict(peak.by_kind)


def test_states_are_counted_in_the_precision_that_a_trainer_keeps() -> None:
    held = of_rowwise().held(MemoryKind.PARAMETER)
    kept = dict(
        forecast(of_rowwise(), MACHINE, Setup(precision=Precision.MASTER, optimizer_shards=2)).by_kind
    )
    states = (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)
    assert [kept[kind] / held for kind in states] == [1.0, 2.0, 3.0]


def test_devices_joined_pair_by_pair_have_the_links_to_their_group_alone() -> None:
    """Four of them: two share a third of a device's links, all four use all."""
    paired = replace(MACHINE, devices_per_node=4, within=replace(MACHINE.within, direct=4))
    switched = replace(MACHINE, devices_per_node=4)

    def moving_s(machine: Machine, ranks: int) -> float:
        group, kind = RankGroup(((1, ranks),)), CollectiveKind.ALL_GATHER
        return collective_s(machine, kind, 2e9, 2e9, group) - collective_s(machine, kind, 1e9, 1e9, group)

    assert moving_s(paired, 2) == pytest.approx(3 * moving_s(switched, 2))
    assert moving_s(paired, 4) == pytest.approx(moving_s(switched, 4))


def test_gradients_summed_in_float32_send_twice_as_much_and_shards_half_of_it_back() -> None:
    def summing_s(setup: Setup, phase: Phase = Phase.REDUCE, dtype: str = "bfloat16") -> float:
        call = CollectiveCall(CollectiveKind.ALL_REDUCE, "dp", 8, dtype, 10**9, 1.75e9, phase)
        return collective_cost(Collective(call, "m"), MACHINE, setup, NODE).device_s

    half_s = summing_s(Setup())
    assert summing_s(Setup(sums_float32=True)) == pytest.approx(2 * half_s)
    assert summing_s(Setup(sums_float32=True, optimizer_shards=8)) == pytest.approx(1.5 * half_s)
    assert summing_s(Setup(sums_float32=True), dtype="float32") == half_s
    assert summing_s(Setup(sums_float32=True), Phase.BACKWARD) == half_s
