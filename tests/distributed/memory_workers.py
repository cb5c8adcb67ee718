"""What the ranks of test_program_memory.py run: one real step, weighed by what PyTorch's CPU allocator hands
out and takes back."""

import gc
import time
from typing import Any
from unittest.mock import patch

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.plan import AnyPlan, ContextAttention, TheirPlan
from shardwise.launch import RankContext
from shardwise.measure.memory import kept_bytes
from shardwise.models.specs import get_spec
from shardwise.parallel.builtin import builtin_plan
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep
from tests.allocated import begin_and_peak

SIZE = "hidden=192,ffn_hidden=512,vocab_size=4000"
MODEL = f"llama3-debug?n_layers=2,{SIZE}"
_SECOND_STEP = "the second step"
# for gloo's threads, which on a busy machine wait for a core
_A_MOMENT_S = 0.02


class Case(msgspec.Struct, frozen=True):
    plan: str
    recompute: str = "none"
    batch: int = 4
    seq: int = 256
    is_telling: bool = True
    mesh: str = "tp=2"
    attention: str = "gather"
    model: str = MODEL
    schedule: str | None = None
    chunks: int = 1
    accumulation: int = 1
    reduce_once: bool = False
    reshard: bool = True

    @property
    def name(self) -> str:
        fsdp = {
            f", {self.accumulation} micro-batches": self.accumulation > 1,
            ", reduced once": self.reduce_once,
            ", kept after the forward": not self.reshard,
        }
        return self._name + "".join(text for text, holds in fsdp.items() if holds)

    @property
    def _name(self) -> str:
        on_other = "" if self.mesh == "tp=2" else f", {self.mesh}"
        if Mesh.parse(self.mesh).context > 1:
            on_other += f" by {self.attention}"
        if self.stages > 1:
            on_other = f", {self.mesh}, {self.schedule or '1f1b'} of {self.chunks}"
        return f"{self.plan}, recompute {self.recompute}, {self.batch} x {self.seq}{on_other}"

    @property
    def made(self) -> AnyPlan:
        if self.plan == TheirPlan.UNSHARDED:
            return TheirPlan.UNSHARDED
        family = get_spec(self.model).family
        return builtin_plan(self.plan, family=family, context_attention=ContextAttention(self.attention))

    @property
    def stages(self) -> int:
        return Mesh.parse(self.mesh).stages

    @property
    def settings(self) -> StepSettings:
        accumulation = self.accumulation if self.stages == 1 else self.batch
        return StepSettings(
            self.batch, self.seq, recompute=self.recompute, accumulation=accumulation,
            schedule=self.schedule, chunks=self.chunks, reduce_once=self.reduce_once,
            reshard_after_forward=self.reshard,
        )  # fmt: skip

    def ids(self) -> torch.Tensor:
        """Of the batch, [B, S]."""
        return torch.randint(
            get_spec(self.model).vocab_size,
            (self.batch, self.seq),
            generator=torch.Generator().manual_seed(3),
        )


CASES = (
    *(Case(plan) for plan in ("rowwise", "rowwise@dtensor")),
    *(Case(plan, is_telling=False) for plan in ("routed", "colwise", "replicated", "colwise@dtensor")),
    Case("rowwise", recompute="full"),
    Case("rowwise@dtensor", recompute="selective-ops", is_telling=False),
    Case(
        "rowwise@dtensor", batch=1, seq=2048
    ),  # what DTensor gathers of one sequence isn't copied: it lives on as it came
    Case("rowwise", batch=1, seq=2048, mesh="cp=2", is_telling=False),
    Case("rowwise", batch=1, seq=2048, mesh="cp=2", attention="ring"),
    Case("rowwise", "full", batch=1, seq=2048, mesh="cp=2", attention="ring", is_telling=False),
)


DEEPER = f"llama3-debug?n_layers=5,{SIZE}"
CASES += (
    Case("unsharded", mesh="pp=2", model=DEEPER, batch=6, is_telling=False),
    Case("unsharded", mesh="pp=2", model=DEEPER, chunks=2, recompute="full"),
    Case("unsharded", mesh="pp=2", model=f"{DEEPER},tied=true", schedule="gpipe", is_telling=False),
)


MIXTURE = "moe-debug?n_layers=2,vocab_size=8000"
CASES += (
    Case("unsharded", mesh="fsdp=2", accumulation=2, reduce_once=True),
    Case("unsharded", mesh="fsdp=2", is_telling=False),
    Case("unsharded", mesh="fsdp=2", reshard=False, is_telling=False),
    Case("unsharded", mesh="dp=2", is_telling=False),
    Case("rowwise", mesh="ep=2", model=MIXTURE, is_telling=False),
)


class Weighed(msgspec.Struct, frozen=True):
    """Bytes of a rank: kept after the second step, live when it began, and the most that lived during it."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    begin_bytes: int
    peak_bytes: int


def weigh(context: RankContext, payload: bytes) -> bytes:
    """Per case by its name, of those that the payload names."""
    names, found = msgspec.json.decode(payload, type=list[str]), {}
    for case in (case for case in CASES if case.name in names):
        context.note(case.name)
        gc.collect()  # what an earlier plan left in cycles must not be freed while this one is weighed
        found[case.name] = _weigh(case, device_mesh(Mesh.parse(case.mesh), context.device.type), context)
    return msgspec.json.encode(found)


def _weigh(case: Case, mesh: DeviceMesh, context: RankContext) -> Weighed:
    """The profiler tells of every block that the allocator hands out or takes back, inside kernels too. It
    watches from before the model is built, so what was handed out and not taken back is what lives, and
    nothing is counted by hand.

    It sees the main thread only, and gloo's threads may be the last to let go of a buffer. So each rank gives
    gloo a moment after every wait, and a block that is handed out again was taken back before, seen or not.
    """
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        patch.object(dist.Work, "wait", _patient(dist.Work.wait)),
    ):
        ids_BS = case.ids()
        batch = Portion.on(mesh, case.settings.accumulation).cut(ids_BS.clone(), ids_BS.roll(-1, 1))
        model = build_model(
            get_spec(case.model),
            case.made,
            mesh,
            dtype=torch.float32,
            device=context.device,
            seed=0,
            reshard=case.reshard,
            recompute=case.recompute,
            pipeline=case.settings.pipeline(Mesh.parse(case.mesh)),
        )
        step = TrainStep(model, mesh=mesh, reduce_once=case.reduce_once)
        step(batch)
        step.optimizer.zero_grad(set_to_none=True)
        with record_function(_SECOND_STEP), _PatientWaits():
            step(batch)
        kept = kept_bytes(model, step.optimizer)
    return Weighed(*kept, *begin_and_peak(profiler, _SECOND_STEP))


def _patient(wait: Any) -> Any:
    def waiting(work: Any, *args: Any) -> Any:
        done = wait(work, *args)
        time.sleep(_A_MOMENT_S)
        return done

    return waiting


class _PatientWaits(TorchDispatchMode):
    """The same for functional collectives, whose work is let go of inside their wait: what goes in is held a
    moment longer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "_c10d_functional::wait_tensor":
            time.sleep(_A_MOMENT_S)
        return out
