"""Whole numbers that a trace knows though its tensors are fake: positions and lengths, which are made of
sizes alone. Code that decides by them (a rotary table that must reach the largest position) gets the true
one. What data, or another rank, would tell stays unknown.

Real tensors that ranks exchange to agree on something (how many of them have a gradient) are summed as if all
ranks were alike: a fake process group leaves them as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from shardwise.parallel.recorder import tensors_in
from shardwise.torch_private import FakeTensor, is_sum
from shardwise.trace.ops import Signature

MOST_ELEMENTS = 1 << 20
_KINDS = frozenset({torch.int64, torch.int32, torch.bool})
_RANDOM = "nondeterministic_seeded"
# memory that holds nothing yet
_EMPTY = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)


class Values:
    """What is known of fake tensors, as long as they live. A view's value is a view of the value."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def read(self, func: Any, args: Sequence[Any]) -> Any:
        """The number that code asks a tensor for; None where it isn't known."""
        if func is not torch.ops.aten._local_scalar_dense.default or args[0] not in self._known:
            return None
        return self._known[args[0]].item()

    def follow(
        self, func: Any, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        """What an op that has run makes known, or unknown."""
        if signature.name == "c10d::allreduce_":
            _sum_alike(args)
        if not (signature.writes and len(self._known)) and not _is_kept(out):
            return
        given = tensors_in(args) + tensors_in(kwargs)
        written = [
            each
            for at in signature.writes
            if at < len(args)
            for each in tensors_in(args[at])
            if each in self._known
        ]
        if not self._is_knowable(signature, given, out):
            for each in written:
                self._forget(each)
            return
        with torch.no_grad():
            real = func(*self._real(args), **(self._real(dict(kwargs)) | _on_host(kwargs)))
        if not signature.writes:
            self._known[out] = real

    def _is_knowable(self, signature: Signature, given: Sequence[Tensor], out: Any) -> bool:
        return (
            _is_kept(out)
            and not signature.is_collective
            and signature.name not in _EMPTY
            and _RANDOM not in signature.tags
            and all(each in self._known for each in given)
        )

    def _forget(self, tensor: Tensor) -> None:
        """It, and all that is of its memory."""
        storage = self._known[tensor].untyped_storage()
        alike = [
            each
            for each, value in self._known.items()
            if value.untyped_storage().data_ptr() == storage.data_ptr()
        ]
        for each in alike:
            del self._known[each]

    def _real(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            return self._known[given]
        if isinstance(given, dict):
            return {key: self._real(value) for key, value in given.items()}
        if isinstance(given, (list, tuple)):
            return type(given)(self._real(each) for each in given)
        return given


def _is_kept(out: Any) -> bool:
    return isinstance(out, FakeTensor) and out.dtype in _KINDS and out.numel() <= MOST_ELEMENTS


def _on_host(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}


def _sum_alike(args: Sequence[Any]) -> None:
    """Of c10d's all-reduce, in place."""
    tensors = [each for each in tensors_in(args) if not isinstance(each, FakeTensor)]
    group, op = (each for each in args if isinstance(each, torch.ScriptObject))
    if tensors and is_sum(op):
        n_ranks = dist.ProcessGroup.unbox(group).size()
        for each in tensors:
            each.mul_(n_ranks)
