"""Records what a step does below every engine, at PyTorch's dispatcher: ops, collectives, and storages that come and go.

Who asked: in the forward the innermost module whose call runs (its hooks included), in the backward the module in whose forward the running
autograd node was made (by the node's sequence number), in a recomputed forward the module again. The native engine says itself why it issues
a collective (collectives.issuing()); DTensor's redistributions are watched for their placements.
"""

import gc
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from shardwise.core import placement as ours
from shardwise.core.collective import CollectiveCall, CollectiveKind
from shardwise.core.mesh import TENSOR_AXIS, Role, role_of
from shardwise.core.placement import Placement
from shardwise.core.program import LOSS_MODULE, Collective, Op, OpKind, Phase, TensorSpec
from shardwise.core.rule import RuleRef
from shardwise.parallel.collectives import issuing
from shardwise.parallel.recorder import FUSED, is_collective, read_calls
from shardwise.torch_private import (
    NO_SEQUENCE,
    PROPAGATIONS,
    REDISTRIBUTIONS,
    AsyncCollectiveTensor,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    call_cpu_kernel,
    current_node,
    device_factories,
    has_kernel,
    next_sequence,
    schema_of,
    sequence_of,
    storage_key,
)
from shardwise.trace.catalogue import flops_of, kind_of, name_on, traffic_of
from shardwise.trace.fakes import is_made_on_device, making_on_device

_RAISED_IN = "_shardwise_raised_in"
_FSDP_COPY_IN = "fsdp::all_gather_copy_in"
# neither kernels nor memory: bookkeeping of the dispatcher, the profiler and the functional collectives
_SILENT = frozenset(
    {
        "prim::device",
        "profiler::_record_function_enter_new",
        "profiler::_record_function_exit",
        "aten::promote_types",
    }
)
# memory without a kernel
_ALLOCATIONS = frozenset(
    {
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::resize_",
        "aten::set_",
    }
)


@dataclass(slots=True)
class Storage:
    """One storage that was seen: its size, and who made it."""

    n_bytes: int
    phase: Phase
    module: str
    maker: str


@dataclass(frozen=True, slots=True)
class Came:
    """The storage with this number exists from here on."""

    storage: int


@dataclass(frozen=True, slots=True)
class Went:
    storage: int


Event = Op | Collective | Came | Went


@dataclass(frozen=True, slots=True)
class _Schema:
    """What a dispatcher op says of itself: its name, the positions of the arguments that it writes, PyTorch's tags."""

    name: str
    writes: tuple[int, ...]
    writes_keywords: tuple[str, ...]
    is_collective: bool
    tags: frozenset[str]


@lru_cache(maxsize=1)
def _waits() -> frozenset[Any]:
    names = ("wait_tensor", "_wrap_tensor_autograd")
    return frozenset(getattr(torch.ops._c10d_functional, name).default for name in names)


@lru_cache(maxsize=4096)
def _has_no_fake(func: Any) -> bool:
    """Whether it is one of torch.distributed's collectives for which PyTorch has a kernel and no fake of it (the coalesced ones)."""
    name = schema_of(func).name
    return name.startswith("c10d::") and not has_kernel(name, "Meta")


@lru_cache(maxsize=4096)
def _schema(func: Any) -> _Schema:
    schema = schema_of(func)
    written = [
        (index, argument)
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info and argument.alias_info.is_write
    ]
    return _Schema(
        schema.name,
        tuple(index for index, argument in written if not argument.kwarg_only),
        tuple(argument.name for _, argument in written if argument.kwarg_only),
        is_collective(func),
        frozenset(tag.name for tag in func.tags),
    )


@dataclass(slots=True)
class _Place:
    """Module names over time: in the forward by the stack, in the backward by the sequence number at which a node was made."""

    stack: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [-1])
    modules: list[str] = field(default_factory=lambda: [""])

    def mark(self) -> None:
        self.starts.append(next_sequence())
        self.modules.append(self.stack[-1] if self.stack else "")

    def made_at(self, sequence: int) -> str:
        return self.modules[bisect_right(self.starts, sequence) - 1]


