"""Training steps of one rank's part on one GPU: how long they take, and what the allocator holds. Needs CUDA;
nothing else here does.

    python -m benchmarks.gpu_steps --out benchmarks/data/h100-steps.json   the steps that fit 80 GB
    python -m benchmarks.gpu_steps --large --out benchmarks/data/h200-steps.json   torchtitan's, up to 100 GB

Ranks are those of a fake process group, so collectives take no time and what they bring is noise; compute,
launches and memory are real. Each case runs in a process of its own. What else the file holds stays in it.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from shardwise.parallel.loss import Loss

WARM_UPS, STEPS = 2, 3
TIMEOUT_S = 150


@dataclass(frozen=True, slots=True)
class Case:
    """One step. layers: of the model's. batch: sequences per data-parallel rank."""

    model: str
    layers: int
    plan: str
    batch: int
    seq: int
    dtype: str = "bfloat16"
    tp: int = 1
    fsdp: int = 1
    param_dtype: str | None = None
    reduce_dtype: str | None = None
    recompute: str = "none"
    compiled: bool = False
    compiled_loss: bool = False

    @property
    def tag(self) -> str:
        mesh = f"fsdp={self.fsdp},tp={self.tp}" if self.fsdp > 1 else f"tp={self.tp}"
        mixed = f"/{self.param_dtype}/{self.reduce_dtype}" if self.param_dtype else ""
        again = f" recompute {self.recompute}" if self.recompute != "none" else ""
        more = " compiled" * self.compiled + " loss compiled" * self.compiled_loss
        return (
            f"{self.model} x{self.layers} {mesh} {self.plan} b{self.batch} s{self.seq} "
            f"{self.dtype}{mixed}{again}{more}"
        )


MIXED = Case("llama3-8b", 32, "unsharded", 2, 8192, "float32", 1, 8, "bfloat16", "float32", "selective-ops")


def small_cases() -> list[Case]:
    """What fits 80 GB."""
    wide, narrow = (f"gpt3-175b?hidden={h},n_heads=16,ffn_hidden={4 * h}" for h in (2048, 1024))
    fp32 = [
        Case("llama3-8b", 4, plan, 4, 8192, "float32", 8)
        for plan in ("rowwise", "colwise", "routed", "rowwise@dtensor")
    ]
    half = [Case("llama3-8b", 8, plan, 4, 8192, tp=8) for plan in ("rowwise", "colwise", "rowwise@dtensor")]
    return [
        *fp32,
        *half,
        Case("llama3-8b", 4, "replicated", 1, 8192),
        Case("llama3-8b", 4, "rowwise", 2, 4096, tp=2),
        Case("llama3-8b", 4, "rowwise", 2, 4096, tp=4),
        Case("llama3-70b", 4, "rowwise", 2, 8192, tp=8),
        Case("llama3-70b", 4, "rowwise", 2, 8192, tp=8, recompute="full"),
        Case("llama3-8b", 4, "rowwise", 1, 8192, tp=2, recompute="full"),
        Case("llama3-70b", 2, "rowwise", 2, 4096, tp=4),
        Case("llama3-8b", 8, "rowwise@dtensor", 4, 8192, tp=8, recompute="selective-ops"),
        *(replace(MIXED, layers=8, compiled_loss=loss) for loss in (False, True)),
        replace(MIXED, layers=8, recompute="none", compiled=True, compiled_loss=True),
        Case("llama3-debug", 6, "rowwise", 8, 1024, tp=2),
        Case("llama3-debug", 6, "replicated", 8, 1024, "float32"),
        Case("gpt3-175b", 2, "rowwise", 2, 2048, tp=8),
        Case(wide, 8, "rowwise", 4, 2048, tp=2),
        Case(narrow, 8, "rowwise", 1, 1024, tp=8),
    ]


def large_cases() -> list[Case]:
    """torchtitan's settings of December 2024, whose memory it published; the last has a quarter of the
    layers."""
    return [
        MIXED,
        replace(MIXED, fsdp=128),
        replace(MIXED, batch=1, seq=32768, recompute="full"),
        replace(MIXED, layers=8, recompute="none"),
        replace(
            MIXED,
            model="llama3-70b",
            layers=20,
            plan="rowwise@dtensor",
            batch=16,
            tp=8,
            fsdp=32,
            recompute="full",
        ),
    ]


