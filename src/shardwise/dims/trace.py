"""record_of(): runs a model's forward once on meta tensors and takes down what it does.

Weights and activations are on the meta device and hold nothing. What depends on no weight (ids, positions,
masks) is computed for real, on the host, so that a branch on a mask, an index by a constant or a loop over a
count goes the way it goes in training.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from shardwise.core.errors import ModelError
from shardwise.core.shown import told
from shardwise.dims import by_data, views
from shardwise.dims.factors import ConflictError, Factor, find
from shardwise.dims.record import Apart, Entered, Left, Op, Record, Source, Value
from shardwise.dims.rules import Call, rule_for
from shardwise.dims.sizes import tagged
from shardwise.dims.written import WrittenSizes
from shardwise.models.flex_attention import Attended, without_data
from shardwise.torch_private import (
    TorchDispatchMode,
    has_kernel,
    is_higher_order,
    overload_of,
    schema_of,
    tree_flatten,
    tree_map,
)

_RULES_OF = (views, by_data)  # their rules are known once they are imported
BATCH, SEQ = 2, 24
# real tensors beyond this are taken for unknown: a trace computes positions and masks, no activations
_MOST_KNOWN = 2**21
_GUESS = 1
FLEX = "flex_attention"


def seq_within(longest: int | None) -> int:
    """Tokens of a sequence to trace with, of a model that has positions for `longest`; None: no limit."""
    return SEQ if longest is None else min(SEQ, longest)


def record_of(
    model: nn.Module, vocab_size: int, *, batch: int = BATCH, seq: int = SEQ, apart: Collection[Apart] = ()
) -> Record:
    """What `model`, unsharded and on the meta device, does with ids [batch, seq]. apart: dims of arguments
    that are to be told apart from what they are around their module.

    Raises ModelError where its forward fails without data.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(8, vocab_size - 1), vocab_size, (batch, seq), generator=generator)
    recorder = _Recorder(model, ids, apart)
    with ExitStack() as stack:
        stack.enter_context(without_data())
        stack.enter_context(_autocast_off_meta())
        stack.enter_context(tagged(model))
        stack.enter_context(recorder.watching_modules())
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        stack.enter_context(WrittenSizes(recorder))
        try:
            logits = model(ids)
        except Exception as error:
            where = recorder.module or "the model"
            raise ModelError(
                f"its forward can't be traced without data: in {where}, {told(error)}"
            ) from error
    if not isinstance(logits, Tensor):
        raise ModelError(f"its forward gives {type(logits).__name__}, not logits [B, S, V].")
    recorder.record.logits = recorder.value_of(logits)
    return recorder.record


