"""trace(): the Program of Llama under the built-in plans: what each device runs, the counts that are known,
FLOPs by hand, refusals.

Against real ranks: tests/distributed/test_program.py and test_program_memory.py. Equal layers traced once,
and whole programs as text: tests/programs. Models that aren't ours: test_trace_any_model.py.
"""

import importlib
import warnings
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveKind
from shardwise.core.errors import OptionError, PlanError, RunError, ShardwiseError
from shardwise.core.mesh import Mesh
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.core.program import (
    Collective,
    Item,
    MemoryChange,
    MemoryKind,
    Op,
    OpKind,
    Phase,
    Program,
    memory_peak,
)
from shardwise.models.factory import FactoryModel
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec, get_spec
from shardwise.parallel.apply import parallelize
from shardwise.parallel.builtin import builtin_names, builtin_plan
from shardwise.trace.fakes import fake_world, fill_with_fakes, keep_worlds
from shardwise.trace.trace import trace

VOCAB, HIDDEN, FFN = 96, 48, 64
BATCH, SEQ = 4, 16
STEP = StepSettings(BATCH, SEQ)


def llama(layers: int) -> ModelSpec:
    return ModelSpec("tiny", LlamaConfig(VOCAB, HIDDEN, layers, 4, 2, FFN), "")


def traced(
    plan: str,
    layers: int,
    device: str,
    mesh: str = "tp=2",
    settings: StepSettings = STEP,
    *,
    sp: bool = True,
    compress: bool = True,
) -> Program:
    return trace(
        llama(layers),
        builtin_plan(plan, sequence_parallel=sp),
        Mesh.parse(mesh),
        settings,
        device=device,
        compress=compress,
    )


@lru_cache
def tiny(plan: str, device: str) -> Program:
    """Three layers on tp=2."""
    return traced(plan, 3, device)


def test_a_layer_that_differs_is_traced_with_all_the_others() -> None:
    def make() -> nn.Module:
        model = llama(6).build(dtype=torch.float32)
        model.get_submodule("layers.4.attention.wq").register_forward_hook(lambda _, __, output: output * 2)
        return model

    messages: list[str] = []
    source = FactoryModel("own:odd", make, frozenset(), False)
    program = trace(source, TheirPlan.UNSHARDED, Mesh.parse("tp=1"), STEP, progress=messages.append)
    assert not program.compressed
    assert "tracing 6 layers" in messages
    doubled = [op for op in program.ops() if op.module == "layers.4.attention.wq" and op.name == "aten::mul"]
    assert len(doubled) == 2


def headline(plan: str) -> Program:
    return trace(
        get_spec("llama3-8b"),
        builtin_plan(plan),
        Mesh.parse("tp=8"),
        StepSettings(1, 8192, dtype="bfloat16"),
        device="cuda",
    )


def counts(program: Program, *phases: Phase) -> Counter[tuple[str, str]]:
    return Counter((str(c.call.kind), str(c.phase)) for c in program.collectives() if c.phase in phases)


def test_llama3_8b_rowwise_by_dtensor_on_8_ranks_has_the_published_counts() -> None:
    program = headline("rowwise@dtensor")
    assert program.parameters == 8_030_261_248
    # 32 layers x 2 + the embedding's, or the head's
    assert counts(program, Phase.FORWARD, Phase.BACKWARD) == {
        ("reduce_scatter", "forward"): 65,
        ("all_gather", "forward"): 65,
        ("reduce_scatter", "backward"): 65,
        ("all_gather", "backward"): 65,
    }
    own = [
        (c.call.kind, c.phase, str(c.before), str(c.after))
        for c in program.collectives()
        if c.module == "tok_embeddings"
    ]
    assert own == [
        (CollectiveKind.REDUCE_SCATTER, Phase.FORWARD, "Partial", "Shard(1)"),
        (CollectiveKind.ALL_GATHER, Phase.BACKWARD, "Shard(1)", "Replicate"),
    ]
    sent = next(c for c in program.collectives() if c.module == "tok_embeddings").call
    assert (sent.payload_bytes, sent.wire_bytes) == (8192 * 4096 * 2, 7 / 8 * 8192 * 4096 * 2)
    # the loss by hand, the clip's norms (a gradient each kind of placement), AdamW's partial gradients: 65
    # norms
    assert counts(program, Phase.OPTIMIZER) == {("all_reduce", "optimizer"): 65}
    table = next(holding for holding in program.holdings if holding.name == "tok_embeddings.weight")
    assert table.gradient_bytes == 8 * table.parameter_bytes