class _CompiledLoss:
    """A loss that torch.compile fuses."""

    def __init__(self, loss: "Loss") -> None:
        import torch

        self.backward_context = loss.backward_context
        self._call = torch.compile(lambda *given: loss(*given))

    def __call__(
        self, logits: "Tensor", labels_BS: "Tensor", valid: "Tensor | int | None" = None
    ) -> "Tensor":
        found: Tensor = self._call(logits, labels_BS, valid)
        return found


def run_case(case: Case) -> dict[str, object]:
    """In a process of its own, on its first GPU."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from shardwise.core.case import StepSettings
    from shardwise.core.mesh import Mesh
    from shardwise.core.plan import Plan
    from shardwise.models.specs import get_spec
    from shardwise.parallel.apply import applied_to
    from shardwise.parallel.plans import load_any_plan
    from shardwise.step.build import build_model, device_mesh
    from shardwise.step.train import TrainStep, mixed_precision

    mesh = Mesh((("fsdp", case.fsdp), ("tp", case.tp)) if case.fsdp > 1 else (("tp", case.tp),))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=mesh.world_size)
    device = torch.device("cuda", 0)
    spec = get_spec(case.model).with_layers(case.layers)
    settings = StepSettings(
        case.batch, case.seq, case.dtype, case.param_dtype, case.reduce_dtype, recompute=case.recompute
    )
    plan = load_any_plan(case.plan, sequence_parallel=True, family=spec.family)
    on = device_mesh(mesh, "cuda")
    model = build_model(
        spec,
        plan if isinstance(plan, Plan) else None,
        on,
        dtype=getattr(torch, case.dtype),
        device=device,
        seed=0,
        policy=mixed_precision(settings),
        recompute=case.recompute,
        compiled=case.compiled,
    )
    own = applied_to(model).loss
    step = TrainStep(model, mesh=on, loss=_CompiledLoss(own) if case.compiled_loss else own)
    ids = torch.randint(spec.vocab_size, (case.batch, case.seq), generator=torch.Generator().manual_seed(0))
    batch = [(ids if isinstance(plan, Plan) else ids.to(device), ids)]
    seconds = []
    for number in range(WARM_UPS + STEPS):
        torch.cuda.synchronize()
        if number == WARM_UPS:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step(batch)
        torch.cuda.synchronize()
        if number >= WARM_UPS:
            seconds.append(time.perf_counter() - start)
    stats = torch.cuda.memory_stats()
    return {
        "tag": case.tag,
        **asdict(case),
        "steps": seconds,
        "active": stats["active_bytes.all.peak"],
        "allocated": stats["allocated_bytes.all.peak"],
        "reserved": stats["reserved_bytes.all.peak"],
        "retries": stats["num_alloc_retries"],
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
    }


def run_apart(number: int, *, large: bool = False, timeout_s: float = TIMEOUT_S) -> dict[str, Any] | str:
    """One of the cases in a process of its own: what it gave, or why it gave nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu_steps", "--out", "unused", "--case", str(number)]
    try:
        ran = subprocess.run(
            [*command, "--large"] if large else command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return f"took more than {timeout_s:.0f} s"
    except subprocess.CalledProcessError as error:
        return str(error.stderr)[-2000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_steps", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--large", action="store_true", help="torchtitan's settings instead")
    parser.add_argument(
        "--out", type=Path, required=True, help="its steps are replaced; what else it holds stays"
    )
    parser.add_argument("--case", type=int, help="run one, and print it")
    given = parser.parse_args()
    cases = large_cases() if given.large else small_cases()
    if given.case is not None:
        print(json.dumps(run_case(cases[given.case])))
        return 0
    document = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    before = {each["tag"]: each for each in document.get("steps", [])}
    found, failed = [], 0
    for number, case in enumerate(cases):
        print(f"{number + 1}/{len(cases)} {case.tag}", file=sys.stderr, flush=True)
        ran = run_apart(number, large=given.large)
        if isinstance(ran, str):
            print(f"failed, what the file had of it stays: {ran}", file=sys.stderr, flush=True)
            found += [before[case.tag]] if case.tag in before else []
            failed += 1
            continue
        found.append(ran)
        print(
            f"   {min(ran['steps']) * 1e3:.0f} ms, active {ran['active'] / 2**30:.2f} GiB",
            file=sys.stderr,
            flush=True,
        )
    document["steps"] = found
    given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