class _Recorder(TorchDispatchMode):
    """Stands at the dispatcher: runs each op, on meta tensors or for real, and books it."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, ids: Tensor, apart: Collection[Apart] = ()) -> None:
        super().__init__()
        self.record = Record()
        self._model, self._apart = model, apart
        self._values: dict[int, Value] = {}
        self._kept: list[Any] = []  # so that no id() is used again
        self._bases: dict[int, Value] = {}  # of a view: what it is a view of
        self._unknown: set[int] = set()  # real tensors into which something unknown was written
        self._stack: list[str] = []
        for name, parameter in model.named_parameters():
            value = self.record.parameters[name] = self._new(parameter, Source.PARAMETER, name)
            value.has_gradient = True
        for name, buffer in model.named_buffers():
            self.record.buffers[name] = self._new(buffer, Source.BUFFER, name)
        self.record.ids = self._new(ids, Source.IDS, "")
        self.record.ids.is_live = True

    @property
    def module(self) -> str:
        return self._stack[-1] if self._stack else ""

    def value_of(self, tensor: Tensor) -> Value:
        found = self._values.get(id(tensor))
        # a constant that somebody made before: numbers that depend on where they stand
        return found if found is not None else self._new(tensor, Source.POSITIONS, "")

    def _new(self, tensor: Tensor, source: Source, name: str, dims: list[Factor] | None = None) -> Value:
        own = dims if dims is not None else [Factor(size) for size in tensor.shape]
        value = Value(len(self._kept), own, source, name)
        self._values[id(tensor)] = value
        self._kept.append(tensor)
        return value

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        handles = []
        for name, module in self._model.named_modules():
            entered, left = self._hooks(name, _arguments_of(module))
            handles.append(module.register_forward_pre_hook(entered, with_kwargs=True))
            handles.append(module.register_forward_hook(left, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(
        self, name: str, arguments: tuple[str, ...]
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        around: list[dict[int, Value]] = []  # what tensors are around the module that is called

        def entered(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            given = {**dict(zip(arguments, args, strict=False)), **kwargs}
            tensors = {key: each for key, each in given.items() if isinstance(each, Tensor)}
            names = {key: self.value_of(each) for key, each in tensors.items()}
            self.record.events.append(Entered(name, self._values_in((args, kwargs)), names))
            around.append(self._set_apart(name, tensors))

        def left(_: nn.Module, __: Any, output: Any) -> None:
            self._values.update(around.pop())
            if output is not None:  # after an exception it is none, and the stack says where it was
                self.record.events.append(Left(name, self._values_in(output)))
                self._stack.pop()

        return entered, left

    def _set_apart(self, module: str, given: Mapping[str, Tensor]) -> dict[int, Value]:
        """Gives arguments dims of their own inside a module; what they were before."""
        before: dict[int, Value] = {}
        for each in self._apart:
            tensor = given.get(each.argument)
            if each.module != module or tensor is None or each.dim >= tensor.dim():
                continue
            value = self.value_of(tensor)
            before.setdefault(id(tensor), value)
            dims = list(value.dims)
            dims[each.dim] = Factor(tensor.shape[each.dim])
            self.record.apart[each] = self._new(tensor, Source.OP, "", dims)
        return before

    def _values_in(self, tree: Any) -> tuple[Value, ...]:
        return tuple(self.value_of(leaf) for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if is_higher_order(func):
            return self._higher_order(func, args)
        name = schema_of(func).name.split("::")[1]
        if has_kernel(func.name(), "CompositeImplicitAutograd"):
            with self:  # others run inside it; it comes here where autograd hasn't taken it apart
                return func.decompose(*args, **kwargs)
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        out = self._run(func, name, inputs, args, kwargs)
        outputs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        # a number that is read out of an unknown tensor is a use of it
        if outputs or (name == "_local_scalar_dense" and not self._is_known(inputs[0])):
            self._book(func, name, inputs, outputs, args, kwargs)
        return out

    def _higher_order(self, func: Any, args: Any) -> Any:
        """An op that takes functions beside tensors: flex attention, as the plain ops of its formula."""
        if func.name() != FLEX:
            raise RuntimeError(f"nobody described what {func.name()} does with its functions")
        attended = Attended.of(tree_map(_on_meta, args))
        if attended.by_heads:
            call = Call(FLEX, "", {}, [attended.query], [attended.query], self.value_of, self.record.sequence)
            call.block(call.dims(attended.query)[1], f"{FLEX}'s functions may tell the heads apart")
            self._note(call)
        with self:
            return attended.run()

    def _is_known(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and id(tensor) not in self._unknown

    def _run(self, func: Any, name: str, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        if name == "_local_scalar_dense" and not self._is_known(inputs[0]):
            self.record.guesses.append(self.module)
            return _GUESS
        asks_for_meta = torch.device(kwargs.get("device") or "cpu").type == "meta"
        if all(map(self._is_known, inputs)):
            if asks_for_meta or not inputs:
                kwargs = {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs
                if not inputs and _numel(args) > _MOST_KNOWN:
                    kwargs["device"] = "meta"
            elif sum(tensor.numel() for tensor in inputs) > _MOST_KNOWN:
                args, kwargs = tree_map(_on_meta, (args, kwargs))
            return func(*args, **kwargs)
        written = inputs[0] if schema_of(func).is_mutable and self._is_written(func, args) else None
        out = func(*tree_map(_on_meta, args), **{**tree_map(_on_meta, kwargs), **_device(kwargs)})
        if written is not None and not written.is_meta:
            self._unknown.add(id(written))
            return written
        return written if written is not None else out

    @staticmethod
    def _is_written(func: Any, args: Any) -> bool:
        """Whether an op writes into its first argument and returns that."""
        first = schema_of(func).arguments[0]
        is_first = first.alias_info is not None and first.alias_info.is_write
        return bool(is_first and args and isinstance(args[0], Tensor))

    def _book(
        self, func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor], args: Any, kwargs: Any
    ) -> None:
        arguments = {
            each.name: each.default_value for each in schema_of(func).arguments if each.has_default_value()
        }
        arguments |= {each.name: value for each, value in zip(schema_of(func).arguments, args, strict=False)}
        arguments |= kwargs
        call = Call(name, overload_of(func), arguments, inputs, outputs, self.value_of, self.record.sequence)
        described = rule_for(func, name)
        if described is None:
            self.record.unknown[name] = self.record.unknown.get(name, 0) + 1
            self._make_whole(call, f"nobody described what {name} does")
        else:
            try:
                described(call)
                if not call.is_sized:
                    call.block_what_is_new()
            except (ConflictError, IndexError, KeyError, TypeError, ValueError) as error:
                call.conflicts.append(str(error))
                self._make_whole(call, f"{name} doesn't say which of its dims are one")
        for text in call.conflicts:
            key = f"{name} in {self.module}: {text}"
            self.record.conflicts[key] = self.record.conflicts.get(key, 0) + 1
        self._note(call)
        self._follow_views(func, call)

    def _follow_views(self, func: Any, call: Call) -> None:
        """What is written into a view goes into what it is a view of."""
        first = self.value_of(call.inputs[0]) if call.inputs else None
        for returned, output in zip(schema_of(func).returns, call.outputs, strict=False):
            alias = returned.alias_info
            if alias is None or first is None:
                continue
            value = self.value_of(output)
            base = self._bases.get(first.number, first)
            if not alias.is_write:
                self._bases[value.number] = base
            elif value.number in self._bases:
                base.is_live |= value.is_live
                base.has_gradient |= value.has_gradient
                self.record.events.append(Op("written", self.module, (base, value), (base,)))

    @staticmethod
    def _make_whole(call: Call, why: str) -> None:
        call.given.clear()
        for tensor in call.inputs:
            for dim in call.dims(tensor):
                call.block(dim, why)
        for output in call.outputs:
            call.give(output, [Factor(size) for size in output.shape])
        call.block_what_is_new()

    def _are_its(self, tensor: Tensor, dims: list[Factor]) -> bool:
        """Whether an op in place left a tensor's dims as they are: t_() and the like turn them."""
        own = self.value_of(tensor).dims
        return len(own) == len(dims) and all(find(a) is find(b) for a, b in zip(own, dims, strict=True))

    def _note(self, call: Call) -> None:
        before = tuple(self.value_of(tensor) for tensor in call.inputs)
        after = []
        for output in call.outputs:
            dims = call.given.get(id(output))
            is_an_input = any(output is tensor for tensor in call.inputs)
            if is_an_input and (dims is None or self._are_its(output, dims)):
                after.append(self.value_of(output))
            else:
                after.append(self._new(output, call.source, "", dims))
            after[-1].is_live |= any(value.is_live for value in before)
            is_real = output.dtype.is_floating_point or output.dtype.is_complex
            after[-1].has_gradient |= is_real and any(value.has_gradient for value in before)
        added = self.value_of(call.added) if call.added is not None else None
        self.record.events.append(
            Op(
                call.name, self.module, before, tuple(after), tuple(call.summed), tuple(call.blocked),
                call.is_linear, added,
            )
        )  # fmt: skip


@contextmanager
def _autocast_off_meta() -> Iterator[None]:
    """torch.autocast for the device of tensors that hold nothing does nothing; PyTorch's own refuses that
    device."""
    begin = torch.autocast.__init__

    def on_meta(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        if device_type == "meta":
            begin(self, "cpu", enabled=False)
        else:
            begin(self, device_type, *args, **kwargs)

    with patch.object(torch.autocast, "__init__", on_meta):
        yield


def _arguments_of(module: nn.Module) -> tuple[str, ...]:
    """The names of what a module's forward takes, in order, as far as each has one."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(each.name for each in parameters if each.kind in kinds)


def _on_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) and not leaf.is_meta else leaf


def _device(kwargs: Any) -> dict[str, Any]:
    return {"device": torch.device("meta")} if kwargs.get("device") is not None else {}


def _numel(args: Any) -> int:
    """About how many entries a factory makes."""
    sizes = [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, int) and not isinstance(leaf, bool)]
    total = 1
    for size in sizes:
        total *= max(1, abs(size))
    return total
