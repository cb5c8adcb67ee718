"""Whole numbers that a trace knows though its tensors are fake: positions and lengths, which are made of
sizes alone. Code that decides by them (a rotary table that must reach the largest position) gets the true
one. What data, or another rank, would tell stays unknown.

Numbers that ranks exchange to agree on something (how many of them have a gradient, how many tokens come) are
taken to be alike on all ranks: a fake process group leaves tensors as they are.
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
        if signature.is_collective:
            self._agree(signature.name, args)
            return
        outputs = tensors_in(out)
        if not (signature.writes and len(self._known)) and not all(map(_is_kept, outputs)):
            return
        given = tensors_in(args) + tensors_in(kwargs)
        if not outputs or not self._is_knowable(signature, given, outputs):
            for at in signature.writes:
                for each in tensors_in(args[at] if at < len(args) else None):
                    self._forget(each)
            return
        with torch.no_grad():
            real = func(*self._real(args), **(self._real(dict(kwargs)) | _on_host(kwargs)))
        if not signature.writes:
            for each, value in zip(outputs, tensors_in(real), strict=True):
                self._known[each] = value

    def _agree(self, name: str, args: Sequence[Any]) -> None:
        """Ranks are taken to be alike: a sum is what one has times their number, and in an all-to-all of even
        parts every rank sends what this one would send to this one."""
        tensors = tensors_in(args)
        groups = [each for each in args if isinstance(each, torch.ScriptObject)]
        if name == "c10d::allreduce_" and is_sum(groups[1]):
            for each in tensors:
                if self._is_known(each):
                    self._real(each).mul_(dist.ProcessGroup.unbox(groups[0]).size())
        elif name == "c10d::alltoall_base_" and not args[3] and not args[4]:
            to, sent = tensors
            if self._is_known(sent):
                group = dist.ProcessGroup.unbox(groups[0])
                own = self._real(sent).chunk(group.size())[group.rank()]
                come = torch.cat([own] * group.size())
                if isinstance(to, FakeTensor):
                    self._known[to] = come
                else:
                    to.copy_(come)
        else:
            for each in tensors:
                self._forget(each)

    def _is_known(self, tensor: Tensor) -> bool:
        """A real one is: it was made on the host."""
        return not isinstance(tensor, FakeTensor) or tensor in self._known

    def _is_knowable(self, signature: Signature, given: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        return (
            all(map(_is_kept, outputs))
            and signature.name not in _EMPTY
            and _RANDOM not in signature.tags
            and all(map(self._is_known, given))
        )

    def _forget(self, tensor: Tensor) -> None:
        """It, and all that is of its memory."""
        if tensor not in self._known:
            return
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
            return self._known[given] if isinstance(given, FakeTensor) else given
        if isinstance(given, dict):
            return {key: self._real(value) for key, value in given.items()}
        if isinstance(given, (list, tuple)):
            return type(given)(self._real(each) for each in given)
        return given


def _is_kept(out: Any) -> bool:
    return isinstance(out, FakeTensor) and out.dtype in _KINDS and out.numel() <= MOST_ELEMENTS


def _on_host(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