def test_counts_agree_with_pytorch_s_commdebugmode() -> None:
    """It counts per functional collective over the whole step; run on fakes, as the trace is, but by
    PyTorch's own counter."""
    program = tiny("rowwise@dtensor", "cuda")
    ours = Counter(c.call.kind for c in program.collectives() if c.phase in (Phase.FORWARD, Phase.BACKWARD))
    theirs: Counter[CollectiveKind] = Counter()
    with fake_world(Mesh.parse("tp=2"), rank=0, device="cuda") as mesh:
        model = llama(3).build(dtype=torch.float32)
        parallelize(model, builtin_plan("rowwise@dtensor"), mesh)
        fake_mode = torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        fill_with_fakes(model, fake_mode)
        with fake_mode:
            ids = torch.zeros(BATCH, SEQ, dtype=torch.int64)
        comm = CommDebugMode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its hooks fire on modules whose inputs need no gradient
            with comm:
                model(ids).sum().backward()
        counted = comm.get_comm_counts()
    names = {
        "reduce_scatter_tensor": CollectiveKind.REDUCE_SCATTER,
        "all_gather_into_tensor": CollectiveKind.ALL_GATHER,
    }
    for operation, count in counted.items():
        theirs[names.get(operation._qualified_op_name.rpartition("::")[2], CollectiveKind.BROADCAST)] += count
    assert ours == theirs


def test_what_processes_preload_keeps_no_world_of_who_imports_it() -> None:
    for name in ("shardwise.verbs.preload", "shardwise.verbs.search.preload", "shardwise.workers.forked"):
        importlib.import_module(name)
    with fake_world(Mesh.parse("tp=2"), rank=0, device="cpu"):
        pass
    assert not dist.is_initialized()


def test_worlds_that_are_kept_change_no_program() -> None:
    """Of another rank or mesh before, and after an error inside."""
    cases = [
        ("rowwise@dtensor", "tp=2", 0),
        ("rowwise@dtensor", "tp=2", 1),
        ("colwise@dtensor", "tp=2", 1),
        ("colwise@dtensor", "fsdp=2,tp=2", 1),
    ]

    def traced(plan: str, mesh: str, rank: int) -> Program:
        model = ModelSpec("tiny", LlamaConfig(VOCAB + 1, HIDDEN, 2, 4, 2, FFN), "")  # ranks differ
        return trace(model, builtin_plan(plan), Mesh.parse(mesh), STEP, device="cuda", rank=rank)

    expected = [traced(*case) for case in cases]
    keep_worlds()
    try:
        assert [traced(*case) for case in cases] == expected
        assert dist.is_initialized()
        with (
            pytest.raises(RunError, match="joined a process group"),
            fake_world(Mesh.parse("tp=2"), rank=0, device="cuda"),
        ):
            traced(*cases[0])
        assert not dist.is_initialized()
        assert traced(*cases[0]) == expected[0]
    finally:
        keep_worlds(False)
    assert not dist.is_initialized()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_device_has_its_own_ops(device: str) -> None:
    names = Counter(op.name for op in tiny("rowwise", device).ops())
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    # no fused kernel of CUDA's takes float32 with grouped heads: scores and values are multiplied, forward
    # and backward
    assert (names[fused], names["aten::bmm"]) == {"cpu": (3, 0), "cuda": (0, 3 * 6)}[device]
    assert (names["aten::_fused_rms_norm"], names["aten::rsqrt"]) == {"cpu": (0, 7), "cuda": (7, 0)}[device]
    # gloo has no reduce-scatter of its own: the native engine's is an exchange of parts
    kinds = Counter(
        c.call.kind for c in tiny("rowwise", device).collectives() if c.module == "tok_embeddings"
    )
    assert (
        kinds
        == {
            "cpu": {CollectiveKind.ALL_TO_ALL: 1, CollectiveKind.ALL_GATHER: 1},
            "cuda": {CollectiveKind.REDUCE_SCATTER: 1, CollectiveKind.ALL_GATHER: 1},
        }[device]
    )


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", CollectiveKind.ALL_GATHER), ("cuda", CollectiveKind.ALL_TO_ALL)]
)
def test_dtensor_s_all_to_all_is_one_on_cuda_only(device: str, kind: CollectiveKind) -> None:
    own = [
        c.call.kind
        for c in tiny("colwise@dtensor", device).collectives()
        if c.module == "tok_embeddings" and c.phase is Phase.FORWARD
    ]
    assert own[-1] is kind


def test_nothing_is_unknown_in_bfloat16_on_cuda() -> None:
    program = traced("rowwise@dtensor", 2, "cuda", settings=StepSettings(BATCH, SEQ, dtype="bfloat16"))
    assert [op.name for op in program.ops() if op.kind is OpKind.UNKNOWN] == []


