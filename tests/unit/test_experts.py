"""Experts shared out: routes of all ranks together, what is refused, and what a trace says of what a router
decides."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveKind
from shardwise.core.errors import ModelError, OptionError, PlanError
from shardwise.core.grouped import GROUPED
from shardwise.core.mesh import Mesh
from shardwise.core.plan import Family, Plan, Rule, Style
from shardwise.core.program import Collective, Phase
from shardwise.models.moe import MoE, MoEConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.apply import parallelize
from shardwise.parallel.builtin import builtin_plan
from shardwise.parallel.context.fit import attending
from shardwise.parallel.experts import combined, number_of_experts, takes_tokens_of_experts
from shardwise.parallel.need import state_bytes
from shardwise.parallel.resolve import resolve
from shardwise.torch_private import local_part
from shardwise.trace.fakes import fake_world
from shardwise.trace.trace import trace

CONFIG = MoEConfig(61, 32, 2, 4, 4, 16, n_experts=6, top_k=2)
SPEC = ModelSpec("tiny", CONFIG, "")
NAME = "layers.*.feed_forward.experts"


def plan(**experts: object) -> Plan:
    """The built-in one, with another rule for the experts."""
    made = builtin_plan("rowwise", family=Family.MOE)
    rules = {rule.pattern: rule for rule in made.rules}
    if experts:
        rules[NAME] = Rule(NAME, Style.from_value(experts))
    return replace(made, rules=tuple(rules.values()))


class Listed(nn.Module):
    """Experts as modules, with the call that experts have."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return hidden


def test_experts_are_told_by_their_call_and_their_weights() -> None:
    layer = MoE(CONFIG).get_submodule("layers.0.feed_forward")
    experts = layer.get_submodule("experts")
    assert takes_tokens_of_experts(experts)
    assert number_of_experts(experts) == 6
    assert not takes_tokens_of_experts(layer)
    assert not takes_tokens_of_experts(layer.get_submodule("router"))
    assert number_of_experts(Listed()) is None


def test_experts_that_ranks_cannot_share_evenly_are_refused_with_what_is_allowed() -> None:
    message = (
        f'plan "rowwise": rule "{NAME}" (experts): layers.0.feed_forward.experts, a Experts, shares out 6 '
        "experts over ep=4. Use ep in {1, 2, 3, 6}."
    )
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        resolve(SPEC.build(), plan(), tp=1, experts=4)
    with pytest.raises(PlanError, match=r"over tp=4\. Use tp in \{1, 2, 3, 6\}\.$"):
        resolve(SPEC.build(), plan(style="experts", axis="tp"), tp=4)


def test_experts_in_a_list_are_refused_with_what_to_do() -> None:
    model = SPEC.build()
    for layer in model.layers:
        layer.get_submodule("feed_forward").experts = Listed()
    message = (
        f'plan "rowwise": rule "{NAME}" (experts): layers.0.feed_forward.experts, a Listed, holds '
        "each.0.weight, and is to hold weights of its own, [experts, ...] each. Stack them "
        "(torch.stack), or cut experts inside: local, colwise, rowwise."
    )
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        resolve(model, plan(style="experts"), tp=1, experts=2)


def test_what_is_not_called_as_experts_is_refused() -> None:
    rules = (*plan().rules, Rule("layers.*.feed_forward.router", Style.from_value("experts")))
    with pytest.raises(PlanError, match=r"isn't called as experts\(hidden, top_k_index, top_k_weights\)"):
        resolve(SPEC.build(), replace(plan(), rules=rules), tp=1, experts=2)


def test_an_unknown_axis_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(PlanError, match=r'axis is "dp"\. Did you mean "tp"\? Allowed: ep, tp\.$'):
        plan(style="experts", axis="dp")


def test_a_plan_for_experts_survives_toml() -> None:
    for made in (plan(), plan(style="experts", axis="tp"), plan(style="experts", output="replicate")):
        assert Plan.from_toml(made.to_toml()) == made


