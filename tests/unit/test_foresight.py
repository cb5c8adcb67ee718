"""What is foreseen of a plan from traces: the rules on invented steps, then planted faults, and what is right
beside each, really traced."""

import time
from dataclasses import replace
from importlib import import_module
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveCall, CollectiveKind
from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.placement import Partial, Placement, Replicate
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.core.program import Block, Collective, Holding, Phase, Program
from shardwise.models.source import find_model
from shardwise.parallel.builtin import builtin_names, builtin_plan
from shardwise.trace.lineage import Cut, Lineage, Meeting
from shardwise.verify.foresight import Foresight, cut_as_one, foresee, parts_not_summed, summed_too_often
from shardwise.verify.reasons import with_suspicions
from tests.matrix import thinned

MODELS = "tests.distributed.verify_models:"


# ----------------------------------------------------------------------------------------- invented steps


def cut(before: tuple[int, ...], *pieces: tuple[int, ...]) -> Lineage:
    return Lineage((), (Cut("w", before, pieces),), frozenset({"w"}))


HALVES = cut((2, 16, 32), (2, 16, 16), (2, 16, 16))


def test_halves_of_what_a_rank_has_a_half_of_are_other_halves() -> None:
    (finding,) = cut_as_one(HALVES, cut((2, 16, 16), (2, 16, 8), (2, 16, 8)), 2)
    assert (finding.kind, finding.subject, finding.cause) == (FindingKind.SUSPECTED, "w", Cause.CUT_AS_ONE)
    assert finding.reason == (
        "what it gives is taken apart ([2, 16, 32] into [2, 16, 16] + [2, 16, 16]), so several weights lie "
        "in it, and it is cut as one: what a rank "
        "takes apart ([2, 16, 16] into [2, 16, 8] + [2, 16, 8]) are other parts"
    )


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        pytest.param(HALVES, HALVES, id="gathered before"),
        pytest.param(
            HALVES,
            replace(cut((2, 16, 16), (2, 16, 8), (2, 16, 8)), cut_plainly=frozenset()),
            id="each half cut by itself",
        ),
        pytest.param(HALVES, Lineage((), (), frozenset({"w"})), id="taken apart in another way"),
        pytest.param(
            cut((2, 4, 16, 12), (2, 4, 16, 4)), cut((2, 2, 16, 12), (2, 2, 16, 4)), id="each head taken apart"
        ),
        pytest.param(
            cut((2, 16, 48), (2, 16, 4, 12)), cut((2, 16, 24), (2, 16, 2, 12)), id="unfolded into heads"
        ),
        pytest.param(
            cut((2, 16, 48), (2, 16, 1, 48)), cut((2, 16, 24), (2, 16, 1, 24)), id="unfolded into one"
        ),
    ],
)
def test_what_is_right_is_not_said_to_be_cut_as_one(whole: Lineage, part: Lineage) -> None:
    assert not list(cut_as_one(whole, part, 2))


def test_an_outer_dim_that_is_as_large_on_a_rank_as_in_the_whole_is_not_what_was_cut() -> None:
    whole, part = cut((2, 16, 48), (2, 16, 3, 16)), cut((2, 16, 24), (2, 16, 3, 8))
    assert [finding.cause for finding in cut_as_one(whole, part, 2)] == [Cause.CUT_AS_ONE]


def meets(*shape: int, of_dtensors: bool = False) -> Lineage:
    return Lineage((Meeting("norm.weight", (shape,), of_dtensors),), ())


def program(*calls: tuple[str, int, Phase], grad: Placement = Replicate()) -> Program:  # noqa: B008
    """A norm of 16 float32, and all-reduces."""
    holding = Holding(
        "norm.weight", "norm", "float32", (16,), (16,), (Replicate(),), 64, (16,), (grad,), 64, 128
    )
    sent = [
        Collective(CollectiveCall(CollectiveKind.ALL_REDUCE, "tp", 2, "float32", n, n, str(phase)), module)
        for module, n, phase in calls
    ]
    return Program(
        "m",
        "p",
        "none",
        "cpu",
        0,
        (("tp", 2),),
        StepSettings(2, 16),
        16,
        (Block(tuple(sent)),),
        (holding,),
        (),
        (),
    )


def unsummed(found: Program, part: Lineage) -> list[Finding]:
    return list(parts_not_summed(meets(2, 16, 4, 16), part, found, {"norm", "up"}, 2))


