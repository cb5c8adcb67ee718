"""Records what a step does below every engine, at PyTorch's dispatcher: ops, collectives, and storages that
come and go.

place.py says who asked, ops.py what an op is, storages.py what lives. The native engine says itself why it
issues a collective (parallel/issuing.py); for others placements.py watches.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from shardwise.core.collective import CollectiveCall, CollectiveKind
from shardwise.core.mesh import TENSOR_AXIS, Role, role_of
from shardwise.core.op_names import FSDP_COPY_IN, FSDP_COPY_OUT
from shardwise.core.program import LOSS_MODULE, Collective, Op, OpKind, Phase
from shardwise.core.rule import RuleRef
from shardwise.models.self_sharded import told_of as told_by_factory
from shardwise.parallel.issuing import issuing
from shardwise.parallel.peers import Told, told_of
from shardwise.parallel.recorder import FUSED, read_calls, tensors_in
from shardwise.torch_private import (
    FLEX_GRAPH,
    PROPAGATION,
    SHAPE_PROPAGATION,
    AsyncCollectiveTensor,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    call_cpu_kernel,
    device_factories,
    has_kernel,
    is_higher_order,
    schema_of,
)
from shardwise.trace.fakes import is_made_on_device, making_on_device
from shardwise.trace.higher_order import higher_order_work, is_masked, signature_of_higher_order
from shardwise.trace.inner import inner_of
from shardwise.trace.kinship import Kinship
from shardwise.trace.ops import ALLOCATIONS, SILENT, Ops, Signature, Work, signature_of, work_of
from shardwise.trace.place import Place, raised_in
from shardwise.trace.placements import Redistributions
from shardwise.trace.quick_fakes import fake_of, is_void
from shardwise.trace.storages import Log, Routed, Storages
from shardwise.trace.values import Values


class Recorder(TorchDispatchMode):
    """axes: group name -> axis name. device: whose ops the trace is about. rule_of: module name -> its rule,
    for collectives whose issuer doesn't say. Set `log.is_on` while the step runs; before that, storages only
    (what is resident)."""

    supports_higher_order_operators = True

    def __init__(
        self,
        model: nn.Module,
        fake_mode: FakeTensorMode,
        axes: Mapping[str, str],
        *,
        device: str,
        rule_of: Callable[[str], RuleRef | None],
    ) -> None:
        super().__init__()
        self.log = Log()
        self.place = Place(model)
        self.storages = Storages(self.log, self.place)
        self.kinship = Kinship(self.storages)
        self._ops = Ops(device, self.place)
        self._redistributions = Redistributions()
        self._told = told_by_factory(model)
        self._values = Values()
        self._fake_mode = fake_mode
        self._axes = axes
        self._device = device
        self._rule_of = rule_of
        self._paused = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Everything that must be in place while the model runs."""
        with ExitStack() as stack:
            for watcher in (self.place, self.storages, self._redistributions):
                stack.enter_context(watcher.watching())
            for owner, name in (PROPAGATION, FLEX_GRAPH):
                stack.enter_context(patch.object(owner, name, self._unseen(getattr(owner, name))))
            shape_of = self._unseen(getattr(*SHAPE_PROPAGATION))
            stack.enter_context(patch.object(*SHAPE_PROPAGATION, _of_results(shape_of)))
            if self._told is not None and self._told.changes is not None:
                stack.enter_context(self._told.changes(self._redistributions.changing))
            stack.enter_context(_OntoDevice(self))
            stack.enter_context(_without_collections())
            stack.enter_context(self)
            yield

    def failed_in(self, error: Exception) -> str:
        """The innermost module out of whose call an error came; in the backward the module of the op before
        it. Empty: none of them."""
        module = raised_in(error)
        if module is None and self.place.step_phase is Phase.BACKWARD:
            module = next(
                (event.module for event in reversed(self.log.events) if isinstance(event, Op)), None
            )
        return module or ""

    def first_of(self, seq: int) -> str:
        """The first module in which something [B, seq, ...] was made, and a colon; empty where none was."""
        ops = (event for event in self.log.events if isinstance(event, Op) and event.module)
        made = (op.module for op in ops for spec in op.outputs if spec.shape[1:2] == (seq,) != spec.shape[2:])
        return next((f"{module}: " for module in made), "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        for kind in types:
            if issubclass(kind, (DTensor, AsyncCollectiveTensor)):
                return NotImplemented  # seen again as the ops on local tensors that it makes of it
        if func in _waits() and isinstance(args[0], FakeTensor):
            return args[0]  # the real ones hand on what they got; their fakes make a tensor that nobody has
        kwargs = kwargs or {}
        if is_higher_order(func):
            return self._higher_order(func, args, kwargs)
        if (known := self._values.read(func, args)) is not None:
            return known
        if is_made_on_device() and not types and not tensors_in(args):
            with self._fake_mode:
                out = func(*args, **kwargs)
        elif _has_no_fake(func):  # the fake process group takes the tensors and leaves them as they are
            out = call_cpu_kernel(func, *args, **kwargs)
        else:
            out = fake_of(self._fake_mode, func, args, kwargs)
        signature = signature_of(func)
        self._values.follow(func, signature, args, kwargs, out)
        if not self._paused:
            self._see(signature, args, kwargs, out)
        return out

    def _higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What it runs inside isn't seen."""
        out = func(*args, **kwargs)
        if not self._paused:
            signature, outputs = signature_of_higher_order(func), tensors_in(out)
            self.storages.note_all(outputs, signature.name)
            work = higher_order_work(signature.name, (*args, *kwargs.values()), outputs)
            causal = is_masked(signature.name, args)
            self.log.add(self._ops.op(signature, args, work, is_half=causal))
        return out

    def onto_device(self, tensor: Tensor, given: Any) -> Tensor:
        """A host tensor as the device has it: fake. Elsewhere than on a CPU that is a copy."""
        dtype = next((item for item in given if isinstance(item, torch.dtype)), tensor.dtype)
        with self._fake_mode:
            moved = torch.empty(tensor.shape, dtype=dtype)
        if self._device != "cpu" and self.log.is_on:
            self.log.add(self._ops.copy_from_host(moved))
            self.storages.note(moved, "aten::_to_copy")
        return moved

    def _see(self, signature: Signature, args: Any, kwargs: Any, out: Any) -> None:
        name = signature.name
        if name in SILENT:
            return
        outputs = tensors_in(out)
        work = None
        if not self.log.is_on or name in ALLOCATIONS:
            self.storages.note_all(outputs, name)
        elif signature.is_collective:
            told = next(filter(None, map(told_of, tensors_in(args))), None)
            read = read_calls(name, args, out, self._axes, str(self.place.phase))
            calls = [call for call in read if call.axis_size > 1]
            for call in calls:
                self.log.add(self._collective(call, told))
            self.storages.note_all(outputs, name)
            for call in calls:
                self.storages.mark_shards(_shards(call, (*tensors_in(args), *outputs)))
                self.kinship.exchanges(call, tensors_in(args), outputs)
            if name.partition("::")[2] in FUSED:
                work = Work(tensors_in(args), outputs)
        else:
            work = work_of(signature, args, kwargs, outputs)
        if name == FSDP_COPY_IN:
            self.storages.mark_shards(tensors_in(args[0]))
        if name == FSDP_COPY_OUT:
            self.storages.mark_gathered(tensors_in(kwargs["out"]))
        if work is not None:
            op = self._ops.op(signature, args, work)
            maker = name if op.kind is OpKind.UNKNOWN else op.name
            inner = inner_of(name, self._device, work.inputs, work.made)
            with self.storages.passing(inner.before, maker):
                self.storages.note_all(work.made, maker)
                with self.storages.passing(inner.behind, maker):
                    self.log.add(op)
            self.kinship.computes(name, op.kind, work)

    def _collective(self, call: CollectiveCall, told: Told | None = None) -> Collective | Routed:
        if told is not None:
            return Collective(replace(call, phase=str(told.phase)), told.module, reason=told.reason)
        issue = issuing()
        if issue is not None:
            origin = issue.origin
            collective = Collective(
                call, origin.module, origin.rule, origin.before, origin.after, reason=issue.reason
            )
            return Routed(collective, issue.sends) if issue.by_data else collective
        module = self.place.module
        before, after = self._redistributions.change(call)
        rule = self._rule_of(module) if call.axis == TENSOR_AXIS and module != LOSS_MODULE else None
        return Collective(call, module, rule, before, after)

    def _unseen(self, original: Any) -> Any:
        """DTensor runs an op at its global shape to learn the shape of its result, flex attention its
        functions on examples to learn its backward: not part of the step."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._paused += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._paused -= 1

        return run


class _OntoDevice(TorchFunctionMode):
    """Sends what a program makes on, or moves to, a device to the recorder; what it makes without naming a
    device stays on the host."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to:
            tensor, *rest = args
            given = (*rest, *kwargs.values())
            devices = [item for item in given if isinstance(item, (torch.device, str))]
            is_plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
            if is_plain and devices and torch.device(devices[0]).type != "meta":
                return self._recorder.onto_device(tensor, given)
        device = kwargs.get("device")
        if device is not None and func in _factories() and torch.device(device).type != "meta":
            with making_on_device():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _shards(call: CollectiveCall, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of a reduce-scatter over FSDP's ranks, the part that this rank gets."""
    if call.kind is not CollectiveKind.REDUCE_SCATTER or role_of(call.axis) is not Role.SHARDS_PARAMETERS:
        return []
    return [each for each in tensors if each.nbytes * call.axis_size == call.payload_bytes]


def _of_results(shape_of: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """What writes into what it takes, and gives nothing, needn't run to learn that."""
    return lambda propagator, schema: None if is_void(schema.op) else shape_of(propagator, schema)


@lru_cache(maxsize=1)
def _factories() -> frozenset[Any]:
    return frozenset(device_factories())


@lru_cache(maxsize=1)
def _waits() -> frozenset[Any]:
    names = ("wait_tensor", "_wrap_tensor_autograd")
    return frozenset(getattr(torch.ops._c10d_functional, name).default for name in names)


@lru_cache(maxsize=4096)
def _has_no_fake(func: Any) -> bool:
    """Whether PyTorch has a kernel for it and no fake of that: so for torch.distributed's coalesced
    collectives."""
    name = schema_of(func).name
    return name.startswith("c10d::") and not has_kernel(name, "Meta")


@contextmanager
def _without_collections() -> Iterator[None]:
    """What is freed is freed where the step lets go of it, not where Python happens to look for cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