def test_a_dropped_assignment_is_a_row_of_zeros() -> None:
    rows = torch.arange(6.0).view(3, 2)
    expand = torch.tensor([[2, 0], [3, 1], [3, 3]])
    weights = torch.tensor([[0.5, 2.0], [9.0, 1.0], [9.0, 9.0]])
    expected = torch.stack((rows[2] * 0.5 + rows[0] * 2, rows[1], torch.zeros(2)))
    assert torch.equal(combined(rows, expand, weights), expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trace_has_balanced_exchanges_and_says_what_the_router_could_need(accumulation: int) -> None:
    batch, seq = 4, 12
    settings = StepSettings(batch, seq, accumulation=accumulation)
    program = trace(SPEC, plan(), Mesh.parse("ep=2"), settings, device="cuda")
    exchanges = [each for each in program.collectives() if each.by_data is not None]
    assert len(exchanges) == 2 * 4 * accumulation  # there and back, forward and backward, in both layers
    assignments = batch * seq * CONFIG.top_k // 2 // accumulation
    for each in exchanges:
        assert each.call.kind is CollectiveKind.ALL_TO_ALL
        assert each.call.axis == "ep"
        assert each.call.wire_bytes == assignments / 2 * CONFIG.hidden * 4
        assert each.by_data is not None
        assert each.by_data.expert_load == 1
        assert each.by_data.bound_bytes == assignments * CONFIG.hidden * 4
    experts = {
        h.name: h.local_shape for h in program.holdings if h.name.startswith("layers.0.feed_forward.experts")
    }
    assert experts["layers.0.feed_forward.experts.w1"] == (3, 16, 32)


def exchanges_and_rows(load: float, mesh: str, rank: int = 0) -> tuple[list[Collective], set[int]]:
    """What is exchanged in the forward, and how many rows the rank's experts meet."""
    settings = StepSettings(6, 12, dtype="bfloat16", expert_load=load)
    program = trace(SPEC, plan(), Mesh.parse(mesh), settings, device="cuda", rank=rank)
    forward = [each for each in program.collectives() if each.by_data and each.phase is Phase.FORWARD]
    meets = {
        op.inputs[0].shape[0] for op in program.ops() if op.name == GROUPED and op.phase is Phase.FORWARD
    }
    return forward, meets


def test_the_busiest_rank_s_experts_meet_the_load_that_is_assumed_and_the_others_what_is_left() -> None:
    ranks, rows = 3, 6 * 12 * CONFIG.top_k
    assert exchanges_and_rows(1.0, "ep=3")[1] == {rows // ranks}
    forward, busiest = exchanges_and_rows(1.5, "ep=3")
    assert busiest == {rows // 2}
    assert exchanges_and_rows(1.5, "ep=3", rank=2)[1] == {rows // 4}
    row_bytes = CONFIG.hidden * 2
    there, back = forward[:2]
    assert there.call.wire_bytes == rows // ranks // 2 * row_bytes
    assert back.call.wire_bytes == rows // ranks // 2 * 2 * row_bytes
    for each in (there, back):
        assert each.by_data is not None
        assert each.by_data.mean_bytes == rows / ranks * 2 / 3 * row_bytes
        assert each.by_data.max_bytes == 1.5 * each.by_data.mean_bytes == back.call.wire_bytes
    assert exchanges_and_rows(3.0, "ep=3")[1] == {rows}


@pytest.mark.parametrize(
    ("mesh", "load", "message"),
    [
        (
            "ep=3",
            4.0,
            "--expert-load is 4, and 3 ranks share the experts out: one that gets all has 3 times the mean. "
            "Use 1 to 3.",
        ),
        (
            "tp=1",
            2.0,
            "--expert-load 2: here no ranks share experts out. Leave it out, or give the mesh an axis ep, "
            "and the experts the style experts.",
        ),
    ],
)
def test_a_load_that_ranks_can_not_have_is_one_line(mesh: str, load: float, message: str) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        exchanges_and_rows(load, mesh)


def test_a_router_that_drops_by_whole_sequences_wants_them_whole() -> None:
    model = MoE(replace(CONFIG, capacity=1.0))
    message = (
        f'plan "rowwise": rule "{NAME}" (experts): layers.0.feed_forward.experts gets the tokens of a '
        "rank's part of the sequence, and layers.0.feed_forward.router drops some of whole sequences. Switch "
        "that off (capacity=0), or cut experts inside."
    )
    over_tp = plan(style="experts", axis="tp")
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        resolve(model, over_tp, tp=2)
    resolve(MoE(CONFIG), over_tp, tp=2)
    resolve(model, plan(), tp=2, experts=2)
    with pytest.raises(ModelError, match="needs the whole sequence"):
        attending(model, 2, 8)
    attending(MoE(CONFIG), 2, 8)


@pytest.mark.parametrize("mesh", ["tp=1", "ep=3", "ep=3,tp=2", "tp=2"])
def test_the_memory_that_a_plan_needs_is_that_of_a_ranks_experts(mesh: str) -> None:
    axes = Mesh.parse(mesh)
    with fake_world(axes, rank=0, device="cpu") as device_mesh:
        model = parallelize(SPEC.build(), plan(), device_mesh)
        held = sum(local_part(parameter).numel() for parameter in model.parameters())
    assert state_bytes(SPEC.build(), plan(), axes, torch.float32) == pytest.approx(4 * 4 * held, rel=0.01)
