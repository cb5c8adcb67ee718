"""What the ranks of test_program_memory.py run: one real step, weighed by what PyTorch's CPU allocator hands out and takes back."""

import msgspec
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from shardwise.core.mesh import Mesh
from shardwise.launch import RankContext
from shardwise.measure.memory import kept_bytes
from shardwise.models.specs import get_spec
from shardwise.parallel.builtin import builtin_plan
from shardwise.step.build import build_model, device_mesh
from shardwise.step.train import TrainStep

PLANS = ("rowwise", "colwise", "routed", "replicated", "rowwise@dtensor", "colwise@dtensor")
MODEL, MESH, BATCH, SEQ = "llama3-debug", "tp=2", 4, 256
_SECOND_STEP = "the second step"


class Weighed(msgspec.Struct, frozen=True):
    """Bytes of one rank: kept after the second step, live when it began, and the most that lived during it."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    begin_bytes: int
    peak_bytes: int


def weigh(context: RankContext, payload: bytes) -> bytes:
    """Per plan."""
    mesh = device_mesh(Mesh.parse(MESH), context.device.type)
    ids_BS = msgspec.json.decode(payload, type=list[list[int]])
    found = {}
    for name in __import__("os").environ.get("PW_PLANS", " ".join(PLANS)).replace(" ", ",").split(","):
        context.note(name)
        found[name] = _weigh(name, mesh, torch.tensor(ids_BS), context)
    return msgspec.json.encode(found)


def _weigh(name: str, mesh: torch.distributed.device_mesh.DeviceMesh, ids_BS: torch.Tensor, context: RankContext) -> Weighed:
    """The profiler tells of every block that the allocator hands out or takes back, inside kernels too. It watches from before the model is
    built, so the sum of all events up to a moment is what lives then, and nothing needs to be counted by hand."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, experimental_config=_ExperimentalConfig(profile_all_threads=True)
    ) as profiler:
        batch = [(ids_BS.clone(), ids_BS.roll(-1, 1))]
        model = build_model(get_spec(MODEL), builtin_plan(name), mesh, dtype=torch.float32, device=context.device, seed=0)
        step = TrainStep(model, mesh=mesh)
        step(batch)
        step.optimizer.zero_grad(set_to_none=True)
        with record_function(_SECOND_STEP):
            step(batch)
        kept = kept_bytes(model, step.optimizer)
    results = profiler.profiler.kineto_results
    assert results is not None
    events = results.events()
    whole = next(event for event in events if event.name() == _SECOND_STEP)
    start, stop = whole.start_ns(), whole.end_ns()
    live = peak = begin = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        if event.start_ns() > stop:
            break
        live += event.nbytes()
        if event.start_ns() < start:
            begin = peak = live
        else:
            peak = max(peak, live)
    return Weighed(*kept, begin, peak)