def test_a_whole_parameter_that_meets_a_part_on_each_rank_needs_a_sum() -> None:
    (finding,) = unsummed(program(), meets(2, 16, 2, 16))
    assert (finding.subject, finding.cause) == ("norm.weight", Cause.PARTS_NOT_SUMMED)
    assert finding.reason == (
        "each of 2 ranks meets it with [2, 16, 2, 16] of [2, 16, 4, 16], a part of its gradient, and nothing "
        "sums them"
    )


@pytest.mark.parametrize(
    ("found", "part"),
    [
        pytest.param(program(("norm", 64, Phase.BACKWARD)), meets(2, 16, 2, 16), id="summed"),
        pytest.param(program(("", 64, Phase.BACKWARD)), meets(2, 16, 2, 16), id="summed by a hook"),
        pytest.param(
            program(("replicated parameters", 4096, Phase.BACKWARD)),
            meets(2, 16, 2, 16),
            id="summed with others",
        ),
        pytest.param(program(grad=Partial()), meets(2, 16, 2, 16), id="a part, as DTensor knows"),
        pytest.param(program(), meets(2, 16, 4, 16), id="meets the whole"),
        pytest.param(program(), meets(2, 16, 4, 16, of_dtensors=True), id="meets a DTensor of the whole"),
    ],
)
def test_what_is_right_is_not_said_to_be_unsummed(found: Program, part: Lineage) -> None:
    assert not unsummed(found, part)


@pytest.mark.parametrize(
    "call",
    [
        ("norm", 128, Phase.BACKWARD),
        ("up", 64, Phase.BACKWARD),
        ("norm", 64, Phase.CLIP),
        ("bucket", 32, Phase.BACKWARD),
    ],
)
def test_a_sum_of_something_else_is_none(call: tuple[str, int, Phase]) -> None:
    assert unsummed(program(call), meets(2, 16, 2, 16))


def test_a_dtensor_that_stands_for_more_than_there_is_is_a_whole_taken_for_a_part() -> None:
    on_all = frozenset({"norm.weight"})
    (finding,) = summed_too_often(
        meets(2, 16, 64), meets(2, 32, 64, of_dtensors=True), on_all, frozenset(), 2
    )
    assert finding.cause is Cause.SUMMED_TOO_OFTEN
    assert finding.reason == (
        "it takes [2, 16, 64], which every rank has whole, for a part of [2, 32, 64], and its gradient is "
        "summed: 2 times what it is"
    )
    assert not list(
        summed_too_often(meets(2, 16, 64), meets(2, 16, 64, of_dtensors=True), on_all, frozenset(), 2)
    )
    assert not list(
        summed_too_often(meets(2, 16, 64), meets(2, 32, 64, of_dtensors=True), frozenset(), frozenset(), 2)
    )


def test_a_sequence_parallel_rule_wants_a_part_of_the_sequence() -> None:
    on_all = frozenset({"norm.weight"})
    assert list(summed_too_often(meets(2, 16, 64), meets(2, 16, 64), on_all, on_all, 2))
    assert not list(summed_too_often(meets(2, 16, 64), meets(2, 8, 64), on_all, on_all, 2))


# --------------------------------------------------------------------------------------------- with a proof


def suspected(name: str, cause: Cause) -> Finding:
    return Finding(FindingKind.SUSPECTED, name, "suspected", advice="do it", cause=cause)


def wrong(name: str, cause: Cause, kind: FindingKind = FindingKind.GRADIENT_DIFFERS) -> Finding:
    return Finding(kind, name, "seen", 0.5, cause=cause)


def test_a_suspicion_is_the_reason_of_what_is_wrong_without_one_and_else_dropped() -> None:
    proved = [wrong("a", Cause.UNKNOWN), wrong("b", Cause.AVERAGED), wrong("c", Cause.FORWARD)]
    suspicions = [suspected(name, Cause.PARTS_NOT_SUMMED) for name in ("a", "b", "c", "right")]
    found = with_suspicions(proved, suspicions)
    assert [(each.subject, each.cause, each.reason) for each in found] == [
        ("a", Cause.PARTS_NOT_SUMMED, "suspected"),
        ("b", Cause.AVERAGED, "seen"),
        ("c", Cause.FORWARD, "seen"),
    ]
    assert found[0].relative_error == 0.5
    assert [each.subject for each in with_suspicions(proved, suspicions, add=True)] == [
        "a",
        "b",
        "c",
        "right",
    ]


