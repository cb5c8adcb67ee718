"""What meets each parameter in a forward, and how what it gives is taken apart: watched at torch's functions,
while trace() runs the step.

Above the dispatcher, since views (`chunk`, `split`, `view`) and what a DTensor stands for are seen only
there. A tensor is followed by its storage, so that a view, or the local part of a DTensor, is the same as
what it was made of.

What this file does not know: which of these is wrong. It takes note of shapes; verify/foresight.py compares
those of two runs.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TorchShard
from torch.overrides import TorchFunctionMode

from shardwise.core.errors import ModelError
from shardwise.parallel.apply import applied_to
from shardwise.parallel.recorder import tensors_in
from shardwise.torch_private import AsyncCollectiveTensor, local_part, storage_key

Shape = tuple[int, ...]
_CHOICES = frozenset({Tensor.__getitem__, torch.index_select, Tensor.index_select})


class TooLongError(ModelError):
    """A forward that can't be watched in the time that there is."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """A parameter (or what was made of parameters alone) and activations in one function. of_dtensors: the
    shapes are what DTensors stand for."""

    parameter: str
    shapes: tuple[Shape, ...]
    of_dtensors: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """What a parameter gave, unfolded (one piece, of more dims) or taken apart (pieces that are smaller in
    one dim, each in a row of its own)."""

    parameter: str
    before: Shape
    pieces: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Lineage:
    """One forward, as one rank runs it. cut_plainly: parameters of which rank r holds the r-th chunk. logits:
    None for none."""

    meetings: tuple[Meeting, ...]
    cuts: tuple[Cut, ...]
    cut_plainly: frozenset[str] = frozenset()
    logits: Shape | None = None


class Watch(TorchFunctionMode):
    """Watches the forward of the model that attach() is told, while it is entered. limit_s: a forward that
    takes longer raises TooLongError."""

    def __init__(self, limit_s: float = float("inf")) -> None:
        super().__init__()
        self.model: nn.Module | None = None
        self._limit_s = limit_s
        self._deadline_s = float("inf")
        self._is_on = False
        self._meetings: list[Meeting] = []
        self._cuts: list[Cut] = []
        self._logits: Shape | None = None
        self._made_of: dict[int, frozenset[str]] = {}  # storage -> parameters; of none: a constant
        self._given_by: dict[int, str] = {}  # storage of an activation -> the parameter that it comes from
        self._kept: list[Any] = []  # so that no storage's address is used again

    def attach(self, model: nn.Module) -> None:
        """Watch this model from now on, and forget what was seen of another."""
        self.__init__(self._limit_s)  # type: ignore[misc]
        self.model = model
        self._deadline_s = time.monotonic() + self._limit_s
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(self._looked_up)

    @property
    def lineage(self) -> Lineage:
        parameters = self.model.named_parameters() if self.model is not None else ()
        ordered = applied_to(self.model).row_order if self.model is not None else {}
        plainly = frozenset(
            name for name, parameter in parameters if _is_cut_plainly(parameter) and name not in ordered
        )
        return Lineage(tuple(self._meetings), tuple(self._cuts), plainly, self._logits)

    def _begin(self, model: nn.Module, _: Any) -> None:
        for buffer in model.buffers():
            self._made_of[_storage(buffer)] = frozenset()
        for name, parameter in model.named_parameters():
            self._made_of[_storage(parameter)] = frozenset({name})
        self._is_on = True

    def _looked_up(self, _: nn.Module, __: Any, output: Any) -> None:
        """An activation, even where a style makes it of rows alone, by ids that lie on the host."""
        for tensor in tensors_in(output):
            self._made_of.pop(_storage(tensor), None)

    def _end(self, _: nn.Module, __: Any, logits: Any) -> None:
        self._is_on = False
        if isinstance(logits, Tensor):
            self._logits = tuple(logits.shape)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._is_on:
            if time.monotonic() > self._deadline_s:
                raise TooLongError(f"its forward takes more than {self._limit_s:g} s to trace.")
            outputs = tensors_in(out)
            if outputs:
                self._see(tensors_in((args, kwargs)), outputs, is_choice=func in _CHOICES)
        return out

    def _see(self, inputs: list[Tensor], outputs: list[Tensor], *, is_choice: bool) -> None:
        self._kept += [inputs, outputs]
        made_of = [self._made_of.get(_storage(tensor)) for tensor in inputs]
        activations = [tensor for tensor, names in zip(inputs, made_of, strict=True) if names is None]
        parameters = frozenset().union(*(names for names in made_of if names))
        is_experts = is_choice and bool(parameters) and inputs[0].dim() > 2  # an expert's weight is a weight
        if not activations or is_experts:
            for tensor in outputs:
                self._made_of.setdefault(_storage(tensor), parameters)
        elif parameters:
            given = [(tensor.dim(), names) for tensor, names in zip(inputs, made_of, strict=True) if names]
            most, giver = max(given, key=lambda pair: pair[0])  # of a weight and its bias, the weight
            biases = frozenset().union(*(names for dims, names in given if dims == 1 < most)) - giver
            self._meet(parameters - biases, activations)
            self._meet(biases, outputs)  # what a matmul is given to add to what it makes
            for tensor in outputs:
                self._given_by[_storage(tensor)] = min(giver)
        else:
            givers = {self._given_by.get(_storage(tensor)) for tensor in activations} - {None}
            if len(givers) == 1:
                self._pass_on(givers.pop() or "", activations, outputs)

    def _meet(self, parameters: Iterable[str], activations: list[Tensor]) -> None:
        shapes = tuple(tuple(tensor.shape) for tensor in activations)
        of_dtensors = any(isinstance(tensor, DTensor) for tensor in activations)
        self._meetings += [Meeting(name, shapes, of_dtensors) for name in sorted(parameters)]

    def _pass_on(self, giver: str, activations: list[Tensor], outputs: list[Tensor]) -> None:
        if len(activations) == 1 and not isinstance(activations[0], DTensor):
            (before,) = activations
            pieces = [part for part in outputs if _is_unfolded(before, part) or _is_piece(before, part)]
            if pieces:
                shapes = tuple(tuple(piece.shape) for piece in pieces)
                self._cuts.append(Cut(giver, tuple(before.shape), shapes))
        for tensor in outputs:
            self._given_by.setdefault(_storage(tensor), giver)


def _is_unfolded(before: Tensor, after: Tensor) -> bool:
    return after.dim() > before.dim() and after.numel() == before.numel()


def _is_piece(before: Tensor, after: Tensor) -> bool:
    """Whether it is a contiguous part along one dim: every second row is none."""
    if after.dim() != before.dim() or _storage(after) != _storage(before):
        return False
    smaller = [dim for dim in range(before.dim()) if after.shape[dim] != before.shape[dim]]
    return (
        len(smaller) == 1
        and after.shape[smaller[0]] < before.shape[smaller[0]]
        and after.stride() == before.stride()
    )


def _is_cut_plainly(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and any(
        type(placement) is TorchShard for placement in parameter.placements
    )


def _storage(tensor: Tensor) -> int:
    while isinstance(tensor, DTensor | AsyncCollectiveTensor):
        tensor = local_part(tensor) if isinstance(tensor, DTensor) else tensor.elem
    return storage_key(tensor.untyped_storage())