def test_world_size_changes_sizes_and_nothing_else() -> None:
    def items(dp: int) -> list[Item]:
        program = trace(
            llama(2),
            builtin_plan("rowwise"),
            Mesh.parse(f"dp={dp},tp=2"),
            StepSettings(4 * dp, SEQ),
            device="cuda",
        )
        return list(program.items())

    few, many = items(2), items(64)
    differing = [(one, other) for one, other in zip(few, many, strict=True) if one != other]
    assert differing
    for one, other in differing:
        assert isinstance(one, Collective)
        assert isinstance(other, Collective)
        assert (one.call.axis, one.call.axis_size, other.call.axis_size) == ("dp", 2, 64)
        assert replace(other, call=replace(other.call, axis_size=2, wire_bytes=one.call.wire_bytes)) == one


def ops_of(program: Program, module: str, phase: Phase, kind: OpKind) -> list[Op]:
    return [op for op in program.ops() if (op.module, op.phase, op.kind) == (module, phase, kind)]


def test_a_linear_s_flops_and_bytes_by_hand() -> None:
    program = tiny("rowwise", "cpu")
    (forward,) = ops_of(program, "layers.1.feed_forward.w1", Phase.FORWARD, OpKind.MATMUL)
    tokens, columns = BATCH * SEQ, FFN // 2
    assert forward.flops == 2 * tokens * HIDDEN * columns
    assert forward.read_bytes == 4 * (tokens * HIDDEN + HIDDEN * columns)
    assert forward.write_bytes == 4 * tokens * columns
    backward = ops_of(program, "layers.1.feed_forward.w1", Phase.BACKWARD, OpKind.MATMUL)
    assert [op.flops for op in backward] == [forward.flops] * 2  # the input's and the weight's


def test_attention_s_flops_by_hand() -> None:
    program = tiny("rowwise", "cpu")
    (forward,) = ops_of(program, "layers.0.attention", Phase.FORWARD, OpKind.ATTENTION)
    local_heads, head_dim = 2, HIDDEN // 4
    assert (
        forward.flops == 2 * 2 * BATCH * local_heads * SEQ * SEQ * head_dim // 2
    )  # q k and p v, half of both: causal
    (backward,) = ops_of(program, "layers.0.attention", Phase.BACKWARD, OpKind.ATTENTION)
    assert backward.flops == 5 * forward.flops // 2


def test_an_embedding_reads_the_rows_that_it_takes() -> None:
    (forward,) = ops_of(tiny("replicated", "cpu"), "tok_embeddings", Phase.FORWARD, OpKind.EMBEDDING)
    tokens = forward.outputs[0].shape[0] * forward.outputs[0].shape[1]
    assert forward.read_bytes == tokens * 8 + tokens * HIDDEN * 4
    assert forward.write_bytes == tokens * HIDDEN * 4


@pytest.mark.parametrize("plan", builtin_names())
def test_memory_comes_and_goes_and_only_gradients_and_logs_stay(plan: str) -> None:
    program = tiny(plan, "cuda")
    left: Counter[MemoryKind] = Counter()
    for item in program.items():
        if isinstance(item, MemoryChange):
            left[item.kind] += item.n_bytes
    # rowwise: ids of other ranks add to one row more, which the gradient's storage has and the gradient
    # hasn't
    one_row = 4 * HIDDEN if plan == "rowwise" else 0
    assert left.pop(MemoryKind.GRADIENT) == program.held(MemoryKind.GRADIENT) + one_row
    assert left[MemoryKind.ACTIVATION] == 0
    assert sum(left.values()) < 1000  # the loss and the norm, as the caller gets them


def test_recompute_holds_fewer_activations_and_runs_the_layers_twice() -> None:
    plain = tiny("rowwise@dtensor", "cuda")
    again = traced("rowwise@dtensor", 3, "cuda", settings=StepSettings(BATCH, SEQ, recompute="full"))
    assert memory_peak(again).n_bytes < memory_peak(plain).n_bytes
    forward = [
        op
        for op in again.ops()
        if op.phase is Phase.FORWARD and op.module.startswith("layers.") and op.kind is OpKind.MATMUL
    ]
    recomputed = [op for op in again.ops() if op.phase is Phase.RECOMPUTE and op.kind is OpKind.MATMUL]
    # w2 is each layer's last matmul: the backward needs its inputs, not its output
    assert Counter(op.module for op in forward) - Counter(op.module for op in recomputed) == {
        f"layers.{i}.feed_forward.w2": 1 for i in range(3)
    }


def test_the_mask_of_attention_that_is_taken_apart_lies_on_the_device() -> None:
    inside = [op for op in tiny("rowwise", "cuda").ops() if op.module == "layers.1.attention"]
    assert any(op.name == "aten::bmm" for op in inside)
    assert not any(op.on_host for op in inside)


