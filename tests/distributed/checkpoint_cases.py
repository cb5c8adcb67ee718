"""Models under plans and meshes of four ranks whose state is saved and taken up again, as data; and what each
tensor of that state is: numbers that tell its name and place."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from shardwise.core.mesh import Mesh
from shardwise.core.pipeline import Pipeline, Schedule
from shardwise.core.plan import AnyPlan, Plan, TheirPlan
from shardwise.core.training import Saved
from shardwise.models.gpt import GPTConfig
from shardwise.models.llama import LlamaConfig
from shardwise.models.model_source import ModelSource
from shardwise.models.moe import MoEConfig
from shardwise.models.source import find_model
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.planner.make import Wish, make_plan

VOCAB, LAYERS, SEQ = 61, 4, 16
CONFIGS: dict[str, LlamaConfig | GPTConfig] = {
    # a vocabulary that no mesh divides; fewer KV heads than ranks
    "llama": LlamaConfig(VOCAB, 32, LAYERS, 8, 8, 48),
    "llama tied": LlamaConfig(VOCAB, 32, LAYERS, 8, 8, 48, tied=True),
    "llama even": LlamaConfig(64, 32, LAYERS, 8, 8, 48),
    "gpt": GPTConfig(VOCAB, 32, LAYERS, 8, 64, 2 * SEQ),
    "moe": MoEConfig(VOCAB, 32, LAYERS, 8, 8, 16, n_experts=8, top_k=2, qk_norm=True),
}
HUGGING_FACE = {
    # queries, keys and values are one weight, and so are gate and up; 2 KV heads
    "hf:phi3": "hf:phi3?num_hidden_layers=2,hidden_size=32,intermediate_size=48,num_attention_heads=8,"
    "num_key_value_heads=2,vocab_size=64,pad_token_id=0",
    # dropout is on
    "hf:gpt2": "hf:gpt2?n_layer=2,n_embd=32,n_head=4,vocab_size=64,n_positions=32",
    "hf:mixtral": "hf:mixtral?num_hidden_layers=2,hidden_size=32,intermediate_size=32,num_attention_heads=4,"
    "num_key_value_heads=2,vocab_size=64,num_local_experts=4",
}


@dataclass(frozen=True, slots=True)
class Case:
    """plan: a built-in one's name, "made" for one that is made for the model, "hf" or "unsharded"."""

    model: str
    mesh: str
    plan: str = "rowwise"
    chunks: int = 1

    @property
    def is_telling(self) -> bool:
        """Whether `make test` runs it too: with others of its model, for each takes up what another saved."""
        return self.model not in ("llama tied", "llama even", "gpt", "hf:mixtral")

    @property
    def name(self) -> str:
        return f"{self.model} on {self.mesh}, {self.plan}{', interleaved' * (self.chunks > 1)}"

    @property
    def source(self) -> ModelSource:
        if self.model in HUGGING_FACE:
            return find_model(HUGGING_FACE[self.model])
        return ModelSpec("tiny", CONFIGS[self.model], "")

    @property
    def pipeline(self) -> Pipeline | None:
        stages = Mesh.parse(self.mesh).stages
        schedule = Schedule.INTERLEAVED if self.chunks > 1 else Schedule.ONE_F_ONE_B
        return Pipeline(stages, self.chunks, schedule) if stages > 1 else None

    def any_plan(self) -> AnyPlan:
        match self.plan:
            case "hf" | "unsharded":
                return TheirPlan(self.plan)
            case "made":
                return _made(self)
            case _:
                return builtin_plan(self.plan, family=self.source.family)


@cache
def _made(case: Case) -> Plan:
    return make_plan(case.source, Wish(Mesh.parse(case.mesh), seq=SEQ)).plan


CASES = (
    Case("llama", "tp=4", "routed-interleaved"),
    Case("llama", "dp=2,tp=2", "routed-interleaved"),
    Case("llama", "dp=2,fsdp=2", "unsharded"),
    Case("llama", "fsdp=2,cp=2", "unsharded"),
    Case("llama", "pp=2,tp=2", "colwise"),
    Case("llama", "pp=2,fsdp=2", "unsharded", chunks=2),
    Case("llama", "dp=2,tp=2", "rowwise@dtensor"),
    Case("llama even", "fsdp=2,tp=2", "rowwise@dtensor"),
    Case("llama even", "fsdp=4,tp=1", "routed"),
    Case("llama tied", "fsdp=2,tp=2"),
    Case("llama tied", "pp=2,tp=2"),
    Case("llama tied", "fsdp=4", "unsharded"),
    Case("gpt", "tp=4"),
    Case("gpt", "fsdp=2,tp=2"),
    Case("gpt", "pp=4", "unsharded"),
    Case("moe", "ep=2,tp=2"),
    Case("moe", "fsdp=2,ep=2"),
    Case("moe", "tp=4"),
    Case("hf:phi3", "tp=4", "made"),
    Case("hf:phi3", "fsdp=2,tp=2", "made"),
    Case("hf:mixtral", "tp=4", "hf"),
    Case("hf:mixtral", "fsdp=2,tp=2", "hf"),
    Case("hf:mixtral", "fsdp=4", "unsharded"),
)


def known(name: str, whole: Tensor) -> None:
    """Makes a whole parameter one whose every element tells its name and place."""
    numbers = torch.arange(whole.numel(), dtype=torch.float64).view(whole.shape)
    whole.copy_(numbers + crc32(name.encode()) % 1000 / 1000)


MOMENTS = {"exp_avg": (-1.0, 0.25), "exp_avg_sq": (1.0, 0.5)}
"""What each is, of the parameter: times and plus."""


def saved(step: int, ranks: int = 4) -> Saved:
    return Saved(
        step, 8 * step, "digest of the tokens", {"model": "tiny", "seed": 3}, {"shardwise": "1"}, 1, ranks
    )


def taken_from(case: Case) -> Case:
    """The case of the same model before it, in turns."""
    same = [each for each in CASES if each.model == case.model]
    return same[same.index(case) - 1]


def folder_of(folder: Path, case: Case) -> Path:
    return folder / str(CASES.index(case))
