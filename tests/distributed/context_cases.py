"""Models whose sequences ranks share, on meshes of 2, 3 and 4 ranks, by each way; as data."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import msgspec
import torch
from torch import Tensor

from shardwise.core.mesh import Mesh
from shardwise.core.plan import AnyPlan, ContextAttention, Plan, TheirPlan
from shardwise.models.gpt import GPTConfig
from shardwise.models.llama import LlamaConfig
from shardwise.models.model_source import ModelSource
from shardwise.models.moe import MoEConfig
from shardwise.models.source import find_model
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan

BATCH, SEQ, VOCAB = 2, 24, 61
_SIZES = (
    f"vocab_size={VOCAB},hidden_size=32,intermediate_size=48,num_hidden_layers=2,num_attention_heads=4,"
    "num_key_value_heads=2,head_dim=8"
)
OURS: dict[str, LlamaConfig | GPTConfig] = {
    "llama": LlamaConfig(VOCAB, 32, 2, 4, 2, 48),
    "gpt": GPTConfig(VOCAB, 32, 2, 4, 64, SEQ),
    "moe": MoEConfig(VOCAB, 32, 2, 4, 2, 24, n_experts=4, top_k=2, qk_norm=True),
}
THEIRS = {name: f"{name}?{_SIZES}" for name in ("hf:llama", "hf:qwen3")}
# all that a plan must say where no tensor is cut: every rank holds everything
WHOLE = Plan.from_toml("""
name = "whole"
[rules]
"**" = "replicate"
""")


class ContextCase(msgspec.Struct, frozen=True):
    """A model on a mesh, whose attention goes by a way. has_documents: sequences are packed."""

    model: str
    mesh: str
    way: str
    recompute: str = "none"
    plan_name: str = ""
    has_documents: bool = False

    @property
    def name(self) -> str:
        more = (self.plan_name, self.recompute.replace("none", ""), "documents" if self.has_documents else "")
        return ", ".join(filter(None, (f"{self.model} on {self.mesh} by {self.way}", *more)))

    @property
    def world_size(self) -> int:
        return Mesh.parse(self.mesh).world_size

    @property
    def is_telling(self) -> bool:
        """On two ranks: each model once, each way with documents, one recomputed."""
        is_ring = self.way == ContextAttention.RING
        if self.world_size > 2 or self.recompute == "selective-ops":
            return False
        if self.has_documents:
            return is_ring == (self.model == "llama")
        return is_ring == (self.model in ("llama", "hf:qwen3"))

    @property
    def source(self) -> ModelSource:
        if self.model in OURS:
            return ModelSpec("tiny", OURS[self.model], "")
        return find_model(THEIRS[self.model])

    @property
    def plan(self) -> AnyPlan:
        if self.plan_name in list(TheirPlan):
            return TheirPlan(self.plan_name)
        if self.plan_name == WHOLE.name:
            return replace(WHOLE, context_attention=ContextAttention(self.way))
        plan = builtin_plan(self.plan_name, family=self.source.family)
        return replace(plan, context_attention=ContextAttention(self.way))


def context_cases(world_size: int) -> Iterator[ContextCase]:
    """What is trained on so many ranks. Their models under no tensor axis have a plan by which every rank
    holds everything."""
    ways = tuple(ContextAttention)
    match world_size:
        case 2:
            for model, way in product(OURS, ways):
                yield ContextCase(model, "cp=2", way, plan_name="rowwise")
            for model, way in product(THEIRS, ways):
                yield ContextCase(model, "cp=2", way, plan_name="whole")
            yield ContextCase("hf:llama", "cp=2", "gather", plan_name="unsharded")
            for recompute, way in product(("full", "selective-ops"), ways):
                yield ContextCase("llama", "cp=2", way, recompute, "rowwise")
            for model, way in product(("llama", "gpt", "hf:qwen3"), ways):
                plan = "whole" if model in THEIRS else "rowwise"
                yield ContextCase(model, "cp=2", way, "full", plan, has_documents=True)
        case 3:
            yield from (ContextCase("llama", "cp=3", way, plan_name="rowwise") for way in ways)
        case 4:
            for model, way in product(("llama", "gpt"), ways):
                yield ContextCase(model, "cp=2,tp=2", way, plan_name="rowwise")
                yield ContextCase(model, "cp=4", way, plan_name="rowwise")
            yield ContextCase("hf:llama", "cp=2,tp=2", "gather", plan_name="hf")
            for plan in ("rowwise@dtensor", "routed-interleaved"):
                yield ContextCase("llama", "cp=2,tp=2", "gather", plan_name=plan)
            yield from (
                ContextCase("llama", f"{axis}=2,cp=2", "ring", "full", "rowwise") for axis in ("dp", "fsdp")
            )
        case _:
            raise ValueError(world_size)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Two global batches, [B, S]; ranks have unequal numbers of valid labels."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(2):
        ids_BS, labels_BS = torch.randint(8, VOCAB, (2, BATCH, SEQ), generator=generator)
        labels_BS[1, 5:] = -100
        found.append((ids_BS, labels_BS))
    return found


def packed() -> tuple[Tensor, Tensor]:
    """Positions and documents of the first batch, [B, S]: some end in the middle of a rank's chunk."""
    lengths = ((5, 11, 8), (13, 1, 10))
    positions = torch.stack([torch.cat([torch.arange(each) for each in row]) for row in lengths])
    documents = torch.stack(
        [torch.cat([torch.full((each,), at) for at, each in enumerate(row)]) for row in lengths]
    )
    return positions, documents
