"""What an allocator reserves for a step: made-up steps whose answer can be worked out by hand."""

from dataclasses import replace

import pytest

from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Replicate, Shard
from shardwise.core.prediction import Filling, Precision, Setup
from shardwise.core.program import Block, Holding, Item, MemoryChange, MemoryKind, Op, OpKind, Phase, Program
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.predict.allocator import CachingAllocator
from shardwise.predict.machines import load_machine
from shardwise.predict.memory import forecast
from shardwise.predict.replay import replayed
from shardwise.predict.stage_memory import stage_parts
from shardwise.trace.trace import trace

MIB = 2**20
WIDE = 64 * MIB // 4  # entries of float32 in 64 MiB


def op(kind: OpKind, phase: Phase) -> Op:
    return Op(str(kind), kind, phase, "", (), (), 0, 0, 0)


def comes(size: int, phase: Phase = Phase.FORWARD, kind: MemoryKind = MemoryKind.TEMPORARY) -> MemoryChange:
    return MemoryChange(size * MIB, kind, phase, "", "m")


def goes(made: MemoryChange, nth: int = 0) -> MemoryChange:
    return replace(made, n_bytes=-made.n_bytes, nth=nth)


def program(*items: Item, holdings: tuple[Holding, ...] = (), fsdp: int = 1) -> Program:
    settings, axes = StepSettings(2, 8), (("fsdp", fsdp), ("tp", 1))
    return Program("m", "p", "native", "cuda", 0, axes, settings, 1, (Block(items),), holdings, (), ())