@pytest.mark.parametrize("plan", ["rowwise", "rowwise@dtensor"])
def test_a_selective_recompute_keeps_attention_and_every_second_matmul(plan: str) -> None:
    kept = traced(plan, 3, "cuda", settings=StepSettings(BATCH, SEQ, "bfloat16", recompute="selective-ops"))
    again = Counter(
        op.module.rpartition(".")[2]
        for op in kept.ops()
        if op.phase is Phase.RECOMPUTE and op.kind is OpKind.MATMUL
    )
    assert again == {"wk": 3, "wo": 3, "w3": 3}  # of wq, wk, wv, wo, w1, w3, w2 in this order
    assert not any(op.phase is Phase.RECOMPUTE and op.kind is OpKind.ATTENTION for op in kept.ops())
    # functional collectives can be kept, and DTensor issues those
    scattered = any(
        each.phase is Phase.RECOMPUTE and each.call.kind is CollectiveKind.REDUCE_SCATTER
        for each in kept.collectives()
    )
    assert scattered is (plan == "rowwise")
    plain = traced(plan, 3, "cuda", settings=StepSettings(BATCH, SEQ, "bfloat16"))
    assert memory_peak(kept).n_bytes < memory_peak(plain).n_bytes


@pytest.mark.parametrize(
    ("mesh", "plan", "options", "kind", "message"),
    [
        ("tp=2", "rowwise", {"device": "tpu"}, OptionError, 'device is "tpu". Allowed: cpu, cuda.'),
        ("tp=2", "rowwise", {"rank": 2}, OptionError, "rank 2 is not on mesh tp=2. Use 0 to 1."),
        (
            "tp=2",
            "unsharded",
            {},
            OptionError,
            'plan "unsharded" shards nothing, and mesh tp=2 has a tp axis. Use tp=1, or another plan.',
        ),
        (
            "dp=3,tp=2",
            "rowwise",
            {},
            OptionError,
            "--batch 4 can't be cut into 3 data-parallel parts of 1 micro-batches. Use a multiple of 3.",
        ),
        (
            "tp=2",
            "own",
            {},
            OptionError,
            'plan "own": tiny doesn\'t shard itself. It is for package.module:factory where the factory '
            "takes a mesh.",
        ),
        (
            "tp=2",
            "rowwise",
            {"ids": torch.zeros(2, 3, dtype=torch.int64)},
            OptionError,
            "ids have shape (2, 3); the batch is 4 x 16.",
        ),
    ],
)
def test_refusals(
    mesh: str, plan: str, options: dict[str, object], kind: type[ShardwiseError], message: str
) -> None:
    chosen: AnyPlan = TheirPlan(plan) if plan in list(TheirPlan) else builtin_plan(plan)
    with pytest.raises(kind) as caught:
        trace(llama(2), chosen, Mesh.parse(mesh), STEP, **options)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_sizes_that_don_t_divide_are_refused_by_the_plan() -> None:
    with pytest.raises(PlanError, match="16"):
        traced("rowwise", 2, "cpu", "tp=3")


def test_a_process_that_has_a_group_is_refused_and_keeps_it() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RunError, match="has joined a process group already"):
            tiny.__wrapped__("rowwise", "cpu")
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("fails", [False, True])
def test_a_trace_leaves_the_process_as_it_was(fails: bool) -> None:
    x = torch.randn(2, 3)
    before = nn.functional.rms_norm(x, (3,))
    calls = nn.Module.__call__
    if fails:
        with pytest.raises(ShardwiseError):
            traced("rowwise", 2, "cuda", "tp=3")
    else:
        traced("rowwise", 2, "cuda")
    assert not dist.is_initialized()
    assert nn.Module.__call__ is calls
    assert torch.equal(nn.functional.rms_norm(x, (3,)), before)
    assert type(torch.zeros(1)) is Tensor


class Pair(nn.Module):
    """Embedding and a pair of linears, sharded by the factory itself with PyTorch's own styles."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.up = nn.Linear(HIDDEN, FFN, bias=False)
        self.down = nn.Linear(FFN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids_BS: Tensor) -> object:
        return self.head(self.down(self.up(self.embedding(ids_BS))))


def test_a_factory_that_shards_itself_is_traced_as_it_came() -> None:
    def make(mesh: DeviceMesh) -> nn.Module:
        return parallelize_module(Pair(), mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})

    program = trace(
        FactoryModel("own:pair", make, frozenset({"mesh"}), False),
        TheirPlan.OWN,
        Mesh.parse("tp=2"),
        STEP,
        device="cuda",
    )
    issued = [
        (c.call.kind, c.module, c.phase)
        for c in program.collectives()
        if c.phase in (Phase.FORWARD, Phase.BACKWARD)
    ]
    assert issued == [
        (CollectiveKind.ALL_REDUCE, "down", Phase.FORWARD),
        (CollectiveKind.ALL_REDUCE, "up", Phase.BACKWARD),
    ]
    local = {holding.name: holding.local_shape for holding in program.holdings if holding.is_sharded}
    assert local == {"up.weight": (FFN // 2, HIDDEN), "down.weight": (HIDDEN, FFN // 2)}
