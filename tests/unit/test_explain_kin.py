"""What explain finds of collectives that are about one tensor: compared by tensors, so that modules side by
side whose inputs only look alike are left alone."""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from shardwise.core.case import StepSettings
from shardwise.core.explanation import Explanation
from shardwise.core.finding import Finding, FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Shard as Part
from shardwise.core.plan import Plan, Rule, Style, StyleName, TheirPlan
from shardwise.core.program import Phase
from shardwise.explain.explain import explain
from shardwise.files.program_json import program_from_json, program_json
from shardwise.models.factory import FactoryModel
from shardwise.models.source import find_model
from shardwise.parallel.builtin import builtin_plan
from shardwise.trace.trace import trace

LAYERS, HEADS, WIDTH, SEQ, TP = 2, 4, 8, 16, 2
HIDDEN = HEADS * WIDTH
PAYLOAD = SEQ * HIDDEN * 4  # bytes of an activation, batch 1, float32


class Norm(nn.Module):
    """Over the last `dims` dims of [B, S, heads, width]."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = tuple(range(-dims, 0))
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(self.dims, keepdim=True) + 1e-6) * self.weight


class Layer(nn.Module):
    def __init__(self, dims: int = 1) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = Norm(dims), Norm(dims)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, WIDTH)) for layer in (self.q, self.k, self.v))
        q, k, v = (
            (each.to_local() if isinstance(each, DTensor) else each).transpose(1, 2)
            for each in (self.q_norm(q), self.k_norm(k), v)
        )
        out: Tensor = self.o(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
        return out


class Net(nn.Module):
    def __init__(self, dims: int = 1) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, HIDDEN), nn.Linear(HIDDEN, 64, bias=False)
        self.layers = nn.ModuleList(Layer(dims) for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(torch.tanh(x))
        logits: Tensor = self.head(x)
        return logits


def shard_layer(layer: Layer, tp: DeviceMesh, *, entrance: bool, gathers: bool) -> None:
    cut = {name: ColwiseParallel(use_local_output=False) for name in "qkv"}
    parallelize_module(layer, tp, {**cut, "o": RowwiseParallel()})
    if entrance:
        whole = (Replicate(),)
        parallelize_module(layer, tp, PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole))
    for norm in (layer.q_norm, layer.k_norm):
        norm.weight = nn.Parameter(distribute_tensor(norm.weight.detach(), tp, [Replicate()]))
        if gathers:
            norm.register_forward_pre_hook(
                lambda _, given: (given[0].redistribute(placements=[Replicate()]),)
            )
            norm.register_forward_hook(lambda _, __, out: out.redistribute(placements=[Shard(2)]))


@lru_cache(maxsize=8)
def explained(*, entrance: bool = False, gathers: bool = False, dims: int = 1) -> Explanation:
    def make(mesh: DeviceMesh | None = None) -> nn.Module:
        model = Net(dims)
        if mesh is not None:
            for layer in model.layers:
                assert isinstance(layer, Layer)
                shard_layer(layer, mesh["tp"], entrance=entrance, gathers=gathers)
        return model

    source = FactoryModel("own:net", make, frozenset({"mesh"}), False)
    program = trace(source, TheirPlan.OWN, Mesh.parse(f"tp={TP}"), StepSettings(1, SEQ))
    assert program_from_json(program_json(program)) == program
    return explain(program)


def found(explanation: Explanation, kind: FindingKind) -> list[Finding]:
    return [finding for finding in explanation.findings if finding.kind is kind]


def test_gradients_of_one_input_that_are_summed_one_by_one_are_found_with_the_advice() -> None:
    (finding,) = found(explained(), FindingKind.SUMMED_APART)
    extra = f"{2 * LAYERS * PAYLOAD / 2**20:,.3g} MiB"  # two all-reduces of TP=2 too many in each layer
    assert finding.subject == "layers.*"
    assert finding.reason == (
        "each sums the gradient of the same input by itself (q, k, v in layers.*), and the sums are added: "
        f"3 all-reduces per layer against 1 in the backward, {extra} more on the wire per rank and step"
    )
    assert finding.advice == (
        "Sum once for all: PrepareModuleInput around layers.* with desired_input_layouts=Replicate() hands "
        "one DTensor to all, whose gradient is summed on its way out; no input_layouts below it."
    )


def test_the_advice_holds_what_it_promises() -> None:
    mended, as_it_was = explained(entrance=True), explained()
    assert not found(mended, FindingKind.SUMMED_APART)
    spared = as_it_was.wire_bytes - mended.wire_bytes
    assert spared == 2 * LAYERS * PAYLOAD


def test_norms_side_by_side_that_gather_other_tensors_of_one_size_are_not_said_to_gather_the_same() -> None:
    explanation = explained(gathers=True)
    gathers = [group for group in explanation.collectives if group.kind == "all_gather"]
    assert {group.module for group in gathers} == {"layers.*.q_norm", "layers.*.k_norm"}
    assert not found(explanation, FindingKind.COLLECTIVES_REPEAT)


def test_what_is_gathered_and_cut_again_with_nothing_in_between_that_needs_it_is_found() -> None:
    explanation = explained(gathers=True)
    (finding,) = found(explanation, FindingKind.GATHERED_FOR_NOTHING)
    sent = f"{4 * LAYERS * PAYLOAD / 2 / 2**20:,.3g} MiB"
    assert finding.subject == "layers.*.q_norm, layers.*.k_norm"
    assert finding.reason == (
        "gathers dim 2 of what it takes, and what it gives is cut along it again, though nothing in it works "
        f"along that dim: {4 * LAYERS} all-gathers a step, forward and backward, {sent} on the wire per rank"
    )
    assert finding.advice == (
        "Let it run on each rank's part. Each rank then finds a part of its weights' gradients: as DTensors "
        "(Replicate) they are summed."
    )
    reasons = {
        (group.module, group.phase): group.reason
        for group in explanation.collectives
        if group.kind == "all_gather"
    }
    assert reasons["layers.*.q_norm", Phase.FORWARD] == (
        "What q_norm takes is made whole along dim 2, of which each rank has a part."
    )
    assert reasons["layers.*.q_norm", Phase.BACKWARD] == (
        "What q_norm gave was cut along dim 2: its gradient is made whole again."
    )


def test_a_norm_over_what_it_gathers_needs_it() -> None:
    assert not found(explained(gathers=True, dims=2), FindingKind.GATHERED_FOR_NOTHING)


def without_entrance(name: str, own: Style, *, sequence_parallel: bool) -> Plan:
    """A built-in plan in which each of wq, wk, wv, w1 and w3 takes its input for itself."""
    plan = builtin_plan(name, sequence_parallel=sequence_parallel)
    apart = ("wq", "wk", "wv", "w1", "w3")
    rules = (rule for rule in plan.rules if rule.style.name is not StyleName.GATHER_INPUT)
    return Plan(
        "one-by-one",
        tuple(Rule(rule.pattern, own) if rule.pattern.endswith(apart) else rule for rule in rules),
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_under_a_plan_of_ours_the_advice_is_a_style_of_ours(device: str) -> None:
    settings, mesh = StepSettings(2, 16), Mesh.parse("tp=2")

    def kinds(plan: Plan) -> dict[FindingKind, Finding]:
        program = trace(find_model("llama3-debug?n_layers=2"), plan, mesh, settings, device=device)
        return {finding.kind: finding for finding in explain(program).findings}

    apart = kinds(without_entrance("rowwise", Style(StyleName.COLWISE), sequence_parallel=False))
    finding = apart[FindingKind.SUMMED_APART]
    assert finding.reason.startswith(
        "each sums the gradient of the same input by itself (wq, wk, wv in layers.*.attention; w1, w3 in "
        "layers.*.feed_forward), and the sums are added: 5 all-reduces per layer against 2 in the backward"
    ), finding.reason
    assert finding.advice == (
        'Sum once for all: give "layers.*.attention" and "layers.*.feed_forward" the style gather_input, and '
        "leave input out below it."
    )
    gathers = kinds(
        without_entrance("rowwise", Style(StyleName.COLWISE, input=Part(1)), sequence_parallel=True)
    )
    assert gathers.keys() >= {FindingKind.COLLECTIVES_REPEAT}
    assert FindingKind.SUMMED_APART not in gathers  # the mirror image of what is said already
    for sequence_parallel in (True, False):
        plain = kinds(builtin_plan("rowwise", sequence_parallel=sequence_parallel))
        assert not plain.keys() & {FindingKind.SUMMED_APART, FindingKind.COLLECTIVES_REPEAT}
