"""What the ranks of test_program.py run, and the cases of that test as data."""

from dataclasses import replace

import msgspec
import torch
from torch import Tensor

from shardwise.core.batch_part import part_of_batch
from shardwise.core.case import StepSettings
from shardwise.core.errors import PlanError
from shardwise.core.mesh import Mesh, joined
from shardwise.core.plan import Family, Plan
from shardwise.core.program import Phase
from shardwise.launch import RankContext
from shardwise.models.gpt import GPTConfig
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_names, builtin_plan
from shardwise.step.build import build_model, device_mesh
from shardwise.step.groups import make_groups
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep, mixed_precision
from tests.distributed.c10d_log import Issued, ranks_of, writing_down

SEQ, BATCH = 24, 4
# one plan of each engine for the settings that don't touch the embedding
BOTH_ENGINES = ("routed", "rowwise@dtensor")


class Case(msgspec.Struct, frozen=True):
    """A plan on a mesh. The vocabulary divides by no number of ranks, or by all."""

    plan: str
    mesh: str
    sequence_parallel: bool = True
    recompute: str = "none"
    recompute_layers: int | None = None
    accumulation: int = 1
    dtype: str = "float32"
    param_dtype: str | None = None
    reduce_dtype: str | None = None
    vocab_size: int = 257
    family: Family = Family.LLAMA

    @property
    def name(self) -> str:
        differs = {
            "no sequence parallelism": not self.sequence_parallel,
            f"recompute {self.recompute}": self.recompute != "none",
            f"of {self.recompute_layers} layers": self.recompute_layers is not None,
            f"accumulation={self.accumulation}": self.accumulation != 1,
            f"computed in {self.param_dtype}, reduced in {self.reduce_dtype}": self.param_dtype is not None,
            self.dtype: self.dtype != "float32",
            f"V={self.vocab_size}": self.vocab_size != 257,
            self.family: self.family is not Family.LLAMA,
        }
        return ", ".join((f"{self.plan} on {self.mesh}", *(text for text, holds in differs.items() if holds)))

    @property
    def is_telling(self) -> bool:
        """Whether `make test` runs it too: on two ranks all but twins, on four tp with another axis, and
        the plan of one axis that sends the most kinds. Two axes without tp: test_meshes.py."""
        if self.mesh == "tp=2":
            if self.plan == "rowwise@dtensor":  # what accumulates does so on four
                is_twin = self.accumulation == 2 or self.dtype == "bfloat16" or self.vocab_size == 96
                return not is_twin
            if self.plan in ("routed", "replicated", "rowwise") and self.sequence_parallel:
                return self.family is Family.GPT or self.dtype != "float32" or self._repeats
            return self.sequence_parallel or not self.plan.startswith("colwise")
        if self.mesh == "tp=3":
            return False  # what three ranks can't divide evenly, two can't either
        if self.mesh == "tp=4":
            return self.plan == "routed-interleaved"
        if self.plan == "rowwise@dtensor":
            return self.mesh == "fsdp=2,tp=2" and self.accumulation == 2
        return self.plan == "routed-interleaved" or self.recompute == "full"

    @property
    def _repeats(self) -> bool:
        return self.recompute != "none" or self.accumulation > 1

    @property
    def world_size(self) -> int:
        return Mesh.parse(self.mesh).world_size

    @property
    def settings(self) -> StepSettings:
        return StepSettings(
            BATCH,
            SEQ,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            reduce_dtype=self.reduce_dtype,
            accumulation=self.accumulation,
            recompute=self.recompute,
            recompute_layers=self.recompute_layers,
        )

    @property
    def spec(self) -> ModelSpec:
        if self.family is Family.GPT:
            is_tied = not self.plan.endswith("@dtensor")
            return ModelSpec("tiny", GPTConfig(self.vocab_size, 48, 2, 12, 96, SEQ + 7, tied=is_tied), "")
        n_kv_heads = 12 if self.mesh == "tp=3" else 4
        return ModelSpec("tiny", LlamaConfig(self.vocab_size, 48, 2, 12, n_kv_heads, 96), "")

    def make_plan(self) -> Plan:
        return builtin_plan(self.plan, sequence_parallel=self.sequence_parallel, family=self.family)

    def ids(self) -> Tensor:
        """Of the global batch, [B, S]; skewed, as tokens are, so that routed sends uneven parts."""
        generator = torch.Generator().manual_seed(11)
        return (torch.rand(BATCH, SEQ, generator=generator) ** 3 * self.vocab_size).long()


