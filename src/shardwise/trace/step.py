"""Runs one step of a sharded model on fake tensors, under the recorder; what came of it, or how it failed."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn

from shardwise.core.batch_part import padded
from shardwise.core.errors import ModelError, PlanError, ShardwiseError
from shardwise.core.plan import Engine, TheirPlan
from shardwise.core.program import AFTER_THE_BACKWARD, Holding, Item, MemoryKind, Phase
from shardwise.core.rule import RuleRef
from shardwise.core.shown import shown, told
from shardwise.models.layers import Layers
from shardwise.models.routing import assuming
from shardwise.models.source import vocab_size_of
from shardwise.parallel.any_plan import name_of
from shardwise.parallel.apply import applied_to
from shardwise.parallel.stages import stage_of
from shardwise.step.groups import axis_names
from shardwise.step.train import TrainStep
from shardwise.torch_private import (
    FSDP_ALLOCATION,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    local_part,
)
from shardwise.trace.fakes import making_on_device
from shardwise.trace.holdings import holdings_of
from shardwise.trace.job import Job, Kept
from shardwise.trace.memory import gradient_kinds, items_of, resident_bytes, resident_kinds
from shardwise.trace.recorder import Recorder
from shardwise.trace.routes import Routes
from shardwise.trace.told import told as told_by_modules


@dataclass(frozen=True, slots=True)
class Traced:
    """One traced step: items in order, and what the parameters became."""

    items: tuple[Item, ...]
    holdings: tuple[Holding, ...]
    resident: dict[MemoryKind, int]


def run(
    job: Job, model: nn.Module, layers: Layers | None, rule_of: Callable[[str], RuleRef | None], kept: Kept
) -> Traced:
    """Shards a built model, fills it with fakes, and traces one step. Raises ModelError and PlanError for
    what goes wrong inside."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    ids = job.micro_batches(vocab_size_of(model))
    job.shard(model, layers, fake_mode, kept)
    device_mesh = job.device_mesh if job.mesh.world_size > 1 else None
    recorder = Recorder(model, fake_mode, axis_names(job.device_mesh), device=job.device, rule_of=rule_of)
    storages, log = recorder.storages, recorder.log
    model.register_forward_hook(_check_logits(job, recorder))
    with recorder.watching(), _fake_buffers_of_fsdp(), _without_advice():
        step = TrainStep(
            model,
            mesh=device_mesh,
            reduce_once=job.settings.reduce_once,
            on_phase=recorder.place.enter_phase,
            optimizer_kernel=job.settings.optimizer_kernel,
        )
        _start_optimizer(step)
        kinds = resident_kinds(storages, step)
        batch = list(_batch(model, recorder, ids, fake_mode))
        kinds |= {storages.note(tensor, "batch"): MemoryKind.INPUT for pair in batch for tensor in pair}
        log.is_on = True
        try:
            with assuming(job.settings.expert_load):
                step(batch)
        except ShardwiseError:
            raise
        except Exception as error:
            raise _failure(job, recorder, error) from error
        log.is_on = False
        for state in _never_made(step):
            kinds.pop(storages.note(state, "optimizer"))
        resident = resident_bytes(storages, kinds)
        kinds = gradient_kinds(storages, model) | kinds
    routes = Routes(model, ids, job.settings.expert_load)
    items = recorder.kinship.told(items_of(log.events, storages.seen, kinds, routes))
    return Traced(tuple(told_by_modules(items, model)), tuple(holdings_of(step, job.mesh, rule_of)), resident)


@contextmanager
def _fake_buffers_of_fsdp() -> Iterator[None]:
    """FSDP2 takes its communication buffers from the device, and a trace's device is this host: gigabytes,
    were they real."""

    def allocate(_: object, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        with making_on_device():
            return torch.empty(tuple(size), dtype=dtype)

    with patch.object(*FSDP_ALLOCATION, allocate):
        yield


@contextmanager
def _without_advice() -> Iterator[None]:
    """FSDP warns that logits which are a view mustn't be changed in place: no loss of ours does. PyTorch
    warns that a collective has a newer name: who calls it is a framework."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="`torch.distributed.* is deprecated", category=FutureWarning
        )
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield


def _check_logits(job: Job, recorder: Recorder) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
    name = job.source.name

    def check(model: nn.Module, inputs: tuple[Tensor, ...], logits: object) -> None:
        stage = stage_of(model)
        if stage is not None and not stage.gives_logits:
            return
        expected = list(inputs[0].shape)
        if isinstance(logits, Tensor) and logits.ndim == 3 and list(logits.shape[:2]) == expected:
            return
        output = (
            f"shape {list(logits.shape)}"
            if isinstance(logits, Tensor)
            else f"type {shown(type(logits).__name__)}"
        )
        if isinstance(logits, Tensor) and logits.ndim == 3:
            found = logits.shape[1]
            why = padded(expected[1], found, job.mesh.tp)
            if why:
                raise ModelError(f'model "{name}": {recorder.first_of(found)}{why}.')
        raise ModelError(
            f'model "{name}": for ids {expected} its output is of {output}. Return logits [B, S, V].'
        )

    return check


def _failure(job: Job, recorder: Recorder, error: Exception) -> ModelError | PlanError:
    """What the model's own code, or that which a plan put into it, raised."""
    where, phase = recorder.failed_in(error), recorder.place.step_phase
    if phase is Phase.REDUCE:
        where = AFTER_THE_BACKWARD
    elif phase is not Phase.FORWARD:
        where = f"the {phase} after {where}" if where else f"the {phase}"
    raised = f'model "{job.source.name}": {where or "its forward"} raised {told(error)}'
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return ModelError(f"{raised} The data decides what runs there, and a trace has only shapes.")
    if job.plan in (TheirPlan.UNSHARDED, TheirPlan.OWN):
        return ModelError(f"{raised} See whether it runs with weights.")
    return PlanError(
        f'plan "{name_of(job.plan)}": {raised} See whether it is explained under plan "unsharded".'
    )


def _batch(
    model: nn.Module, recorder: Recorder, ids: list[Tensor], fake_mode: FakeTensorMode
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, labels) of each micro-batch: real ids on the host where the native engine decides by them, else
    fake ones on the device."""
    plan = applied_to(model).plan
    on_host = plan is not None and plan.engine is Engine.NATIVE
    for ids_BS in ids:
        with fake_mode:
            labels_BS = torch.empty(ids_BS.shape, dtype=torch.int64)
        yield ids_BS.clone() if on_host else recorder.onto_device(ids_BS, ()), labels_BS


def _start_optimizer(step: TrainStep) -> None:
    """Makes the optimizer's state, as a first step would."""
    for parameter in step.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)


def _never_made(step: TrainStep) -> Iterator[Tensor]:
    """Takes away the state of parameters that the step gives no gradient: a real optimizer makes none for
    them."""
    for parameter in step.model.parameters():
        if parameter.grad is None:
            state = step.optimizer.state.pop(parameter, {})
            yield from (local_part(value) for value in state.values() if isinstance(value, Tensor))