def test_a_weight_that_is_cut_as_one_is_the_reason_of_a_wrong_output() -> None:
    proved = [wrong("output", Cause.FORWARD, FindingKind.OUTPUT_DIFFERS), wrong("w", Cause.FORWARD)]
    output, weight = with_suspicions(proved, [suspected("w", Cause.CUT_AS_ONE)])
    assert (output.cause, output.reason) == (Cause.CUT_AS_ONE, "seen. w: suspected")
    assert (weight.cause, weight.reason) == (Cause.CUT_AS_ONE, "suspected")
    assert with_suspicions(proved[:1], [suspected("w", Cause.CUT_AS_ONE)]) == proved[:1]


# ------------------------------------------------------------------------------------------- really traced


def seen(model: str, plan: AnyPlan, tp: int = 2, *, small: bool = False) -> Foresight:
    source = find_model(model)
    return foresee((source.small(tp) if small else None) or source, plan, tp, StepSettings(2, 4 * tp))


def told(found: Foresight) -> dict[str, str]:
    return {each.subject: str(each.cause or each.kind) for each in found.findings}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fused_halves", {"gate_up.weight": "cut_as_one"}),
        ("fused_unfolded", {"gate_up.weight": "cut_as_one"}),
        ("by_hand_slope_not_summed", {"slope": "parts_not_summed"}),
        ("by_hand_norm_of_whole", {"norm.weight": "summed_too_often"}),
        ("by_hand_half_logits", {"output": "not_gathered"}),
        ("by_hand_frozen", {"norm.weight": "nothing_arrives"}),
        (
            "by_hand_odd_width",
            dict.fromkeys(("up.weight", "up.bias", "down.weight"), "sizes_not_divisible")
            | {"down": "crashes"},
        ),
    ],
)
def test_a_fault_by_hand_is_named_without_a_rank(name: str, expected: dict[str, str]) -> None:
    assert told(seen(MODELS + name, TheirPlan.OWN)) == expected


def test_a_sum_of_many_gradients_that_is_too_small_for_all_is_seen() -> None:
    found = told(seen("benchmarks.mutants:unreduced_norm", TheirPlan.OWN))
    assert found == {"norm.weight": "parts_not_summed"}  # and none of the norms that are right
    assert seen("benchmarks.mutants:harmless_embedding_routed", TheirPlan.OWN) == Foresight(())


def test_a_bias_meets_what_its_layer_gives_and_not_what_it_takes() -> None:
    assert not seen("tests.distributed.cause_models:bias_in_the_matmul", TheirPlan.OWN).findings


@pytest.mark.parametrize("name", ["fused_pairs", "fused_by_head", "by_hand_right", "by_hand_norm_of_parts"])
def test_what_is_right_by_hand_is_not_suspected(name: str) -> None:
    assert seen(MODELS + name, TheirPlan.OWN) == Foresight(())


# each engine and each way to share rows out; of the others test_styles.py proves all
BUILT_IN = {("rowwise", 3), ("routed", 2), ("replicated", 2), ("colwise@dtensor", 2)}


@pytest.mark.parametrize(
    ("name", "tp"), thinned(product(builtin_names(), (2, 3)), lambda name, tp: (name, tp) in BUILT_IN)
)
def test_no_built_in_plan_is_suspected(name: str, tp: int) -> None:
    for parallel in (True, False):
        if parallel or not name.startswith("routed"):
            assert seen(
                "llama3-8b", builtin_plan(name, sequence_parallel=parallel), tp, small=True
            ) == Foresight(())


def test_the_width_of_a_model_of_any_size_is_no_obstacle() -> None:
    assert seen("llama3.1-405b", builtin_plan("rowwise"), 8) == Foresight(())


NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen3_norms_not_summed",
            {f"model.layers.{layer}.{norm}": "parts_not_summed" for layer in (0, 1) for norm in NORMS},
        ),
        (
            "llama_norm_sequence_parallel",
            {f"model.layers.{n}.post_attention_layernorm.weight": "summed_too_often" for n in (0, 1)},
        ),
        (
            "mixtral_experts_cut_as_one",
            {f"model.layers.{n}.mlp.experts.gate_up_proj": "cut_as_one" for n in (0, 1)},
        ),
        ("llama_one_kv_head", {"model.layers.0.self_attn": "crashes"}),
        ("qwen3_as_shipped", {}),
    ],
)
def test_a_fault_in_a_plan_of_transformers_is_named_without_a_rank(
    name: str, expected: dict[str, str]
) -> None:
    pytest.importorskip(
        "transformers",
        reason="transformers isn't installed, so NOTHING WAS CHECKED under plan hf: "
        "pip install shardwise[hf]",
    )
    assert told(seen(MODELS + name, TheirPlan.HF)) == expected


