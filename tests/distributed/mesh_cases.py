"""Meshes of 2, 4 and 8 ranks, and the models and plans that are trained on them, as data."""

from dataclasses import replace
from itertools import product
from math import prod

import msgspec
import torch
from torch import Tensor

from shardwise.core.case import StepSettings
from shardwise.core.mesh import AXES, Mesh
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.models.gpt import GPTConfig
from shardwise.models.llama import LlamaConfig
from shardwise.models.moe import MoEConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan

BATCH, SEQ, VOCAB = 8, 16, 61
IGNORED = -100
MODELS: dict[str, LlamaConfig | GPTConfig] = {
    "llama": LlamaConfig(VOCAB, 32, 2, 8, 8, 48),
    "llama tied": LlamaConfig(VOCAB, 32, 2, 8, 8, 48, tied=True),
    "gpt": GPTConfig(VOCAB, 32, 2, 8, 64, 2 * SEQ),
    "moe": MoEConfig(VOCAB, 32, 2, 8, 8, 16, n_experts=8, top_k=2, qk_norm=True, aux_loss=0.1),
}


class MeshCase(msgspec.Struct, frozen=True):
    """A model on a mesh, under the plan that its axes ask for; a tensor axis has sequence parallelism."""

    model: str
    mesh: str
    accumulation: int = 1
    recompute: str = "none"
    reshard: bool = True
    reduce_once: bool = False
    param_dtype: str | None = None
    is_telling: bool = False

    @property
    def name(self) -> str:
        more = {
            f"accumulation={self.accumulation}": self.accumulation > 1,
            self.recompute: self.recompute != "none",
            "kept after the forward": not self.reshard,
            "reduced once": self.reduce_once,
            f"computed in {self.param_dtype}": self.param_dtype is not None,
        }
        return ", ".join((f"{self.model} on {self.mesh}", *(text for text, holds in more.items() if holds)))

    @property
    def world_size(self) -> int:
        return Mesh.parse(self.mesh).world_size

    @property
    def spec(self) -> ModelSpec:
        config = MODELS[self.model]
        return ModelSpec("tiny", replace(config, n_layers=max(config.n_layers, self.stages)), "")

    @property
    def stages(self) -> int:
        return Mesh.parse(self.mesh).stages if self.mesh else 1

    @property
    def plan(self) -> AnyPlan:
        mesh = Mesh.parse(self.mesh)
        if mesh.tp == 1 and (self.model != "moe" or mesh.experts == 1):
            return TheirPlan.UNSHARDED
        return builtin_plan("rowwise", family=self.spec.family)

    @property
    def settings(self) -> StepSettings:
        return StepSettings(
            BATCH,
            SEQ,
            dtype="float64",
            accumulation=max(self.accumulation, self.stages),
            reshard_after_forward=self.reshard,
            reduce_once=self.reduce_once,
            param_dtype=self.param_dtype,
            recompute=self.recompute,
        )


class Fault(msgspec.Struct, frozen=True):
    """A parameter's gradient that the step doesn't sum over some axes. said: what verify calls them."""

    mesh: str
    parameter: str
    unsummed: tuple[str, ...]
    n_ranks: int = 2
    param_dtype: str | None = None

    @property
    def said(self) -> str:
        return "+".join(self.unsummed)

    @property
    def case(self) -> MeshCase:
        return MeshCase("llama", self.mesh, param_dtype=self.param_dtype)

    @property
    def name(self) -> str:
        return f"{self.parameter} on {self.mesh} not summed over {self.said}, {self.param_dtype}"


FAULTS = (
    Fault("dp=2,tp=2", "layers.0.attention_norm.weight", ("dp",)),
    Fault("ep=2,tp=2", "layers.1.feed_forward.w1.weight", ("ep",)),
    Fault("dp=2,fsdp=2", "norm.weight", ("dp",)),
    Fault("dp=2,ep=2", "tok_embeddings.weight", ("dp", "ep"), 4),
    Fault("dp=2,ep=2", "layers.0.attention.wo.weight", ("ep",)),
    Fault("dp=2,fsdp=2", "layers.1.attention.wk.weight", ("dp",), param_dtype="bfloat16"),
)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Two global batches, [B, S]; ranks and micro-batches have unequal numbers of valid labels."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(2):
        ids_BS = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
        labels_BS = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
        labels_BS[1, 5:] = labels_BS[3, 1:] = labels_BS[6, :9] = IGNORED
        found.append((ids_BS, labels_BS))
    return found


def meshes(world_size: int) -> list[str]:
    """Every way to make so many ranks of the axes that a step runs over, each of them 1, 2 or 4 and more."""
    names = [axis.name for axis in AXES if axis.runs]
    sizes = [size for size in (1, 2, 4, 8) if size <= world_size]
    return [
        ",".join(f"{name}={size}" for name, size in zip(names, each, strict=True) if size > 1)
        for each in product(sizes, repeat=len(names))
        if prod(each) == world_size
    ]


# what faults below are found in is right but for them; GPT over fsdp and cp is in a whole run
TELLING = {
    "moe on ep=2,tp=2",
    "moe on fsdp=2,ep=2",
    "llama on cp=2,tp=2",
    "llama tied on pp=2,tp=2",
    "moe on pp=2,ep=2",
    "llama on dp=2,fsdp=2, accumulation=2, reduced once",
    "llama on fsdp=2,tp=2, accumulation=2, kept after the forward, reduced once",
    "llama on fsdp=2,tp=2, computed in bfloat16",
}


AS_WELL = (
    MeshCase("llama", "dp=2,fsdp=2"),
    MeshCase("llama", "cp=2,tp=2"),
    MeshCase("gpt", "fsdp=2,tp=2"),
    MeshCase("gpt", "fsdp=2,cp=2"),
)
"""On 4 ranks, beside those in turn."""


def models_on(mesh: str, number: int) -> tuple[str, ...]:
    """number: of the mesh among those of as many ranks. On 2 all models. On 4 what whole runs don't show to
    the last digit (test_train_axes.py): they are of Llama with a head of its own on every mesh, and of
    experts or GPT in turn. Where an axis cuts experts, experts too. On 8 each model in turn."""
    world_size = Mesh.parse(mesh).world_size
    if world_size == 8:
        return (tuple(MODELS)[number % len(MODELS)],)
    if world_size < 4:
        return tuple(MODELS)
    if Mesh.parse(mesh).experts > 1:
        return "llama tied", "gpt", "moe"
    return "llama tied", "gpt" if number % 2 else "moe"


def mesh_cases(world_size: int) -> list[MeshCase]:
    """Every mesh of so many ranks."""
    found = []
    for number, mesh in enumerate(meshes(world_size)):
        found += [MeshCase(model, mesh) for model in models_on(mesh, number)]
    if world_size == 4:
        told = {case.name for case in found}
        found += [case for case in AS_WELL if case.name not in told]
        found += [
            MeshCase("llama", mesh, accumulation=2, reshard=reshard, reduce_once=once)
            for mesh in ("dp=2,fsdp=2", "fsdp=2,tp=2")
            for reshard, once in ((True, False), (True, True), (False, True))
        ]
        found += [
            MeshCase("llama", "pp=2,fsdp=2", accumulation=2, reshard=False, reduce_once=once)
            for once in (False, True)
        ]
        mixed = ("dp=2,fsdp=2", "fsdp=2,tp=2", "fsdp=4")
        found += [MeshCase("llama", mesh, param_dtype="bfloat16") for mesh in mixed]
    return [msgspec.structs.replace(case, is_telling=case.name in TELLING) for case in found]