def holding(dtype: str = "float32", shard: float = 1.0, engine_cuts: bool = False) -> Holding:
    """64 MiB of parameters (32 in bfloat16), as much gradient and twice as much optimizer's state."""
    width = 4 if dtype == "float32" else 2
    local, n_bytes = int(WIDE * shard), int(WIDE * shard) * width
    placement = (Shard(0) if engine_cuts else Replicate(), Replicate())
    return Holding(
        "w", "", dtype, (1024, WIDE // 1024), (1024, local // 1024), placement, n_bytes, None, None, n_bytes,
        2 * n_bytes + 4,
    )  # fmt: skip


def reserved_mib(made: Program, setup: Setup | None = None, workspace: float = 0.0) -> float:
    return replayed(made, setup or Setup(), workspace_bytes=workspace * MIB).reserved_bytes / MIB


def test_what_comes_and_goes_in_turn_shares_a_block() -> None:
    first, second = comes(64), comes(32)
    assert reserved_mib(program(first, goes(first), second, goes(second))) == 64
    assert reserved_mib(program(first, second, goes(first), goes(second))) == 96


def test_the_one_that_goes_is_the_one_of_those_alike_that_the_trace_saw_go() -> None:
    """Of three in a row two go, and a larger one comes: it has room only where they were neighbours."""
    whole, part, large = comes(96), comes(32), comes(60)
    laid = (whole, goes(whole), part, part, part)
    assert reserved_mib(program(*laid, goes(part), goes(part), large)) == 96
    assert reserved_mib(program(*laid, goes(part, -1), goes(part), large)) == 96 + 60


def test_the_optimizers_state_takes_room_between_activations_and_the_second_step_needs_more() -> None:
    activation, step = comes(200, kind=MemoryKind.ACTIVATION), op(OpKind.OPTIMIZER, Phase.OPTIMIZER)
    made = program(
        activation, op(OpKind.MATMUL, Phase.BACKWARD), goes(activation), step, holdings=(holding(),)
    )
    # the parameter; activations, in whose place both moments come then; activations anew; a number
    assert reserved_mib(made) == 64 + 200 + 200 + 2


def test_gradients_go_when_the_next_step_begins() -> None:
    gradient = comes(64, Phase.BACKWARD, MemoryKind.GRADIENT)
    assert reserved_mib(program(op(OpKind.MATMUL, Phase.BACKWARD), gradient)) == 64
    several = Setup(None, 4)  # one is there, and the next is added to it
    assert reserved_mib(program(op(OpKind.MATMUL, Phase.BACKWARD), gradient), several) == 128


def test_each_thread_that_multiplies_has_a_workspace() -> None:
    forward, backward = op(OpKind.MATMUL, Phase.FORWARD), op(OpKind.MATMUL, Phase.BACKWARD)
    assert reserved_mib(program(forward), workspace=32) == 32
    assert reserved_mib(program(forward, forward, backward, backward), workspace=32) == 64
    machine = load_machine("h100-sxm-80gb")
    found = forecast(program(forward, backward), machine, Setup())
    assert dict(found.by_kind) == {MemoryKind.WORKSPACE: 64 * MIB}
    assert (found.active_bytes, found.slack_bytes) == (64 * MIB, 0)


def test_a_stream_s_blocks_serve_no_other_stream() -> None:
    other = replace(comes(64), stream=1)
    own = comes(64)
    assert reserved_mib(program(other, goes(other), own, goes(own))) == 128


def test_shards_are_as_small_as_the_true_mesh_makes_them() -> None:
    part = replace(comes(80), is_shard=True)
    made = program(part, goes(part), holdings=(holding(),), fsdp=2)
    assert reserved_mib(made) == 64 + 80
    assert reserved_mib(made, Setup(Mesh.parse("fsdp=8"))) == 16 + 20


def test_whole_parameters_that_were_filled_leave_memory_to_reuse() -> None:
    """In half precision: drawn in float32 (64 MiB), cast (32), and a copy of the rank's part (32)."""
    made = program(holdings=(holding("bfloat16"),))
    assert reserved_mib(made) == 32
    assert reserved_mib(made, Setup(filled=Filling.WHOLE)) == 64 + 32
    sharded = program(holdings=(holding("float32", 0.5, engine_cuts=True),), fsdp=2)
    whole = replace(sharded, engine="none")
    assert reserved_mib(whole, Setup(filled=Filling.WHOLE)) == 64 + 32  # the whole one, then FSDP's shard


def test_master_weights_and_gradients_live_all_the_time() -> None:
    gradient = comes(32, Phase.BACKWARD, MemoryKind.GRADIENT)
    made = program(op(OpKind.MATMUL, Phase.BACKWARD), gradient, holdings=(holding("bfloat16"),))
    assert reserved_mib(made, Setup(precision=Precision.MASTER)) == 32 + 64 + 3 * 64


def test_equal_layers_are_unfolded_and_each_ends_what_its_own_forward_made() -> None:
    kept = MemoryChange(64 * MIB, MemoryKind.ACTIVATION, Phase.FORWARD, "layers.0.a", "m")
    last = replace(kept, n_bytes=-kept.n_bytes, module="layers.3.a")
    forward, backward = (op(OpKind.MATMUL, phase) for phase in (Phase.FORWARD, Phase.BACKWARD))
    blocks = (
        Block((kept, forward), 4, "layers", 1),
        Block((replace(backward, module="layers.3.a"), last), 4, "layers", -1),
    )
    made = replace(program(), blocks=blocks, layers=("layers", 4))
    assert reserved_mib(made) == 4 * 64


SMALL = ModelSpec("small", LlamaConfig(8192, 256, 6, 8, 4, 512), "")


@pytest.mark.parametrize(
    ("mesh", "micro_batches", "chunks"),
    [("pp=2,tp=2", 4, 1), ("pp=3,fsdp=2,tp=1", 12, 1), ("pp=3,tp=1", 6, 2)],
)
def test_a_stage_has_in_use_what_its_peak_says(mesh: str, micro_batches: int, chunks: int) -> None:
    """The replay runs the schedule's turns, the peak counts what is in flight: two ways to one number, but
    for rounding."""
    axes = Mesh.parse(mesh)
    traced = Mesh((("fsdp", axes.fsdp), ("tp", axes.tp)))
    one = trace(SMALL, builtin_plan("rowwise"), traced, StepSettings(4 * axes.fsdp, 256), device="cuda")
    setup = Setup(axes, micro_batches, chunks)
    machine = replace(load_machine("h100-sxm-80gb"), workspace_bytes=0.0)
    whole = forecast(one, machine, setup)
    part = next(each for each in stage_parts(one, setup) if each.stage == whole.stage)
    found = replayed(one, setup, part)
    assert found.active_bytes == pytest.approx(whole.active_bytes, rel=0.06)
    assert found.reserved_bytes >= found.active_bytes


@pytest.mark.parametrize("plan", ["rowwise", "colwise", "rowwise@dtensor"])
def test_a_step_has_in_use_what_its_peak_says(plan: str) -> None:
    one = trace(SMALL, builtin_plan(plan), Mesh.parse("fsdp=2,tp=2"), StepSettings(8, 512), device="cuda")
    machine = load_machine("h100-sxm-80gb")
    whole = forecast(one, machine, Setup())
    found = replayed(one, Setup(), workspace_bytes=machine.workspace_bytes)
    assert found.active_bytes == pytest.approx(whole.active_bytes, rel=0.01)
    assert whole.reserved_bytes == max(found.reserved_bytes, whole.active_bytes)
    assert not found.given_back


def test_a_device_that_is_full_gives_back_what_is_free() -> None:
    """Three blocks of growing size in turn: together 300 MiB, never more than 150 at once."""
    items = [item for size in (50, 100, 150) for item in (comes(size), goes(comes(size)))]
    assert reserved_mib(program(*items)) == 300
    tight = replayed(program(*items), Setup(), capacity_bytes=160 * MIB)
    assert (tight.reserved_bytes / MIB, tight.is_short) == (150, False)
    assert tight.given_back == 0  # once the largest is there, the smaller ones fit in it
    assert replayed(program(*items), Setup(), capacity_bytes=140 * MIB).is_short
    machine = replace(load_machine("h100-sxm-80gb"), memory_bytes=160 * MIB, context_bytes=0.0)
    found = forecast(program(*items), machine, Setup())
    assert (found.fits, found.given_back) == (False, 0)
    assert CachingAllocator().retries == 0
