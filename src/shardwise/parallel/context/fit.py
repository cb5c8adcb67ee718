"""Whether ranks can share a model's sequences, and which of its modules attend: seen in one forward without
data, before anything is changed.

A model can where its forward takes position_ids, every attention is a call of
torch.nn.functional.scaled_dot_product_attention on the whole sequence, causal or not, without a mask of its
own, and all else takes each token by itself. In the forward that is looked at, attention is stood in for by
an op that does so too; what then still sums over the sequence, or needs all of it, is the model's.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwise.core.errors import ModelError
from shardwise.core.shown import shown
from shardwise.dims.factors import leaves
from shardwise.dims.record import Op, Record
from shardwise.dims.trace import record_of
from shardwise.models.layers import find_layers
from shardwise.models.source import vocab_size_of

ATTENTION = F.scaled_dot_product_attention
"""torch's own, before anybody stands in its place."""
POSITIONS = "position_ids"
SHORT = 8
"""Tokens of a sequence of which nobody knows yet how long it will be."""
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@contextmanager
def attention_is_torch_s() -> Iterator[None]:
    """A trace may have put another in its place, below which nothing can be caught."""
    with patch.object(F, ATTENTION.__name__, ATTENTION):
        yield


def arguments_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of a call of attention, by name; those that aren't given as they are by default."""
    default = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    return {**default, **dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}


def attending(model: nn.Module, ranks: int, seq: int) -> frozenset[type[nn.Module]]:
    """The classes of modules that call attention in sequences of `seq` tokens. model: unsharded, its
    parameters real or meta. Raises ModelError for a model whose sequences `ranks` ranks can't share."""
    fit = Fit(model, ranks)
    fit.check(seq)
    return frozenset(fit.callers)


class Fit:
    """What is known of a model, unsharded when this is made. callers: the classes of modules that attend."""

    def __init__(self, model: nn.Module, ranks: int) -> None:
        self.callers: set[type[nn.Module]] = set()
        self._where = f"{shown(type(model).__name__)} can't share its sequences among {ranks} ranks of cp"
        if POSITIONS not in inspect.signature(model.forward).parameters:
            raise ModelError(
                f"{self._where}: its forward takes no {POSITIONS}, and a rank's tokens aren't the first "
                "ones. Give it one, [B or 1, S], or use a mesh without cp."
            )
        self._empty = _without_weights(model)
        self._longest = 0

    def check(self, seq: int = SHORT) -> None:
        """Looks at sequences of `seq` tokens, unless longer ones were seen: a window shows in long ones.
        Raises ModelError for what can't be shared."""
        if seq <= self._longest:
            return
        empty, where = self._empty, self._where
        with _Attention(empty, where, seq).watching() as watch:
            try:
                record = record_of(empty, vocab_size_of(empty), seq=seq)
            except ModelError as error:
                raise watch.refusal or ModelError(f"{where}: {error}") from None
        if not watch.callers:
            raise ModelError(
                f"{where}: it never calls torch.nn.functional.scaled_dot_product_attention. Let its "
                "attention do so, or use a mesh without cp."
            )
        mixing = _mixing(record)
        if mixing is not None:
            op, why = mixing
            raise ModelError(
                f"{where}: beside attention, {op.name} in {op.module or 'the model'} needs the whole "
                f"sequence ({why}). Use a mesh without cp."
            )
        self.callers |= watch.callers
        self._longest = seq


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy with parameters on the meta device, and one layer of each kind."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    copy = deepcopy(model, memo)
    layers = find_layers(copy)
    if layers is not None:
        layers.shorten(copy, layers.kinds(copy))
    for module in copy.modules():
        if module is not copy:
            _stand_in_for_experts(module)
    return copy


def _stand_in_for_experts(module: nn.Module) -> None:
    """Experts are called with what a router chose for each token, and give each token its own: what they do
    in between is sorted by expert, and by no place in a sequence."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        if len(given) != 3 or not _are_routed(*given):
            return inner(*args, **kwargs)
        hidden, chosen, weights = given
        return hidden + weights.sum(-1, keepdim=True) + chosen.to(hidden.dtype).sum(-1, keepdim=True)

    module.forward = forward


def _are_routed(hidden: Tensor, chosen: Tensor, weights: Tensor) -> bool:
    """[N, H], and an expert's number and weight for each of a token's choices, [N, K]."""
    is_whole = not chosen.is_floating_point() and hidden.is_floating_point() and weights.is_floating_point()
    return is_whole and hidden.dim() == 2 and chosen.shape == weights.shape == (len(hidden), chosen.shape[-1])


def _mixing(record: Record) -> tuple[Op, str] | None:
    """The first op that one part of a sequence isn't enough for, and why."""
    sequence = record.sequence
    if len(sequence) != 1:
        return next((op for op in record.ops if op.inputs), Op("view", "", (), ())), "it cuts it into parts"
    for op in record.ops:
        live = {leaf for value in op.inputs if value.is_live for leaf in value.leaves()} & sequence
        for factor, why in op.blocked:
            if not live.isdisjoint(leaves(factor)):
                return op, why
        for factor in op.summed:
            if not live.isdisjoint(leaves(factor)):
                return op, "it sums over it"
    return None


class _Attention(TorchFunctionMode):
    """Stands in for attention with what takes each token by itself; books who called, refuses what can't be
    shared."""

    def __init__(self, model: nn.Module, where: str, seq: int) -> None:
        super().__init__()
        self.callers: set[type[nn.Module]] = set()
        self.refusal: ModelError | None = None
        self._model, self._where, self._seq = model, where, seq
        self._stack: list[tuple[str, nn.Module]] = []

    @contextmanager
    def watching(self) -> Iterator["_Attention"]:
        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name)))
            handles.append(module.register_forward_hook(self._left, always_call=True))
        try:
            with attention_is_torch_s(), self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not ATTENTION:
            return func(*args, **(kwargs or {}))
        given = arguments_of(args, kwargs or {})
        name, module = self._stack[-1]
        self._check(name or "the model", given)
        self.callers.add(type(module))
        query, key, value = given["query"], given["key"], given["value"]
        groups = query.shape[-3] // value.shape[-3]
        kept = value + key.sum(-1, keepdim=True)
        if groups > 1:
            kept = kept.unsqueeze(-3).expand(*kept.shape[:-2], groups, *kept.shape[-2:]).flatten(-4, -3)
        return kept + query.sum(-1, keepdim=True)

    def _check(self, module: str, given: dict[str, Any]) -> None:
        why = ""
        if given["attn_mask"] is not None:
            why = f"passes a mask of its own for {self._seq} tokens (a window?)"
        elif given["dropout_p"]:
            why = f"drops out {given['dropout_p']:g} of the attention, which ranks would each draw alone"
        elif any(given[each].shape[-2] != self._seq for each in ("query", "key")):
            why = f"isn't one over the {self._seq} tokens of a sequence"
        if why:
            self.refusal = ModelError(f"{self._where}: attention in {module} {why}. Use a mesh without cp.")
            raise self.refusal

    def _entering(self, name: str) -> Any:
        def entering(module: nn.Module, _: Any) -> None:
            self._stack.append((name, module))

        return entering

    def _left(self, *_: Any) -> None:
        self._stack.pop()
