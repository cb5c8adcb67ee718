"""What the host takes to issue a step's ops: a transformer so small that its kernels take next to nothing,
stepped and timed phase by phase.

Who fits divides each phase by the ops of its traced Program, and on a CPU takes off what its kernels cost.
Waiting for other ranks is not in it: on a CPU the thread's own seconds count, on a GPU the host waits for
nothing. A differentiable collective is measured on its own.
"""

from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardwise.calibrate.clock import host_clock
from shardwise.calibrate.links import AXIS, ORIGIN
from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Partial
from shardwise.core.plan import Plan
from shardwise.core.program import Phase
from shardwise.core.sample import Sample
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel import collectives, exchanges
from shardwise.parallel.axis import Axis
from shardwise.step.build import build_model
from shardwise.step.train import TrainStep

HEADS = 8
TOKENS = 32
WARM_UPS = 3
STEPS, QUICK_STEPS = 12, 3
COLLECTIVES = 200
PHASES = (Phase.FORWARD, Phase.BACKWARD)


def small_llama(ranks: int) -> ModelSpec:
    """Four layers, whose heads divide by `ranks`."""
    heads = ranks if ranks > HEADS else HEADS // ranks * ranks
    return ModelSpec("calibrate's", LlamaConfig(64 * ranks, 16 * heads, 4, heads, heads, 32 * heads), "")


def settings_for(ranks: int) -> StepSettings:
    """Of the small steps: a sequence that `ranks` cut evenly."""
    return StepSettings(batch=1, seq=max(ranks, TOKENS // ranks * ranks))


def ids_of(spec: ModelSpec, ranks: int) -> Tensor:
    """The ids of every step."""
    settings = settings_for(ranks)
    return torch.randint(
        spec.vocab_size, (settings.batch, settings.seq), generator=torch.Generator().manual_seed(0)
    )


def time_phases(
    spec: ModelSpec, plan: Plan, mesh: DeviceMesh, device: torch.device, name: str, *, quick: bool = False
) -> list[Sample]:
    """The host's seconds in forward and backward. name: of the Program that these steps have. quick: few
    steps."""
    model = build_model(spec, plan, mesh, dtype=torch.float32, device=device, seed=0)
    marks: list[tuple[Phase, float]] = []
    clock = host_clock(device)
    step = TrainStep(model, mesh=mesh, on_phase=lambda phase: marks.append((phase, clock())))
    ranks = mesh.size()
    ids = ids_of(spec, ranks)  # on the host, where the styles take them from
    taken: dict[Phase, list[float]] = {phase: [] for phase in PHASES}
    for number in range(WARM_UPS + (QUICK_STEPS if quick else STEPS)):
        marks.clear()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
        step([(ids, ids)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for (phase, start), (_, end) in pairwise(marks):
            if number >= WARM_UPS and phase in taken:
                taken[phase].append(end - start)
    return [_sample(f"{name} {phase}", taken[phase], ranks) for phase in PHASES]


def time_differentiable(axis: Axis, device: torch.device) -> Sample:
    """The host's seconds to issue an all-gather of a few bytes through parallel/collectives.py, beside what
    the collective itself takes (on a CPU the host is what carries it out)."""
    x = torch.zeros(8, device=device, requires_grad=True)
    full = 8 * axis.size

    def whole() -> object:
        return collectives.all_gather(x, 0, axis, full_size=full, grad_placement=Partial(), origin=ORIGIN)

    flat = x.detach()
    out = torch.empty(full, device=device)
    took_s = _host_s(whole, device)
    if (
        axis.size == 1
    ):  # one rank's all-gather does nothing: what the autograd function takes, and the call below it
        below_s = _host_s(lambda: exchanges.all_gather_into(out, flat, group=axis.group), device)
        took_s = [one + two for one, two in zip(took_s, below_s, strict=True)]
    elif device.type == "cpu":
        itself_s = _host_s(lambda: exchanges.gather_now(flat, 0, axis, full, ORIGIN), device)
        took_s = [one - two for one, two in zip(took_s, itself_s, strict=True)]
    return _sample("collective", [max(each, 0.0) for each in took_s], axis.size)


def _host_s(call: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of the host a call, in sorted batches."""
    times, clock = [], host_clock(device)
    for number in range(1 + 9):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = clock()
        for _ in range(COLLECTIVES // 10):
            call()
        if number:
            times.append((clock() - start) / (COLLECTIVES // 10))
    return sorted(times)


def axis_of_all(device_type: str) -> Axis:
    """All ranks as one axis."""
    return Axis.of(DeviceMesh(device_type, list(range(dist.get_world_size())), mesh_dim_names=(AXIS,)), AXIS)


def mesh_of(ranks: int) -> Mesh:
    return Mesh(((AXIS, ranks),))


def _sample(name: str, times: list[float], ranks: int) -> Sample:
    ordered = sorted(times)
    quarter = len(ordered) // 4
    spread = (median(ordered), ordered[quarter], ordered[-1 - quarter], len(ordered))
    return Sample("launch", name, "", (), *spread, ranks=ranks)