class Recorder(TorchDispatchMode):
    """`events` in order; `storages` by number; `decided_by_data`: the events that are collectives whose splits the batch decides. axes: group name -> axis name. device: whose ops the trace is about.

    Set `recording` while the step runs; before that, storages only (what is resident). rule_of: module name -> its rule, for collectives
    whose issuer doesn't say.
    """

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
        self.events: list[Event] = []
        self.storages: list[Storage] = []
        self.decided_by_data: list[int] = []
        self.phase = Phase.FORWARD
        self.recording = False
        self._fake_mode = fake_mode
        self._axes = axes
        self._device = device
        self._rule_of = rule_of
        self._place = _Place()
        self._recomputing = 0
        self._paused = 0
        self._change: tuple[Any, Any] | None = None
        self._names = {
            id(module): name for name, module in model.named_modules(remove_duplicate=False) if name
        }
        self._parameters = {
            id(parameter): name.rpartition(".")[0] for name, parameter in model.named_parameters()
        }
        self._live: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._specs: dict[tuple[torch.dtype, torch.Size], TensorSpec] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Everything that must be in place while the model runs."""
        with ExitStack() as stack:
            stack.enter_context(patch.object(nn.Module, "__call__", self._module_call()))
            stack.enter_context(patch.object(torch.UntypedStorage, "resize_", self._resize()))
            for owner, name in REDISTRIBUTIONS:
                stack.enter_context(patch.object(owner, name, self._redistribution(getattr(owner, name))))
            for owner, name in PROPAGATIONS:
                stack.enter_context(patch.object(owner, name, self._unseen(getattr(owner, name))))
            stack.enter_context(_OntoDevice(self))
            stack.enter_context(_without_collections())
            stack.enter_context(self)
            yield

    def enter_phase(self, phase: Phase) -> None:
        """Told by the step as each phase begins."""
        self.phase = phase
        self._place.stack[:] = [LOSS_MODULE] if phase is Phase.LOSS else []
        self._place.mark()

    def failed_in(self, error: Exception) -> str:
        """The innermost module out of whose call an error came; in the backward the module of the op before it. Empty: none of them."""
        raised_in = getattr(error, _RAISED_IN, None)
        if raised_in is not None:
            return str(raised_in)
        last = next((event for event in reversed(self.events) if isinstance(event, Op)), None)
        return last.module if last is not None and self.phase is Phase.BACKWARD else ""

    def storage_of(self, tensor: Tensor) -> int | None:
        """Number of a plain tensor's storage, if it was seen."""
        known = self._live.get(storage_key(tensor.untyped_storage()))
        return known[0] if known else None

    def saw(self, tensor: Tensor, maker: str) -> int:
        """Notes a tensor that exists already; returns its storage's number."""
        return self._note_storage(tensor, "", maker)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        for kind in types:
            if issubclass(kind, (DTensor, AsyncCollectiveTensor)):
                return NotImplemented  # seen again as the ops on local tensors that it makes of it
        if func in _waits() and isinstance(args[0], FakeTensor):
            return args[0]  # the real ones hand on what they got; their fakes make a tensor that nobody has
        kwargs = kwargs or {}
        if is_made_on_device() and not types and not _tensors(args):
            with self._fake_mode:
                out = func(*args, **kwargs)
        elif _has_no_fake(func):  # the fake process group takes the tensors and leaves them as they are
            out = call_cpu_kernel(func, *args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if not self._paused:
            self._see(_schema(func), args, kwargs, out)
        return out

    def onto_device(self, tensor: Tensor, given: Any) -> Tensor:
        """A host tensor as the device has it: fake. Elsewhere than on a CPU that is a copy."""
        dtype = next((item for item in given if isinstance(item, torch.dtype)), tensor.dtype)
        with self._fake_mode:
            moved = torch.empty(tensor.shape, dtype=dtype)
        if self._device != "cpu" and self.recording:
            spec = self._spec(moved)
            n_bytes = _bytes(moved)
            self.events.append(
                Op(
                    "aten::_to_copy",
                    OpKind.COPY,
                    self._phase(),
                    self._module(),
                    (spec,),
                    (spec,),
                    0,
                    n_bytes,
                    n_bytes,
                    True,
                )
            )
            self._note_storage(moved, self._module(), "aten::_to_copy")
        return moved

    def made_on_device(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Calls a factory that was told its device."""
        with making_on_device():
            return function(*args, **kwargs)

    def _see(self, schema: _Schema, args: Any, kwargs: Any, out: Any) -> None:
        name = schema.name
        if name in _SILENT:
            return
        outputs = _tensors(out)
        if schema.is_collective:
            self._see_collective(name, args, out)
            self._note_outputs(outputs, name)
            if self.recording and name.partition("::")[2] in FUSED:
                self._add_op(schema, args, _tensors(args), outputs, [])
            return
        if not self.recording:
            self._note_outputs(outputs, name)
            return
        inputs = _tensors(args) + _tensors(tuple(kwargs.values()))
        written = [t for index in schema.writes if index < len(args) for t in _tensors(args[index])]
        written += [t for key in schema.writes_keywords for t in _tensors(kwargs.get(key))]
        if name in _ALLOCATIONS:
            self._note_outputs(outputs, name)
            return
        known = {storage_key(t.untyped_storage()) for t in inputs}
        made = [t for t in outputs if storage_key(t.untyped_storage()) not in known]
        if (
            name == _FSDP_COPY_IN
        ):  # into its place in the gathered tensor, which is its last input; what it gives are views of that
            self._add_op(schema, args, inputs[:-1], outputs[:1], [])
            return
        if not made and not written:
            return  # a view
        self._note_outputs(made, name)
        self._add_op(schema, args, inputs, made, written)

    def _add_op(
        self, schema: _Schema, args: Any, inputs: list[Tensor], made: list[Tensor], written: list[Tensor]
    ) -> None:
        name = schema.name
        in_specs, out_specs = tuple(map(self._spec, inputs)), tuple(map(self._spec, made))
        written_ids = {id(t) for t in written}
        reads, writes = traffic_of(
            name,
            in_specs,
            [_bytes(t) for t in inputs],
            [_bytes(t) for t in made],
            [_bytes(t) for t in inputs if id(t) in written_ids],
        )
        causal = name.startswith("aten::_scaled_dot_product") and any(argument is True for argument in args)
        shown = name_on(name, self._device, in_specs)
        on_host = self._device != "cpu" and not any(isinstance(t, FakeTensor) for t in (*inputs, *made))
        self.events.append(
            Op(
                shown,
                kind_of(name, self._device, schema.tags)
                if not shown.startswith("unknown")
                else OpKind.UNKNOWN,
                self._phase(),
                self._module(),
                in_specs,
                out_specs,
                flops_of(name, in_specs, out_specs, causal=causal),
                reads,
                writes,
                on_host,
            )
        )

    def _see_collective(self, name: str, args: Any, out: Any) -> None:
        if self.recording:
            for call in read_calls(name, args, out, self._axes, str(self._phase())):
                if call.axis_size > 1:
                    self._add_collective(call)

    def _add_collective(self, call: CollectiveCall) -> None:
        issue = issuing()
        if issue is not None:
            origin = issue.origin
            self.events.append(Collective(call, origin.module, origin.rule, origin.before, origin.after))
            if issue.by_data:
                self.decided_by_data.append(len(self.events) - 1)
            return
        module = self._module()
        before, after = self._placements(call.axis, call.kind)
        rule = self._rule_of(module) if call.axis == TENSOR_AXIS and module != LOSS_MODULE else None
        self.events.append(Collective(call, module, rule, before, after))

    def _placements(self, axis: str, kind: CollectiveKind) -> tuple[Placement | None, Placement | None]:
        if self._change is not None:
            before, after = (_placement_on(spec, axis) for spec in self._change)
            if before is not None and after is not None:
                return before, after
        match kind, role_of(axis):
            case CollectiveKind.ALL_REDUCE, _:
                return ours.Partial(), ours.Replicate()
            case CollectiveKind.ALL_GATHER, Role.SHARDS_PARAMETERS:
                return ours.Shard(0), ours.Replicate()
            case CollectiveKind.REDUCE_SCATTER, Role.SHARDS_PARAMETERS:
                return ours.Partial(), ours.Shard(0)
            case _:
                return None, None

    def _phase(self) -> Phase:
        return Phase.RECOMPUTE if self._recomputing else self.phase

    def _module(self) -> str:
        if self._recomputing or self.phase is not Phase.BACKWARD:
            return self._place.stack[-1] if self._place.stack else ""
        node = current_node()
        if node is None:
            return ""
        sequence = sequence_of(node)
        if sequence >= NO_SEQUENCE:
            return self._parameters.get(id(getattr(node, "variable", None)), "")
        return self._place.made_at(sequence)

    def _spec(self, tensor: Tensor) -> TensorSpec:
        key = (tensor.dtype, tensor.shape)
        known = self._specs.get(key)
        if known is None:
            known = self._specs[key] = TensorSpec(
                str(tensor.dtype).removeprefix("torch."), tuple(int(size) for size in tensor.shape)
            )
        return known

    def _note_outputs(self, outputs: list[Tensor], maker: str) -> None:
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage_key(storage) not in self._live:
                self._note_storage(tensor, self._module() if self.recording else "", maker)

    def _note_storage(self, tensor: Tensor, module: str, maker: str) -> int:
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        known = self._live.get(key)
        if known is not None:
            return known[0]
        number = len(self.storages)
        self.storages.append(Storage(storage.nbytes(), self._phase(), module, maker))
        self._live[key] = (number, weakref.ref(storage, lambda _: self._gone(key, number)))
        if self.recording:
            self.events.append(Came(number))
        return number

    def _gone(self, key: int, number: int) -> None:
        if self._live.get(key, (None,))[0] == number:
            del self._live[key]
            if self.recording:
                self.events.append(Went(number))

    def _module_call(self) -> Any:
        original = nn.Module.__call__
        names, place = self._names, self._place

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = names.get(id(module))
            if name is None:
                return original(module, *args, **kwargs)
            again = self.phase is Phase.BACKWARD
            self._recomputing += again
            place.stack.append(name)
            place.mark()
            try:
                return original(module, *args, **kwargs)
            except Exception as error:
                if not hasattr(
                    error, _RAISED_IN
                ):  # on the error itself: held here, it would hold the tensors of its frames
                    setattr(error, _RAISED_IN, name)
                raise
            finally:
                place.stack.pop()
                place.mark()
                self._recomputing -= again

        return call

    def _resize(self) -> Any:
        """FSDP2 frees and makes storages by resizing them."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            result = original(storage, size)
            key = storage_key(storage)
            known = self._live.get(key)
            if known is not None and storage.nbytes() != before:
                self._gone(key, known[0])
                if size:
                    number = len(self.storages)
                    self.storages.append(Storage(size, self._phase(), self._module(), "resize_"))
                    self._live[key] = (number, weakref.ref(storage, lambda _: self._gone(key, number)))
                    if self.recording:
                        self.events.append(Came(number))
                else:  # empty, but known: it isn't made anew when it is seen again
                    self._live[key] = (-1, weakref.ref(storage, lambda _: self._live.pop(key, None)))
            return result

        return resize_

    def _redistribution(self, original: Any) -> Any:
        def redistribute(local: Tensor, current: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            before, self._change = self._change, (current, target)
            try:
                return original(local, current, target, *args, **kwargs)
            finally:
                self._change = before

        return redistribute

    def _unseen(self, original: Any) -> Any:
        """DTensor runs an op at its global shape to learn the shape of its result: not part of the step."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._paused += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._paused -= 1

        return run


class _OntoDevice(TorchFunctionMode):
    """Sends what a program makes on, or moves to, a device to the recorder; what it makes without naming a device stays on the host."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to:
            tensor, *rest = args
            given = (*rest, *kwargs.values())
            if type(tensor) in (Tensor, nn.Parameter) and any(
                isinstance(item, (torch.device, str)) for item in given
            ):
                device = next(item for item in given if isinstance(item, (torch.device, str)))
                if torch.device(device).type != "meta" and not tensor.is_meta:
                    return self._recorder.onto_device(tensor, given)
        elif (
            kwargs.get("device") is not None
            and func in _factories()
            and torch.device(kwargs["device"]).type != "meta"
        ):
            return self._recorder.made_on_device(func, args, kwargs)
        return func(*args, **kwargs)


@lru_cache(maxsize=1)
def _factories() -> frozenset[Any]:
    return frozenset(device_factories())


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


def _placement_on(spec: Any, axis: str) -> Placement | None:
    names = spec.mesh.mesh_dim_names or ()
    if axis not in names:
        return None
    return from_torch(spec.placements[names.index(axis)])


def from_torch(placement: Any) -> Placement:
    """PyTorch's placement as ours; what is cut in an order of its own is a Shard here, and every kind of partial value is Partial."""
    if placement.is_replicate():
        return ours.Replicate()
    if placement.is_partial():
        return ours.Partial()
    return ours.Shard(placement.dim)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _bytes(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor really has: an expanded dim counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size <= 1 else 1
    return count * tensor.element_size()
