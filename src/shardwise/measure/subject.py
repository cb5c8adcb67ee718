"""Subject: one plan's model on this rank, ready to be stepped, timed and weighed; and one module of it, timed
alone."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.core.case import StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.measurement import CollectiveUse, Measurement, MemoryUse, ModuleTimes
from shardwise.core.plan import AnyPlan, Plan
from shardwise.core.program import Phase
from shardwise.core.verification import Agreement
from shardwise.measure.expert_loads import ExpertLoads
from shardwise.measure.memory import PeakMemory, kept_bytes
from shardwise.measure.profile import record_profile
from shardwise.measure.record import uses_of
from shardwise.measure.sockets import sent_bytes, sent_since
from shardwise.models.model_source import ModelSource
from shardwise.parallel.any_plan import engine_of, name_of
from shardwise.parallel.apply import applied_to
from shardwise.parallel.recorder import CollectiveRecorder
from shardwise.step.build import model_of_step
from shardwise.step.groups import axis_names
from shardwise.step.portion import MicroBatches
from shardwise.step.train import StepResult, TrainStep

MODULE_RUNS = 3


def clock(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that `work` takes on this rank, all ranks starting together. On CUDA: by events on the current
    stream."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Subject:
    """Builds the model, and on its first step also learns its memory, its collectives and the bytes its
    sockets sent."""

    def __init__(
        self,
        source: ModelSource,
        plan: AnyPlan,
        mesh: DeviceMesh,
        settings: StepSettings,
        device: torch.device,
        *,
        on_parameter: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.plan = plan
        self.device = device
        self.step_s: list[float] = []
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []
        self.module_forward_s: list[float] = []
        self.module_backward_s: list[float] = []
        self.alone: ModuleAlone | None = None
        self.memory: MemoryUse | None = None
        self.collectives: tuple[CollectiveUse, ...] = ()
        self.sent_bytes: int | None = None
        self._peak = PeakMemory(device)
        self._parked: list[tuple[Tensor, Tensor]] | None = None
        self.model = model_of_step(source, plan, mesh, settings, device=device, on_parameter=on_parameter)
        self._loads = ExpertLoads(settings.batch * settings.seq)
        self._recorder = CollectiveRecorder(axis_names(mesh))
        self._step = TrainStep(
            self.model,
            mesh=mesh,
            learning_rate=settings.learning_rate,
            max_norm=settings.max_norm,
            reduce_once=settings.reduce_once,
            on_phase=self._note_phase,
            optimizer_kernel=settings.optimizer_kernel,
        )

    def _note_phase(self, phase: Phase) -> None:
        self._recorder.phase = str(phase)

    def first_step(self, micro_batches: MicroBatches) -> None:
        """A step that isn't timed; its collectives are counted."""
        self._peak.reset_peak()
        before = sent_bytes()
        with self._recorder, self._loads.watching(self.model):
            result = self._step(micro_batches)
        self.sent_bytes = sent_since(before)
        self.memory = self._peak.use(kept_bytes(self.model, self._step.optimizer))
        self.collectives = uses_of(self._recorder.calls)
        self._keep(result)

    def warm_up(self, micro_batches: MicroBatches) -> None:
        """One step that isn't timed."""
        self._keep(self._step(micro_batches))

    def timed_step(self, micro_batches: MicroBatches) -> float:
        """One step by the clock; returns this rank's seconds and keeps them."""
        results: list[StepResult] = []
        seconds = clock(self.device, lambda: results.append(self._step(micro_batches)))
        self._keep(results[0])
        self.step_s.append(seconds)
        return seconds

    def profiled_steps(self, folder: str, batches: Sequence[MicroBatches]) -> None:
        """Steps under the profiler, not timed; this rank's trace goes into `folder`. The first WARM_UP of
        them are not marked."""
        with record_profile(folder, self.model) as recorder:
            for micro_batches in batches:
                with recorder.step():
                    self._step(micro_batches)

    def _keep(self, result: StepResult) -> None:
        self.losses.append(float(result.loss.item()))
        self.gradient_norms.append(float(result.gradient_norm.item()))

    def measurement(self, label: str, repeats: str | None, agreement: Agreement | None) -> Measurement:
        """What this rank measured."""
        assert self.memory is not None
        times = None
        if self.alone is not None and self.module_forward_s:
            halves = tuple(self.module_forward_s), tuple(self.module_backward_s)
            times = ModuleTimes(self.alone.name, *halves)
        return Measurement(
            label=label,
            repeats=repeats,
            plan_name=name_of(self.plan),
            plan_toml=_as_text(self.plan, self.model),
            engine=engine_of(self.plan),
            step_s=tuple(self.step_s),
            rank_step_s=(tuple(self.step_s),),
            losses=tuple(self.losses),
            grad_norms=tuple(self.gradient_norms),
            memory=self.memory,
            collectives=self.collectives,
            wire_bytes_largest_rank=sum(use.wire_bytes for use in self.collectives),
            sent_bytes=self.sent_bytes,
            module_times=times,
            agreement=agreement,
            loads=self._loads.loads(),
        )

    def take_alone(self, module: str, micro_batch: tuple[Tensor, Tensor]) -> None:
        """Takes a module to be timed alone, with its inputs of a real step, and warms it up."""
        self.alone = ModuleAlone(self.model, module, self._step.placed(micro_batch[0]))
        self._module_runs(self.alone)

    def timed_module(self) -> float:
        """The module that was taken, forward and backward, the median of a few runs of each (it takes
        milliseconds); seconds of both together; 0 where none was taken."""
        if self.alone is None:
            return 0.0
        forward_s, backward_s = self._module_runs(self.alone)
        self.module_forward_s.append(forward_s)
        self.module_backward_s.append(backward_s)
        return forward_s + backward_s

    def _module_runs(self, alone: "ModuleAlone") -> tuple[float, float]:
        forwards_s, backwards_s = zip(*(alone.run(self.device) for _ in range(MODULE_RUNS)), strict=True)
        return median(forwards_s), median(backwards_s)

    @property
    def needed_bytes(self) -> tuple[int, int] | None:
        """(what it keeps between steps, the most that was active in its first step); None where nobody counts
        that."""
        memory = self.memory
        if memory is None or memory.active_bytes is None:
            return None
        kept = memory.parameter_bytes + memory.gradient_bytes + memory.optimizer_bytes
        return kept, memory.active_bytes

    def park(self) -> None:
        """Moves everything this subject keeps to host memory, for where not all plans fit on the device at
        once."""
        if self._parked is not None:
            return
        self._step.optimizer.zero_grad(set_to_none=True)
        self._parked = []
        for tensor in self._kept_tensors():
            self._parked.append((tensor, tensor.detach().to("cpu", copy=True)))
            tensor.untyped_storage().resize_(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def unpark(self) -> None:
        """Brings it back, to the same tensors."""
        for tensor, host in self._parked or ():
            tensor.untyped_storage().resize_(host.numel() * host.element_size())
            tensor.copy_(host)
        self._parked = None

    def _kept_tensors(self) -> list[Tensor]:
        kept: list[Tensor] = [parameter.detach() for parameter in self.model.parameters()]
        kept += [
            value
            for state in self._step.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in kept]
        return [tensor for tensor in local if tensor.device.type == self.device.type and tensor.numel()]


class ModuleAlone:
    """One module of a sharded model, with the inputs that it gets in a real step and a random gradient for
    its output.

    Its collectives are in its time, the waiting for other modules' isn't: ranks start each half together.
    """

    def __init__(self, model: nn.Module, name: str, ids_BS: Tensor) -> None:
        try:
            self._module = model.get_submodule(name)
        except AttributeError:
            raise OptionError(f'--module: the model has no module "{name}".') from None
        self.name = name
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._grad: Tensor | None = None
        with (
            self._module.register_forward_pre_hook(self._take_inputs, prepend=True, with_kwargs=True),
            self._module.register_forward_hook(self._take_output),
            torch.no_grad(),
        ):
            model(ids_BS)
        if self._grad is None:
            raise OptionError(
                f"--module {name}: takes no part in the forward, or gives no single tensor. "
                "Choose another module."
            )

    def _take_inputs(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args = tuple(_leaf(value) for value in args)
        self._kwargs = {key: _leaf(value) for key, value in kwargs.items()}

    def _take_output(self, _: nn.Module, __: tuple[Any, ...], output: object) -> None:
        if isinstance(output, Tensor):
            generator = torch.Generator(output.device).manual_seed(0)
            local = output.to_local() if isinstance(output, DTensor) else output
            grad = torch.empty(local.shape, dtype=local.dtype, device=local.device).normal_(
                generator=generator
            )
            if isinstance(output, DTensor):
                grad = DTensor.from_local(
                    grad,
                    output.device_mesh,
                    output.placements,
                    run_check=False,
                    shape=output.shape,
                    stride=output.stride(),
                )
            self._grad = grad

    def run(self, device: torch.device) -> tuple[float, float]:
        """(forward, backward) seconds of this rank."""
        self._module.zero_grad(set_to_none=True)
        outputs: list[Tensor] = []
        forward_s = clock(device, lambda: outputs.append(self._module(*self._args, **self._kwargs)))
        backward_s = clock(device, lambda: outputs[0].backward(self._grad))
        self._module.zero_grad(set_to_none=True)
        for value in (*self._args, *self._kwargs.values()):
            if isinstance(value, Tensor):
                value.grad = None
        return forward_s, backward_s


def _as_text(plan: AnyPlan, model: nn.Module) -> str:
    """The plan's TOML; of one that isn't ours, its rules as a comment."""
    if isinstance(plan, Plan):
        return plan.to_toml()
    rules = "".join(f"#   {use.pattern}: {use.style}\n" for use in applied_to(model).foreign or ())
    return f"# {plan}, carried out by {engine_of(plan)}{':' if rules else ''}\n{rules}"


def _leaf(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.is_floating_point())