@pytest.mark.parametrize(
    "name",
    thinned(
        ["llama", "phi3", "gpt_neox", "mixtral", "deepseek_v3", "qwen3_next", "glm4"],
        # whose faults are looked for beside the others', above; glm4's is phi3's way with gate and up
        lambda name: name in ("phi3", "gpt_neox", "deepseek_v3", "qwen3_next"),
    ),
)
def test_no_right_plan_of_transformers_is_suspected(name: str) -> None:
    pytest.importorskip(
        "transformers",
        reason="transformers isn't installed, so NOTHING WAS CHECKED under plan hf: "
        "pip install shardwise[hf]",
    )
    assert seen(f"hf:{name}", TheirPlan.HF, small=True) == Foresight(())


def test_an_uneven_width_that_the_plan_gets_through_with_is_not_suspected() -> None:
    pytest.importorskip(
        "transformers",
        reason="transformers isn't installed, so NOTHING WAS CHECKED under plan hf: "
        "pip install shardwise[hf]",
    )
    assert seen(
        "hf:llama?intermediate_size=97,vocab_size=101,num_hidden_layers=2", TheirPlan.HF
    ) == Foresight(())


@pytest.mark.parametrize("name", ["by_data", "by_data_when_sharded"])
def test_what_cannot_be_traced_is_said_and_not_suspected(name: str) -> None:
    found = seen(f"{__name__}:{name}", TheirPlan.OWN)
    assert not found.findings
    assert found.note == (
        "its forward raised DynamicOutputShapeException: aten.nonzero.default. The data decides what runs "
        "there, and a trace has only shapes."
    )


class ByData(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * input.nonzero().sum()


def by_data(mesh: object = None) -> nn.Module:
    return ByData(8, 8)


def by_data_when_sharded(mesh: object = None) -> nn.Module:
    return nn.Embedding(8, 8) if mesh is None else ByData(8, 8)


class Slow(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        time.sleep(4.5)
        return super().forward(input)


def slow_when_sharded(mesh: object = None) -> nn.Module:
    return nn.Embedding(8, 8) if mesh is None else Slow(8, 8)


def test_a_forward_that_takes_too_long_is_given_up_and_not_suspected(monkeypatch: pytest.MonkeyPatch) -> None:
    # by the module, not by its dotted name: shardwise.verify is the verb
    monkeypatch.setattr(import_module("shardwise.verify.rehearsal"), "LIMIT_S", 4.0)
    assert seen(f"{__name__}:slow_when_sharded", TheirPlan.OWN) == Foresight(
        (), "its forward takes more than 4 s to trace."
    )


class SummedByHand(nn.Module):
    """A scale that meets a part of the sequence on each rank; its gradient is summed in another way than an
    all-reduce over an axis."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.mesh = mesh
        if mesh is not None:
            self.scale.register_hook(lambda gradient: self.summed(gradient))

    def summed(self, gradient: Tensor) -> Tensor:
        group = dist.new_group(list(range(dist.get_world_size())))
        whole: Tensor = funcol.all_reduce_coalesced([gradient], "sum", group)[0]
        return whole

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden_BSH: Tensor = self.embedding(ids_BS)
        if self.mesh is None:
            return hidden_BSH * self.scale
        part_BSH = hidden_BSH.chunk(self.mesh.size(), 1)[self.mesh.get_local_rank()] * self.scale
        return torch.cat([part_BSH] * self.mesh.size(), 1)


def summed_by_hand(mesh: DeviceMesh | None = None) -> nn.Module:
    return SummedByHand(mesh)


def summed_by_nobody(mesh: DeviceMesh | None = None) -> nn.Module:
    model = SummedByHand(mesh)
    model.scale._backward_hooks = None
    return model


def test_a_gradient_that_is_summed_by_a_rare_collective_or_on_a_group_of_its_own_is_not_suspected() -> None:
    assert told(seen(f"{__name__}:summed_by_nobody", TheirPlan.OWN)) == {"scale": "parts_not_summed"}
    assert seen(f"{__name__}:summed_by_hand", TheirPlan.OWN) == Foresight(())
