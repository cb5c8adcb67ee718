"""Every way in which a model's own code may exchange data is in its Program: with its kind, its bytes, and
its place."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives
import torch.distributed._symmetric_memory
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveCall, CollectiveKind, off_mesh
from shardwise.core.finding import FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.prediction import Setup
from shardwise.core.program import Program
from shardwise.explain.explain import explain
from shardwise.files.program_json import program_from_json, program_json
from shardwise.models.factory import FactoryModel
from shardwise.parallel.recorder import KNOWN, LOCAL, NAMESPACES, is_collective
from shardwise.predict.machines import load_machine
from shardwise.predict.predict import predict
from shardwise.trace.trace import trace

RANKS, BATCH, SEQ, VOCAB, HIDDEN = 4, 2, 4, 11, 6
HIDDEN_BYTES = BATCH * SEQ * HIDDEN * 4
ALL = "tp"
OF_CODE = "The model's own code asks for it, or a library that it calls: no rule of the plan does."


class Exchanging(nn.Module):
    """A model whose middle exchanges its hidden state as `exchange` does."""

    def __init__(self, exchange: Callable[[Tensor], object] | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.middle = Middle(exchange)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids_BS: Tensor) -> object:
        return self.head(self.middle(self.embedding(ids_BS)))


class Middle(nn.Module):
    def __init__(self, exchange: Callable[[Tensor], object] | None) -> None:
        super().__init__()
        self.exchange = exchange

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        if self.exchange is not None:
            with torch.no_grad():
                self.exchange(hidden_BSH.detach().clone())
        return hidden_BSH


def traced(exchange: Callable[[Tensor], object], rank: int = 0, mesh: str = f"tp={RANKS}") -> Program:
    def make(mesh: DeviceMesh | None = None) -> nn.Module:
        return Exchanging(exchange if mesh is not None else None)

    source = FactoryModel("own:exchanging", make, frozenset({"mesh"}), False)
    return trace(source, TheirPlan.OWN, Mesh.parse(mesh), StepSettings(BATCH, SEQ), rank=rank)


def in_middle(program: Program) -> list[CollectiveCall]:
    return [item.call for item in program.collectives() if item.module == "middle"]


def parts(x: Tensor) -> list[Tensor]:
    return [torch.empty_like(x) for _ in range(RANKS)]


def batch_of_two(x: Tensor) -> None:
    sent = dist.P2POp(dist.isend, x, 1)
    received = dist.P2POp(dist.irecv, torch.empty_like(x), 3)
    dist.batch_isend_irecv([sent, received])


def coalesced_gather(x: Tensor) -> None:
    group = dist.group.WORLD
    assert group is not None
    group.allgather_into_tensor_coalesced([x.repeat(N, 1, 1), x.repeat(N, 1, 1)], [x, x.clone()]).wait()


def coalesced_scatter(x: Tensor) -> None:
    group = dist.group.WORLD
    assert group is not None
    group.reduce_scatter_tensor_coalesced([x, x.clone()], [x.repeat(N, 1, 1), x.repeat(N, 1, 1)]).wait()


def coalesced(x: Tensor) -> None:
    group = dist.group.WORLD
    assert group is not None
    options = dist.AllreduceCoalescedOptions()
    group.allreduce_coalesced([x, x.clone()], options).wait()


FUNCTIONAL = torch.ops._c10d_functional
WORLD = "0"
X, N = HIDDEN_BYTES, RANKS
WAYS: dict[str, tuple[Callable[[Tensor], object], list[tuple[CollectiveKind, int, float]]]] = {
    "send": (lambda x: dist.send(x, 1), [(CollectiveKind.SEND, X, X)]),
    "recv": (lambda x: dist.recv(x, 1), [(CollectiveKind.RECV, X, 0)]),
    "recv from any": (lambda x: dist.irecv(x), [(CollectiveKind.RECV, X, 0)]),
    "batch of p2p": (batch_of_two, [(CollectiveKind.SEND, X, X), (CollectiveKind.RECV, X, 0)]),
    "functional batch of p2p": (
        lambda x: FUNCTIONAL.batch_p2p_ops(["isend", "irecv"], [1, 3], [0, 0], [x, x.clone()], WORLD),
        [(CollectiveKind.SEND, X, X), (CollectiveKind.RECV, X, 0)],
    ),
    "reduce": (lambda x: dist.reduce(x, 0), [(CollectiveKind.REDUCE, X, X)]),
    "gather": (lambda x: dist.gather(x, parts(x), 0), [(CollectiveKind.GATHER, N * X, (N - 1) * X)]),
    "scatter": (lambda x: dist.scatter(x, parts(x), 0), [(CollectiveKind.SCATTER, N * X, (N - 1) * X)]),
    "all-to-all of a list": (
        lambda x: dist.all_to_all(parts(x), parts(x)),
        [(CollectiveKind.ALL_TO_ALL, N * X, (N - 1) * X)],
    ),
    "coalesced all-reduce": (coalesced, [(CollectiveKind.ALL_REDUCE, 2 * X, 2 * 2 * X * (N - 1) / N)]),
    "coalesced all-gather": (coalesced_gather, [(CollectiveKind.ALL_GATHER, 2 * N * X, 2 * (N - 1) * X)]),
    "coalesced reduce-scatter": (
        coalesced_scatter,
        [(CollectiveKind.REDUCE_SCATTER, 2 * N * X, 2 * (N - 1) * X)],
    ),
    "functional coalesced all-reduce": (
        lambda x: FUNCTIONAL.all_reduce_coalesced([x, x.clone()], "sum", WORLD),
        [(CollectiveKind.ALL_REDUCE, 2 * X, 2 * 2 * X * (N - 1) / N)],
    ),
    "functional coalesced all-gather": (
        lambda x: FUNCTIONAL.all_gather_into_tensor_coalesced([x, x.clone()], N, WORLD),
        [(CollectiveKind.ALL_GATHER, 2 * N * X, 2 * (N - 1) * X)],
    ),
    "functional coalesced reduce-scatter": (
        lambda x: FUNCTIONAL.reduce_scatter_tensor_coalesced([x.repeat(N, 1, 1)], "sum", N, WORLD),
        [(CollectiveKind.REDUCE_SCATTER, N * X, (N - 1) * X)],
    ),
    "functional in-place broadcast": (
        lambda x: FUNCTIONAL.broadcast_(x, 0, WORLD),
        [(CollectiveKind.BROADCAST, X, X)],
    ),
    "one-shot all-reduce": (
        lambda x: torch.ops.symm_mem.one_shot_all_reduce(x, "sum", WORLD),
        [(CollectiveKind.ALL_REDUCE, X, 2 * X * (N - 1) / N)],
    ),
    "all-gather fused with a matmul": (
        lambda x: torch.ops.symm_mem.fused_all_gather_matmul(
            x.flatten(0, 1), [x.new_empty(HIDDEN, 2)], 0, WORLD
        ),
        [(CollectiveKind.ALL_GATHER, N * X, (N - 1) * X)],
    ),
    "matmul fused with a reduce-scatter": (
        lambda x: torch.ops.symm_mem.fused_matmul_reduce_scatter(
            x.flatten(0, 1), x.new_empty(HIDDEN, 3), "sum", 0, WORLD
        ),
        [(CollectiveKind.REDUCE_SCATTER, X // 2, X / 2 * (N - 1) / N)],
    ),
    "barrier": (lambda _: dist.barrier(), [(CollectiveKind.BARRIER, 0, 0)]),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_exchange_is_in_the_program_with_its_bytes_and_place(way: str) -> None:
    exchange, expected = WAYS[way]
    calls = in_middle(traced(exchange))
    assert [(call.kind, call.payload_bytes, call.wire_bytes) for call in calls] == expected
    assert {(call.axis, call.axis_size, call.phase) for call in calls} == {(ALL, RANKS, "forward")}


def test_a_rank_that_is_no_root_sees_the_same_gather_and_scatter() -> None:
    for exchange in (lambda x: dist.gather(x, dst=0), lambda x: dist.scatter(x, src=0)):
        (call,) = in_middle(traced(exchange, rank=1))
        assert (call.payload_bytes, call.wire_bytes) == (N * X, (N - 1) * X)


def test_what_point_to_point_and_rooted_collectives_exchange_is_explained() -> None:
    def exchange(x: Tensor) -> None:
        dist.send(x, 1)
        dist.reduce(x, 0)
        dist.gather(x, parts(x), 0)
        coalesced(x)

    explanation = explain(traced(exchange))
    groups = [group for group in explanation.collectives if group.module == "middle"]
    assert [str(group.kind) for group in groups] == ["send", "reduce", "gather", "all_reduce"]
    assert {group.reason for group in groups[:3]} == {OF_CODE}
    assert FindingKind.COLLECTIVES_UNKNOWN not in [finding.kind for finding in explanation.findings]


def test_a_group_that_is_no_axis_of_the_mesh_has_a_place_by_its_ranks() -> None:
    def exchange(x: Tensor) -> None:
        dist.all_reduce(x, group=dist.new_group([0, 1, 3]))

    program = traced(exchange, mesh="dp=2,tp=2")
    (call,) = in_middle(program)
    assert (call.axis, call.axis_size, call.payload_bytes) == ("ranks 0-1, 3", 3, HIDDEN_BYTES // 2)
    assert OF_CODE in [group.reason for group in explain(program).collectives if group.axis == call.axis]
    assert program_from_json(program_json(program), "p.json") == program


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (range(8), "ranks 0-7"),
        ((5,), "ranks 5"),
        ((0, 2, 5), "ranks 0, 2, 5"),
        ((3, 0, 1), "ranks 0-1, 3"),
        ((), "ranks ?"),
    ],
)
def test_a_group_is_named_by_its_ranks(ranks: tuple[int, ...], name: str) -> None:
    assert off_mesh(ranks) == name


@pytest.fixture
def strange() -> Callable[[Tensor], object]:
    """An op of a library that nobody here knows, which takes a process group."""
    library = torch.library.Library("shardwise_test", "FRAGMENT")
    if not hasattr(torch.ops.shardwise_test, "swirl"):
        library.define("swirl(Tensor x, str group_name) -> Tensor")
        library.impl("swirl", lambda x, group_name: x.clone(), "CPU")
        library.impl("swirl", lambda x, group_name: torch.empty_like(x), "Meta")
    _kept.append(library)
    return lambda x: torch.ops.shardwise_test.swirl(x, WORLD)


_kept: list[torch.library.Library] = []


def test_what_no_table_knows_has_bytes_a_place_and_a_finding(strange: Callable[[Tensor], object]) -> None:
    program = traced(strange)
    (call,) = in_middle(program)
    assert (call.kind, call.payload_bytes, call.wire_bytes) == (CollectiveKind.UNKNOWN, X, X)
    finding = explain(program).findings[-1]
    assert (finding.kind, finding.subject) == (FindingKind.COLLECTIVES_UNKNOWN, "middle")
    assert finding.reason == (
        "nobody knows what 1 of the collectives send: shardwise_test::swirl (1), the first in forward"
    )
    assert program_from_json(program_json(program), "p.json") == program


def test_predict_costs_the_rare_ones_and_names_the_unknown(strange: Callable[[Tensor], object]) -> None:
    def exchange(x: Tensor) -> None:
        for each, _ in WAYS.values():
            each(x)
        dist.all_reduce(x, group=dist.new_group([0, 2]))
        strange(x)

    program = traced(exchange)
    machine, setup = load_machine("h100-sxm-80gb"), Setup()
    found = predict(program, machine, setup)
    assert "shardwise_test::swirl has no known cost on cuda: counted by its bytes" in found.notes
    silent = predict(traced(lambda _: None), machine, setup)
    assert found.step_s > silent.step_s


def schemas() -> list[torch._C.FunctionSchema]:
    return torch._C._jit_get_all_schemas()


def test_every_collective_that_torch_registers_is_known() -> None:
    """A new one fails here: give it a kind in parallel/recorder.py, or say there that it is local."""
    named = {
        schema.name
        for schema in schemas()
        if schema.name.partition("::")[0] in NAMESPACES
        or any(
            argument.name == "group_name" or str(argument.type).endswith("c10d.ProcessGroup")
            for argument in schema.arguments
        )
    }
    strangers = sorted(
        name
        for name in named
        if name.partition("::")[2] not in KNOWN | LOCAL and not name.startswith("shardwise_test::")
    )
    assert strangers == []
    assert {name.partition("::")[0] for name in named} - {"shardwise_test"} == NAMESPACES


def test_what_is_local_is_no_collective() -> None:
    assert is_collective(torch.ops.c10d.send.default)
    assert not is_collective(torch.ops._c10d_functional.wait_tensor.default)
    assert not is_collective(torch.ops.aten.mm.default)
