"""What a process that does nothing but trace keeps from one trace for the next changes no Program: what a
layer adds (trace/growth.py), and the model (trace/subject.py)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.core.program import Program
from shardwise.models.factory import FactoryModel
from shardwise.models.llama import LlamaConfig
from shardwise.models.source import ModelSource, find_model
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.planner.make import Wish, make_plan
from shardwise.trace.growth import growths
from shardwise.trace.subject import subjects
from shardwise.trace.trace import trace

VOCAB, HIDDEN, LAYERS = 96, 48, 7


@pytest.fixture
def keeping() -> Iterator[None]:
    growths.keep()
    subjects.keep()
    yield
    growths.keep(False)
    subjects.keep(False)


LLAMA = ModelSpec("tiny", LlamaConfig(VOCAB, HIDDEN, LAYERS, 4, 2, 64), "")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        return hidden_BSH + torch.tanh(self.linear(hidden_BSH))


class Odd(nn.Module):
    """What runs before its layers grows with them, by a batch each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.output = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden_BSH = self.embedding(ids_BS)
        with torch.no_grad():
            largest = hidden_BSH.repeat(len(self.layers), 1, 1).abs().amax()
        hidden_BSH = hidden_BSH / largest
        for layer in self.layers:
            hidden_BSH = layer(hidden_BSH)
        return self.output(hidden_BSH)  # type: ignore[no-any-return]


ODD = FactoryModel("own:odd", Odd, frozenset(), False)


Asked = tuple[ModelSource, AnyPlan, str, int, str]


def traced(source: ModelSource, plan: AnyPlan, mesh: str, batch: int, recompute: str) -> tuple[Program, bool]:
    """(the Program, whether it took a trace of SHORT layers)"""
    messages: list[str] = []
    sizes = Mesh.parse(mesh)
    settings = StepSettings(batch * sizes.data_parallel, 16, dtype="bfloat16", recompute=recompute)
    program = trace(source, plan, sizes, settings, device="cuda", progress=messages.append)
    return program, any(message.startswith("tracing 3 of") for message in messages)


def took_short(asked: Sequence[Asked], request: pytest.FixtureRequest) -> list[bool]:
    """Of each in turn, whether SHORT layers were traced for it. Their Programs are those of fresh traces."""
    fresh = [traced(*each)[0] for each in asked]
    assert all(program.compressed for program in fresh)
    request.getfixturevalue("keeping")
    again = [traced(*each) for each in asked]
    assert [program for program, _ in again] == fresh
    return [took for _, took in again]


OTHERS = [
    ("rowwise", 2, "none"),
    ("rowwise", 1, "full"),
    ("rowwise", 2, "selective-ops"),
    ("colwise", 2, "none"),
    ("routed", 1, "full"),
]


@pytest.mark.parametrize(
    ("mesh", "engine"),
    [
        pytest.param(mesh, engine, marks=[] if (mesh, engine) == ("tp=2", "") else pytest.mark.full)
        for mesh in ("tp=2", "fsdp=2,tp=2", "cp=2,tp=2")
        for engine in ("", "@dtensor")
    ],
)
def test_what_a_layer_adds_is_kept_for_other_batches_recompute_and_ends(
    mesh: str, engine: str, request: pytest.FixtureRequest
) -> None:
    asked: list[Asked] = [
        (LLAMA, builtin_plan(name + engine), mesh, batch, recompute)
        for name, batch, recompute in OTHERS
        if not (engine and name == "routed")
    ]
    assert took_short(asked, request) == [True] + [False] * (len(asked) - 1)


@pytest.mark.full
def test_layers_that_gather_what_the_one_before_gathered(request: pytest.FixtureRequest) -> None:
    source = find_model("hf:qwen3?num_hidden_layers=6")
    plan = make_plan(source, Wish(Mesh.parse("tp=2"))).plan
    asked: list[Asked] = [(source, plan, "tp=2", 2, "none"), (source, plan, "tp=2", 3, "full")]
    assert took_short(asked, request) == [True, False]


def test_what_grows_with_the_batch_is_traced_again(request: pytest.FixtureRequest) -> None:
    asked: list[Asked] = [(ODD, TheirPlan.UNSHARDED, "dp=2", batch, "none") for batch in (2, 3)]
    assert took_short(asked, request) == [True, True]


@pytest.mark.full
def test_other_layers_are_traced_again(request: pytest.FixtureRequest) -> None:
    wider = replace(LLAMA, config=replace(LLAMA.config, ffn_hidden=80))
    plan = builtin_plan("rowwise")
    asked: list[Asked] = [(source, plan, "tp=2", 2, "none") for source in (LLAMA, wider, LLAMA)]
    assert took_short(asked, request) == [True, True, False]


def test_a_kept_model_is_not_taken_for_one_whose_layers_are_all_traced(
    request: pytest.FixtureRequest,
) -> None:
    mesh, settings = Mesh.parse("tp=1"), StepSettings(2, 16)
    whole = trace(LLAMA, TheirPlan.UNSHARDED, mesh, settings, compress=False)
    request.getfixturevalue("keeping")
    short = trace(LLAMA, TheirPlan.UNSHARDED, mesh, settings)
    assert trace(LLAMA, TheirPlan.UNSHARDED, mesh, settings, compress=False) == whole
    assert trace(LLAMA, TheirPlan.UNSHARDED, mesh, settings) == short