def cases(world_size: int) -> list[Case]:
    """All cases for a number of ranks."""
    tp = f"tp={world_size}"
    found = [Case(name, tp) for name in builtin_names()]
    found += [Case(name, tp, sequence_parallel=False) for name in builtin_names() if _is_offered_whole(name)]
    found += [Case(name, tp, vocab_size=96) for name in BOTH_ENGINES]
    found += [
        Case(name, tp, sp, family=Family.GPT)
        for name, sp in (("routed", True), ("rowwise", False), ("rowwise@dtensor", True))
    ]
    if world_size == 2:
        found += [
            Case(name, tp, recompute=what)
            for name, what in zip(BOTH_ENGINES, ("full", "selective-ops"), strict=True)
        ]
        found += [Case(name, tp, accumulation=2) for name in ("replicated", *BOTH_ENGINES)]
        found += [Case(name, tp, dtype="bfloat16") for name in BOTH_ENGINES]
        found += [Case("rowwise", mesh) for mesh in ("dp=2", "fsdp=2", "ep=2")]
        found += [
            Case(
                "rowwise", "fsdp=2", recompute="selective-ops", param_dtype="bfloat16", reduce_dtype="float32"
            ),
            Case("rowwise", tp, recompute="full", recompute_layers=1),
        ]
    if world_size == 4:
        found += [
            Case(name, mesh)
            for mesh in ("dp=2,tp=2", "fsdp=2,tp=2")
            for name in ("replicated", *BOTH_ENGINES)
        ]
        found += [Case("routed-interleaved", "dp=2,tp=2")]
        found += [
            Case(name, mesh, accumulation=2) for mesh in ("dp=2,tp=2", "fsdp=2,tp=2") for name in BOTH_ENGINES
        ]
        found += [Case("rowwise", "fsdp=2,tp=2", recompute="full")]
        found += [Case("rowwise", mesh) for mesh in ("dp=2,fsdp=2", "dp=2,ep=2", "fsdp=2,ep=2")]
    return found


def _is_offered_whole(name: str) -> bool:
    try:
        builtin_plan(name, sequence_parallel=False)
    except PlanError:
        return False
    return True


def collectives(context: RankContext, payload: bytes) -> bytes:
    """Per case, of the telling ones or the rest: what this rank issues in its second step. Groups are named
    by their axis."""
    found: dict[str, list[Issued]] = {}
    for case in cases(context.world_size):
        if case.is_telling == (payload == b"telling"):
            context.note(case.name)
            found[case.name] = _issued(case, context)
    return msgspec.json.encode(found)


def _issued(case: Case, context: RankContext) -> list[Issued]:
    mesh_noun, settings = Mesh.parse(case.mesh), case.settings
    mesh = device_mesh(mesh_noun, context.device.type)
    model = build_model(
        case.spec,
        case.make_plan(),
        mesh,
        dtype=getattr(torch, settings.dtype),
        device=context.device,
        seed=0,
        policy=mixed_precision(settings),
        recompute=settings.recompute,
        recompute_layers=settings.recompute_layers,
    )
    phases = [Phase.FORWARD]
    step = TrainStep(model, mesh=mesh, on_phase=phases.append)
    batch = micro_batches(case.ids(), mesh_noun, settings, context.rank)
    step(batch)
    issued: list[Issued] = []
    phases.append(Phase.FORWARD)
    with writing_down(issued, lambda: str(phases[-1])):
        step(batch)
    axes = {ranks_of(group): joined(names) for names, group in make_groups(mesh).items()}
    return [replace(call, group=axes[call.group]) for call in issued]


def micro_batches(
    ids_BS: Tensor, mesh: Mesh, settings: StepSettings, rank: int
) -> list[tuple[Tensor, Tensor]]:
    """A rank's (ids, labels) of a global batch."""
    portion = Portion(None, part_of_batch(mesh, rank), settings.accumulation)
    return portion.cut(ids_BS, ids_BS.roll(-1, 1))
