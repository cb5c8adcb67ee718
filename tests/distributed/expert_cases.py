"""Mixtures of experts under plans that share experts out, or cut them inside: models, meshes, rules and
routers, as data; for each way a fault that the engine takes and only a proof can see."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shardwise.core.mesh import Mesh
from shardwise.core.plan import Family, Plan, Rule, Style
from shardwise.models.model_source import ModelSource
from shardwise.models.moe import MoEConfig
from shardwise.models.source import find_model
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.planner.make import Wish, make_plan
from shardwise.verify.expected import shake

BATCH, SEQ, VOCAB = 4, 8, 61  # every model knows so many ids
CONFIG = MoEConfig(VOCAB, 32, 2, 4, 4, 16, n_experts=4, top_k=2, qk_norm=True)
INSIDE = {"w1": "shard(1)", "w2": "shard(2)", "w3": "shard(1)"}
PARTIAL = {"style": "replicate", "gradient": "partial"}
Rules = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """rules: of the feed-forward, in place of the built-in plan's. fault: in place of right ones; found_in:
    the end of a parameter's name of which a proof says so, or none where the output tells. model: of
    transformers, its small twin under the plan that is made for it. local_means: a fault, with which each
    rank takes an auxiliary loss' means over its own tokens. gate: what becomes of the router's initial
    weights: as they are, ties (zeros: all tokens choose the same experts), or one (all choose one expert and
    then another, by far)."""

    name: str
    mesh: str
    rules: Rules
    fault: Rules
    found_in: str = ""
    gate: str = "random"
    top_k: int = 2
    capacity: float = 0.0
    sequence_parallel: bool = True
    accumulation: int = 1
    recompute: str = "none"
    model: str = ""
    aux_loss: float = 0.0
    local_means: bool = False

    @property
    def is_telling(self) -> bool:
        """Whether it runs in `make test`; the others show nothing that one of these doesn't."""
        return self.name not in _REST

    @property
    def has_fault(self) -> bool:
        return bool(self.fault) or self.local_means

    @property
    def has_checkpoint(self) -> bool:
        """Whether it is one of those whose checkpoints are looked at: of each way to hold experts one."""
        return self.name in {
            "over ep", "over tp", "over ep and inside over tp", "over ep, whole over tp",
            "over ep under FSDP", "mixtral, as made for both axes",
        }  # fmt: skip

    @property
    def close(self) -> float:
        """How far it may be off, relative: transformers' models take some things in float32."""
        return 1e-4 if self.model else 1e-10

    @property
    def source(self) -> ModelSource:
        if self.model:
            small = find_model(self.model).small(2)
            assert small is not None
            return small
        return ModelSpec(
            "tiny", replace(CONFIG, top_k=self.top_k, capacity=self.capacity, aux_loss=self.aux_loss), ""
        )

    def plan(self, *, with_fault: bool = False) -> Plan:
        if self.model:
            return make_plan(self.source, Wish(Mesh.parse(self.mesh))).plan
        made = builtin_plan("rowwise", sequence_parallel=self.sequence_parallel, family=Family.MOE)
        rules = {rule.pattern: rule for rule in made.rules}
        if self.rules:
            rules = {pattern: rule for pattern, rule in rules.items() if ".feed_forward" not in pattern}
        for name, value in (self.rules | (self.fault if with_fault else {})).items():
            pattern = f"layers.*.feed_forward.{name}".rstrip(".")
            rules[pattern] = Rule(pattern, Style.from_value(value))
        return replace(made, name=self.name, rules=tuple(rules.values()))

    def initial(self, name: str, tensor: Tensor) -> None:
        """Shakes an initial parameter, and makes the router's what the case wants; in place."""
        shake(name, tensor)
        if name.endswith("gate.weight") and self.gate != "random":
            tensor.zero_()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Two global batches, [B, S]; ranks have unequal numbers of valid labels."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(2):
        ids_BS = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
        labels_BS = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
        labels_BS[1, 5:] = labels_BS[3, 1:] = -100
        found.append((ids_BS, labels_BS))
    return found


