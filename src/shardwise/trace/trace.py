"""trace(): model + plan + mesh -> Program, by running the one training step of step/ on fake tensors over a fake process group.

What runs is the real module under the real plan, with PyTorch's autograd, DTensor, FSDP2 and AdamW; only memory, kernels and the wire are
missing. The step is one after the first: optimizer state exists. Equal layers are traced three and four deep and extended (extend.py)
where that is exact, else all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.core.case import StepSettings
from shardwise.core.errors import ModelError, OptionError, PlanError, ShardwiseError
from shardwise.core.mesh import SHARDS_AXIS, Mesh
from shardwise.core.placement import Placement, Replicate
from shardwise.core.plan import AnyPlan, Engine, Ownership, Plan, TheirPlan
from shardwise.core.program import (
    Block,
    ByData,
    Collective,
    Holding,
    Item,
    MemoryChange,
    MemoryKind,
    Op,
    Phase,
    Program,
    RuleUse,
    layer_index,
    moved_name,
)
from shardwise.core.rule import RuleRef
from shardwise.core.shown import shown, told
from shardwise.models.source import ModelSource, vocab_size_of
from shardwise.parallel.any_plan import apply_any
from shardwise.parallel.apply import applied_to
from shardwise.parallel.kinds import kind_of, outer_parameters
from shardwise.parallel.ownership import RowOwnership, route
from shardwise.parallel.parameters import fill
from shardwise.parallel.resolve import resolve
from shardwise.step.train import TrainStep, mixed_precision, recompute_layers, shard_with_fsdp
from shardwise.torch_private import (
    FSDP_ALLOCATION,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    check,
    local_part,
)
from shardwise.trace.extend import LONG, SHORT, NotPeriodicError, extended
from shardwise.trace.fakes import TARGETS, fake_world
from shardwise.trace.layers import Layers, find_layers
from shardwise.trace.recorder import Came, Recorder, Storage, Went, from_torch
from shardwise.trace.told import told as told_by_modules


def trace(
    source: ModelSource,
    plan: AnyPlan,
    mesh: Mesh,
    settings: StepSettings,
    *,
    device: str = "cpu",
    rank: int = 0,
    ids: Tensor | None = None,
    compress: bool = True,
    depth: int | None = None,
    on_model: Callable[[nn.Module], None] = lambda _: None,
    progress: Callable[[str], None] = lambda _: None,
) -> Program:
    """The Program of one rank's training step.

    ids: token ids [B, S] of the global batch on the host, B = settings.batch; by default uniform ones, drawn from settings.seed. They decide
    what routed sends and what a masked look-up meets, nothing else. compress: trace equal layers once. depth: trace a model of only that many of its repeated layers. on_model: told each model before its
    step runs, sharded and filled with fakes. device: "cpu" (as gloo ranks run it)
    or "cuda" (as NCCL ranks would). Raises the InputErrors of parallelize(), ModelError and OptionError; RunError inside a process group.
    """
    check()
    if device not in TARGETS:
        raise OptionError(f'device is "{device}". Allowed: {", ".join(TARGETS)}.')
    if not 0 <= rank < mesh.world_size:
        raise OptionError(f"rank {rank} is not on mesh {mesh}. Use 0 to {mesh.world_size - 1}.")
    if plan is TheirPlan.UNSHARDED and mesh.tp > 1:
        raise OptionError(
            f'plan "unsharded" shards nothing, and mesh {mesh} has a tp axis. Use tp=1, or another plan.'
        )
    with fake_world(mesh, rank=rank, device=device) as device_mesh:
        progress(f"building {source.name}")
        job = _Job(source, plan, mesh, settings, device, rank, ids, device_mesh, on_model)
        whole = job.build()
        layers = find_layers(whole)
        if depth is not None and layers is not None and depth < layers.count:
            layers.shorten(whole, depth)
            layers = find_layers(whole)
        if isinstance(plan, Plan):
            resolve(whole, plan, tp=mesh.tp, seq=settings.seq, fsdp=mesh.fsdp)
        job.rules = _rules(plan, whole)
        if compress and layers is not None and layers.are_equal and layers.count > LONG:
            try:
                return _extended(job, whole, layers, progress)
            except NotPeriodicError as reason:
                progress(f"layers don't repeat: {reason}")
        progress(f"tracing {layers.count} layers" if layers is not None else "tracing")
        return _program(job, whole, layers, job.run(whole, layers), None)


@dataclass(frozen=True, slots=True)
class _Traced:
    """One traced step: items in order, and what the parameters became."""

    items: tuple[Item, ...]
    holdings: tuple[Holding, ...]
    resident: dict[MemoryKind, int]


@dataclass(slots=True)
class _Job:
    source: ModelSource
    plan: AnyPlan
    mesh: Mesh
    settings: StepSettings
    device: str
    rank: int
    ids: Tensor | None
    device_mesh: DeviceMesh
    on_model: Callable[[nn.Module], None]
    rules: tuple[RuleUse, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.settings.dtype)  # type: ignore[no-any-return]

    def build(self) -> nn.Module:
        """The model on the meta device, as it was made; sharded only where the plan is the factory's own."""
        if self.plan is TheirPlan.OWN:
            from shardwise.models.factory import sharding_factory

            return sharding_factory(self.source).build(dtype=self.dtype, mesh=self.device_mesh)
        return self.source.build(dtype=self.dtype)

    def run(self, model: nn.Module, layers: Layers | None) -> _Traced:
        """Shards, fills with fakes, and traces one step."""
        apply_any(model, self.plan, self.device_mesh)
        fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        fill_with_fakes(model, fake_mode)
        layer_modules = list(layers.modules(model)) if layers is not None else []
        if self.settings.recompute != "none":
            recompute_layers(layer_modules, self.settings.recompute)
        if self.mesh.fsdp > 1:
            shard_with_fsdp(
                model, layer_modules, self.device_mesh[SHARDS_AXIS], mixed_precision(self.settings)
            )
        model.train()
        self.on_model(model)
        return _trace_step(self, model, fake_mode)

    def micro_batches(self, vocab_size: int) -> list[Tensor]:
        """Ids of this rank's micro-batches, real, on the host."""
        settings = self.settings
        ids_BS = self.ids
        if ids_BS is None:
            generator = torch.Generator().manual_seed(settings.seed)
            ids_BS = torch.randint(vocab_size, (settings.batch, settings.seq), generator=generator)
        if tuple(ids_BS.shape) != (settings.batch, settings.seq):
            raise OptionError(
                f"ids have shape {tuple(ids_BS.shape)}; the batch is {settings.batch} x {settings.seq}."
            )
        parts = self.mesh.data_parallel
        if settings.batch % (parts * settings.accumulation):
            raise OptionError(
                f"--batch {settings.batch} can't be cut into {parts} data-parallel parts of {settings.accumulation} micro-batches. "
                f"Use a multiple of {parts * settings.accumulation}."
            )
        own = ids_BS.chunk(parts)[self.rank // self.mesh.tp]
        return list(own.chunk(settings.accumulation))

    def rule_of(self, module: str) -> RuleRef | None:
        """The rule of a module, or of the nearest module around it."""
        by_module = {name: use.rule for use in self.rules for name in use.modules}
        while module:
            if module in by_module:
                return by_module[module]
            module = module.rpartition(".")[0]
        return None


def _rules(plan: AnyPlan, model: nn.Module) -> tuple[RuleUse, ...]:
    """The plan's rules and the modules (or parameters) of the unsharded model that each holds for."""
    match plan:
        case Plan():
            by_rule: dict[str, list[str]] = {rule.pattern: [] for rule in plan.rules}
            for name, _ in model.named_modules():
                rule = plan.rule_for(name) if name else None
                if rule is not None:
                    by_rule[rule.pattern].append(name)
            return tuple(
                RuleUse(
                    rule.pattern, str(rule.style.name), tuple(by_rule[rule.pattern]), rule.style.arguments
                )
                for rule in plan.rules
            )
        case TheirPlan.HF:
            from shardwise.parallel.engines.hugging_face import hugging_face_rules

            return tuple(
                RuleUse(use.rule.pattern, use.rule.style, use.modules or use.parameters)
                for use in hugging_face_rules(model)
            )
        case TheirPlan.UNSHARDED | TheirPlan.OWN:
            return ()


def _extended(job: _Job, whole: nn.Module, layers: Layers, progress: Callable[[str], None]) -> Program:
    """The program of all layers from traces of SHORT and LONG ones. Raises NotPeriodicError."""
    traced = []
    for depth in (SHORT, LONG):
        progress(f"tracing {depth} of {layers.count} equal layers")
        model = job.build()
        layers.shorten(model, depth)
        traced.append(job.run(model, layers))
    short, long = traced
    progress("putting the layers together")
    more = layers.count - LONG
    return _program(
        job,
        whole,
        layers,
        _Traced(
            (),
            _longer_holdings(long.holdings, layers.prefix, more),
            {
                kind: n_bytes + (n_bytes - short.resident.get(kind, 0)) * more
                for kind, n_bytes in long.resident.items()
            },
        ),
        extended(short.items, long.items, layers.prefix, layers.count),
    )


def _longer_holdings(holdings: tuple[Holding, ...], prefix: str, more: int) -> tuple[Holding, ...]:
    """Layer 1's stand for those of all layers but the first and the last two."""
    found: list[Holding] = []
    template = [holding for holding in holdings if layer_index(holding.module, prefix) == 1]
    for holding in holdings:
        index = layer_index(holding.module, prefix)
        if index is None or index < 2:
            found.append(holding)
            if template and holding is template[-1]:
                found += [
                    _moved_holding(again, prefix, by) for by in range(1, more + 1) for again in template
                ]
        else:
            found.append(_moved_holding(holding, prefix, more))
    return tuple(found)


def _moved_holding(holding: Holding, prefix: str, by: int) -> Holding:
    shared = tuple(moved_name(name, prefix, by) for name in holding.shared)
    return replace(
        holding,
        name=moved_name(holding.name, prefix, by),
        module=moved_name(holding.module, prefix, by),
        shared=shared,
    )


def _program(
    job: _Job, whole: nn.Module, layers: Layers | None, traced: _Traced, blocks: tuple[Block, ...] | None
) -> Program:
    plan = job.plan
    return Program(
        model=job.source.name,
        plan=plan.name if isinstance(plan, Plan) else str(plan),
        engine=str(plan.engine)
        if isinstance(plan, Plan)
        else {"hf": "transformers", "own": "dtensor"}.get(str(plan), "none"),
        device=job.device,
        rank=job.rank,
        axes=job.mesh.axes,
        settings=job.settings,
        parameters=sum(shape.numel() for shape in _whole_shapes(whole)),
        blocks=blocks if blocks is not None else (Block(traced.items),),
        holdings=traced.holdings,
        rules=job.rules,
        resident=tuple((kind, traced.resident[kind]) for kind in MemoryKind if kind in traced.resident),
        layers=(layers.prefix, layers.count) if layers is not None else None,
        compressed=blocks is not None,
        notes=job.source.notes,
    )


def _whole_shapes(model: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in model.parameters()]


def fill_with_fakes(model: nn.Module, fake_mode: FakeTensorMode) -> None:
    """Gives every parameter and buffer a fake tensor of its shape on "cpu"."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}

    def whole(name: str, shape: torch.Size) -> Tensor:
        with fake_mode:
            return torch.empty(shape, dtype=dtypes[name])

    fill(model, whole, {})
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            with fake_mode:
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _trace_step(job: _Job, model: nn.Module, fake_mode: FakeTensorMode) -> _Traced:
    groups = {
        str(job.device_mesh.get_group(name).group_name): name for name, size in job.mesh.axes if size > 1
    }
    recorder = Recorder(model, fake_mode, groups, device=job.device, rule_of=job.rule_of)
    ids = job.micro_batches(vocab_size_of(model))
    model.register_forward_hook(_check_logits(job.source.name))
    with recorder.watching(), _fake_buffers_of_fsdp(recorder):
        step = TrainStep(
            model, mesh=job.device_mesh if job.mesh.world_size > 1 else None, on_phase=recorder.enter_phase
        )
        _start_optimizer(step)
        kinds = _resident_kinds(recorder, model, step)
        batch = list(_batch(model, recorder, ids, fake_mode))
        kinds |= {recorder.saw(tensor, "batch"): MemoryKind.INPUT for pair in batch for tensor in pair}
        recorder.recording = True
        try:
            step(batch)
        except ShardwiseError:
            raise
        except Exception as error:
            raise _failure(job, recorder, error) from error
        recorder.recording = False
        for state in _never_made(step):
            kinds.pop(recorder.saw(state, "optimizer"))
        resident = dict.fromkeys(kinds.values(), 0)
        for number, kind in kinds.items():
            resident[kind] += recorder.storages[number].n_bytes
        for parameter in model.parameters():
            kept = recorder.storage_of(local_part(parameter.grad)) if parameter.grad is not None else None
            if kept is not None:
                kinds.setdefault(kept, MemoryKind.GRADIENT)
    routes = _Routes(job, model, ids)
    return _Traced(
        tuple(told_by_modules(_items(recorder, kinds, set(kinds) - _made(recorder), routes), model)),
        _holdings(model, step, job),
        resident,
    )


@contextmanager
def _fake_buffers_of_fsdp(recorder: Recorder) -> Iterator[None]:
    """FSDP2 takes its communication buffers from the device, and a trace's device is this host: gigabytes, were they real."""

    def allocate(_: object, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return recorder.made_on_device(torch.empty, tuple(size), {"dtype": dtype})  # type: ignore[no-any-return]

    with patch.object(*FSDP_ALLOCATION, allocate):
        yield


def _check_logits(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
    def check(_: nn.Module, inputs: tuple[Tensor, ...], logits: object) -> None:
        expected = list(inputs[0].shape)
        found = (
            f"shape {list(logits.shape)}"
            if isinstance(logits, Tensor)
            else f"type {shown(type(logits).__name__)}"
        )
        if not isinstance(logits, Tensor) or logits.ndim != 3 or list(logits.shape[:2]) != expected:
            raise ModelError(
                f'model "{name}": for ids {expected} its output is of {found}. Return logits [B, S, V].'
            )

    return check


def _failure(job: _Job, recorder: Recorder, error: Exception) -> ModelError | PlanError:
    """What the model's own code, or that which a plan put into it, raised."""
    where = recorder.failed_in(error)
    if recorder.phase is not Phase.FORWARD:
        where = f"the {recorder.phase} after {where}" if where else f"the {recorder.phase}"
    raised = f'model "{job.source.name}": {where or "its forward"} raised {told(error)}'
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return ModelError(f"{raised} The data decides what runs there, and a trace has only shapes.")
    if job.plan in (TheirPlan.UNSHARDED, TheirPlan.OWN):
        return ModelError(f"{raised} See whether it runs with weights.")
    plan = job.plan.name if isinstance(job.plan, Plan) else job.plan
    return PlanError(f'plan "{plan}": {raised} See whether it is explained under plan "unsharded".')


def _batch(
    model: nn.Module, recorder: Recorder, ids: list[Tensor], fake_mode: FakeTensorMode
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, labels) of each micro-batch: real ids on the host where the native engine decides by them, else fake ones on the device."""
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
    """Takes away the state of parameters that the step gives no gradient: a real optimizer makes none for them."""
    for parameter in step.model.parameters():
        if parameter.grad is None:
            yield from (
                local_part(value)
                for value in step.optimizer.state.pop(parameter, {}).values()
                if isinstance(value, Tensor)
            )


def _resident_kinds(recorder: Recorder, model: nn.Module, step: TrainStep) -> dict[int, MemoryKind]:
    """Storage number -> kind, of what lives from step to step."""
    kinds: dict[int, MemoryKind] = {}
    for parameter in model.parameters():
        kinds[recorder.saw(local_part(parameter), "parameter")] = MemoryKind.PARAMETER
    for buffer in model.buffers():
        kinds.setdefault(recorder.saw(local_part(buffer), "buffer"), MemoryKind.BUFFER)
    for state in step.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                kinds[recorder.saw(local_part(value), "optimizer")] = MemoryKind.OPTIMIZER
    return kinds


def _made(recorder: Recorder) -> set[int]:
    """Numbers of the storages that the step itself made."""
    return {event.storage for event in recorder.events if isinstance(event, Came)}


def _items(
    recorder: Recorder, kinds: dict[int, MemoryKind], resident: set[int], routes: "_Routes"
) -> Iterator[Item]:
    """The recorder's events as items: storages get their kinds, collectives that the data decides what all ranks send."""
    kinds = kinds | _kinds_by_life(recorder, kinds)
    decided = set(recorder.decided_by_data)
    for index, event in enumerate(recorder.events):
        match event:
            case Came(number):
                yield _change(recorder.storages[number], kinds.get(number, MemoryKind.TEMPORARY), +1)
            case Went(number):
                if number in kinds and number not in resident:
                    yield _change(recorder.storages[number], kinds[number], -1)
            case Collective() if index in decided:
                yield routes.with_all_ranks(event)
            case _:
                yield event


def _change(storage: Storage, kind: MemoryKind, sign: int) -> MemoryChange:
    return MemoryChange(sign * storage.n_bytes, kind, storage.phase, storage.module, storage.maker)


def _kinds_by_life(recorder: Recorder, known: dict[int, MemoryKind]) -> dict[int, MemoryKind]:
    """Activations: made before some op of the backward, in forward, loss or recompute, and gone after it. The rest is temporary."""
    found: dict[int, MemoryKind] = {}
    came: dict[int, int] = {}
    backward_ops = 0
    for event in recorder.events:
        match event:
            case Op(phase=Phase.BACKWARD):
                backward_ops += 1
            case Came(number):
                came[number] = backward_ops
                found[number] = MemoryKind.TEMPORARY
            case Went(number) if number in came and number not in known:
                made_forward = recorder.storages[number].phase in (Phase.FORWARD, Phase.LOSS, Phase.RECOMPUTE)
                if made_forward and backward_ops > came[number]:
                    found[number] = MemoryKind.ACTIVATION
            case _:
                pass
    return {number: kind for number, kind in found.items() if number not in known}


class _Routes:
    """What every rank sends where the batch decides: the routes of all ranks, made from the ids as each of them makes its own."""

    def __init__(self, job: _Job, model: nn.Module, ids: list[Tensor]) -> None:
        self._job = job
        self._model = model
        self._ids = ids
        self._rows: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self._seen: dict[tuple[str, str], int] = {}

    def with_all_ranks(self, collective: Collective) -> Collective:
        """The collective, with the bytes that each rank of its axis sends in the same micro-batch."""
        module = self._model.get_submodule(collective.module)
        assert isinstance(module, nn.Embedding)
        call = collective.call
        key = (collective.module, call.phase)
        index = self._seen[key] = self._seen.get(key, -1) + 1
        row_bytes = module.embedding_dim * getattr(torch, call.dtype).itemsize
        backward = call.phase == Phase.BACKWARD
        sent = [
            pair[backward] * row_bytes
            for pair in self._all_ranks(collective.module, module, index % len(self._ids))
        ]
        tokens = self._ids[0].numel() // call.axis_size
        rows = -(-module.num_embeddings // call.axis_size)
        bound = tokens if backward else (call.axis_size - 1) * min(tokens, rows)
        largest = max(range(len(sent)), key=lambda rank: sent[rank])
        return replace(
            collective,
            by_data=ByData(sum(sent) / len(sent), float(sent[largest]), largest, float(bound * row_bytes)),
        )

    def _all_ranks(self, name: str, module: nn.Embedding, index: int) -> list[tuple[int, int]]:
        """(rows that a rank sends to others in the forward, rows that it sends back in the backward), per rank."""
        if (name, index) not in self._rows:
            plan = applied_to(self._model).plan
            rule = plan.rule_for(name) if plan is not None else None
            ownership = RowOwnership(
                module.num_embeddings,
                self._job.mesh.tp,
                rule.style.ownership if rule is not None else Ownership.CONTIGUOUS,
            )
            pairs = []
            for rank in range(self._job.mesh.tp):
                found = route(self._ids[index], ownership, rank)
                pairs.append(
                    (found.rows_sent_to_others(rank), sum(found.receive_splits) - found.receive_splits[rank])
                )
            self._rows[name, index] = pairs
        return self._rows[name, index]


def _holdings(model: nn.Module, step: TrainStep, job: _Job) -> tuple[Holding, ...]:
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    outer, found = outer_parameters(model), []
    for key, parameter in parameters.items():
        name, *shared = names[key]
        module = name.rpartition(".")[0]
        gradient = parameter.grad
        state = step.optimizer.state.get(parameter, {})
        found.append(
            Holding(
                name=name,
                module=module,
                dtype=str(parameter.dtype).removeprefix("torch."),
                shape=tuple(parameter.shape),
                local_shape=tuple(local_part(parameter).shape),
                placement=_placements(parameter, job.mesh),
                parameter_bytes=_n_bytes(parameter),
                grad_shape=tuple(local_part(gradient).shape) if gradient is not None else None,
                grad_placement=_placements(gradient, job.mesh) if gradient is not None else None,
                gradient_bytes=_n_bytes(gradient) if gradient is not None else 0,
                optimizer_bytes=sum(_n_bytes(value) for value in state.values() if isinstance(value, Tensor)),
                rule=job.rule_of(module),
                shared=tuple(shared),
                module_kind=kind_of(model.get_submodule(module)),
                is_outer=parameter in outer,
            )
        )
    return tuple(found)


def _placements(tensor: Tensor, mesh: Mesh) -> tuple[Placement, ...]:
    if not isinstance(tensor, DTensor):
        return (Replicate(),) * len(mesh.axes)
    names = tensor.device_mesh.mesh_dim_names or ()
    by_axis = dict(zip(names, map(from_torch, tensor.placements), strict=True))
    return tuple(by_axis.get(name, Replicate()) for name, _ in mesh.axes)


def _n_bytes(tensor: Tensor) -> int:
    local = local_part(tensor)
    return local.numel() * local.element_size()