GATE_UNSUMMED: Rules = {"router.gate": "replicate"}
OVER_TP: Rules = {"router.gate": PARTIAL, "experts": {"style": "experts", "axis": "tp"}}
WHOLE_TOKENS: Rules = {
    "router.gate": "replicate",
    "experts": {"style": "experts", "axis": "tp", "output": "replicate"},
}
BOTH: Rules = {"": "whole", "experts": {"style": "experts", "output": "replicate", "parameters": INSIDE}}
WHOLE_OVER_TP: Rules = {"router.gate": PARTIAL, "experts": {"style": "experts", "gradient": "partial"}}
TIES_OVER_TP = "over tp, ties: a rank gets no token"
TIES_WHOLE = "over ep, whole over tp, ties"
_REST = {
    "over ep, every expert of every token", "over ep, micro-batches", "inside over tp", TIES_OVER_TP,
    TIES_WHOLE, "over tp, tokens whole, ties", "over ep and inside over tp, ties",
    "over ep and inside over tp, summed by themselves", "over four",
    "over four, ties", "an auxiliary loss over tp, tokens whole",
    "an auxiliary loss inside over tp", "an auxiliary loss over ep, recomputed",
    "an auxiliary loss over both, summed by themselves", "an auxiliary loss under FSDP", "mixtral, as made",
    "gpt_oss, biases beside weights, as made for both axes",
}  # fmt: skip
CASES = (
    Case("over ep", "ep=2", {}, {}),
    Case("over ep, ties: a rank gets no token", "ep=2", {}, {}, gate="ties"),
    Case("over ep, all tokens to one expert", "ep=2", {}, {}, gate="ties", top_k=1),
    Case("over ep, a capacity that drops", "ep=2", {}, {}, capacity=0.5),
    Case("over ep, every expert of every token", "ep=2", {}, {}, top_k=4),
    Case("over ep, micro-batches", "ep=2", {}, {}, accumulation=2),
    Case("over ep, recomputed", "ep=2", {}, {}, recompute="full"),
    Case("inside over tp", "tp=2", {}, {}),
    Case("over tp", "tp=2", OVER_TP, GATE_UNSUMMED, "router.gate.weight"),
    Case(TIES_OVER_TP, "tp=2", OVER_TP, GATE_UNSUMMED, "router.gate.weight", gate="ties"),
    Case("over tp, tokens whole", "tp=2", WHOLE_TOKENS, {"experts": {"style": "experts", "axis": "tp"}},
         sequence_parallel=False),
    Case("over tp, tokens whole, ties", "tp=2", WHOLE_TOKENS, {}, sequence_parallel=False, gate="ties"),
    Case("over ep and inside over tp", "ep=2,tp=2", {}, {}),
    Case("over ep and inside over tp, ties", "ep=2,tp=2", {}, {}, gate="ties"),
    Case("over ep and inside over tp, summed by themselves", "ep=2,tp=2", BOTH, {}),
    Case("over ep, whole over tp", "ep=2,tp=2", WHOLE_OVER_TP, {"experts": "experts"}, "experts.w1"),
    Case(TIES_WHOLE, "ep=2,tp=2", WHOLE_OVER_TP, {"experts": "experts"}, "experts.w1", gate="ties"),
    Case("over ep under FSDP", "fsdp=2,ep=2", {}, {}),
    Case("an auxiliary loss over ep", "ep=2", {}, {}, "router.gate.weight", aux_loss=0.5, local_means=True),
    Case("an auxiliary loss over ep, recomputed", "ep=2", {}, {}, aux_loss=0.5, recompute="full"),
    Case("an auxiliary loss over tp", "tp=2", OVER_TP, {}, aux_loss=0.5),
    Case("an auxiliary loss over tp, tokens whole", "tp=2", WHOLE_TOKENS, {}, sequence_parallel=False,
         aux_loss=0.5),
    Case("an auxiliary loss inside over tp", "tp=2", {}, {}, aux_loss=0.5, capacity=0.5),
    Case("an auxiliary loss over both", "ep=2,tp=2", {}, {}, aux_loss=0.5),
    Case("an auxiliary loss over both, summed by themselves", "ep=2,tp=2", BOTH, {}, aux_loss=0.5),
    Case("an auxiliary loss under FSDP", "fsdp=2,tp=2", {}, {}, aux_loss=0.5),
    Case("mixtral, as made", "ep=2", {}, {}, model="hf:mixtral"),
    Case("mixtral, as made for both axes", "ep=2,tp=2", {}, {}, model="hf:mixtral"),
    Case("gpt_oss, biases beside weights, as made for both axes", "ep=2,tp=2", {}, {}, model="hf:gpt_oss"),
    Case("over four", "ep=4", {}, {}),
    Case("over four, ties", "ep=4", {}, {}, gate="ties"),
)  # fmt: skip
