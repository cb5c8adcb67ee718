"""Puts context parallelism onto a model: its forward is told where this rank's tokens stand, and each
attention in it goes over whole sequences.

Modules that attend (fit.py) have torch's own attention caught while they run, a recomputed forward included;
nothing else of the model is changed. Packed documents are told as the model takes them: by `documents`, or by
position_ids that restart; ranks then tell each other theirs.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from shardwise.core.batch_part import BatchPart, part_of_batch
from shardwise.core.collective import Origin
from shardwise.core.errors import ModelError
from shardwise.core.mesh import CONTEXT_AXIS, Mesh
from shardwise.core.placement import Replicate, Shard
from shardwise.core.plan import ContextAttention, ReduceScatter
from shardwise.parallel.axis import Axis
from shardwise.parallel.context.asked import Asked
from shardwise.parallel.context.fit import ATTENTION, POSITIONS, Fit, arguments_of, attention_is_torch_s
from shardwise.parallel.context.gather import gathered_attention
from shardwise.parallel.context.ring import ring_attention
from shardwise.parallel.exchanges import gather_now
from shardwise.parallel.own_forward import wrap
from shardwise.torch_private import is_dispatching

_WAYS: dict[ContextAttention, Callable[[Tensor, Tensor, Tensor, Asked], Tensor]] = {
    ContextAttention.GATHER: gathered_attention,
    ContextAttention.RING: ring_attention,
}
_DOCUMENTS, _MAKES_MASKS = "documents", "makes_masks"


@dataclass(slots=True, eq=False)
class Sharing:
    """A model's sequences, shared over an axis. masks: of the documents of the last forward, whether it is
    causal too or not; empty where a sequence is one text."""

    axis: Axis
    way: ContextAttention
    fit: Fit
    masks: dict[bool, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> list[BatchPart]:
        """What each rank has of a sequence."""
        mesh = Mesh(((CONTEXT_AXIS, self.axis.size),))
        return [part_of_batch(mesh, rank) for rank in range(self.axis.size)]

    def install(self, model: nn.Module) -> None:
        """Changes the forwards of the model and of its modules that attend."""
        takes = inspect.signature(model.forward).parameters
        for name, module in model.named_modules():
            if type(module) in self.fit.callers:
                _catch(module, self, Origin(name, None, Shard(2), Replicate()))

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            if not given:
                raise ModelError("the model is called without a tensor, whose tokens this rank would have.")
            if not is_dispatching():  # what records a step has seen to it before
                self.fit.check(given[0].shape[1] * self.axis.size)
            documents, positions = kwargs.pop(_DOCUMENTS, None), kwargs.pop(POSITIONS, None)
            if documents is None and positions is not None:
                documents = self._restarts(positions)
            if positions is None:
                positions = self._positions(given[0])
            self.masks = {} if documents is None else self._masks(documents.to(_device_of(model)))
            if _MAKES_MASKS in takes:
                kwargs[_MAKES_MASKS] = False
            return inner(*args, **kwargs, **{POSITIONS: positions})

        wrap(model, around)

    def attend(self, origin: Origin, given: dict[str, Any]) -> Tensor:
        """A call of torch's attention, over whole sequences. Raises ModelError for what can't be."""
        query, key, value = given["query"], given["key"], given["value"]
        if given["attn_mask"] is not None or given["dropout_p"]:
            what = "a mask made of this rank's tokens" if given["dropout_p"] == 0 else "dropout"
            raise ModelError(f"{origin.module}: attention has {what}, and cp shares its sequences.")
        if any(isinstance(each, DTensor) for each in (query, key, value)) or query.dim() != 4:
            raise ModelError(
                f"{origin.module}: cp wants queries, keys and values as local tensors [B, N, S, D], not "
                f"{type(query).__name__} {list(query.shape)}."
            )
        scale = given["scale"] if given["scale"] is not None else query.shape[-1] ** -0.5
        is_causal = bool(given["is_causal"])
        asked = Asked(self.axis, origin, scale, is_causal, self.masks.get(is_causal))
        return _WAYS[self.way](query, key, value, asked)

    def _positions(self, ids_BS: Tensor) -> Tensor:
        """Of this rank's tokens, [1, S]."""
        return self._places(ids_BS.shape[1], ids_BS.device)[self.axis.rank : self.axis.rank + 1]

    def _places(self, length: int, device: torch.device) -> Tensor:
        """The place in its sequence of every rank's tokens, [ranks, length]."""
        seq = length * self.axis.size
        return torch.stack(
            [
                torch.cat([torch.arange(part.start, part.stop, device=device) for part in rank.tokens(seq)])
                for rank in self.ranks
            ]
        )

    def _restarts(self, positions: Tensor) -> Tensor | None:
        """The document of each of this rank's tokens, where positions restart somewhere in a sequence; [B,
        S]."""
        length = positions.shape[1]
        held = self._all(positions)
        order = self._places(length, positions.device).flatten().argsort()
        whole = held.flatten(1)[:, order]
        documents = (whole.diff(dim=1, prepend=whole[:, :1] - 1) != 1).cumsum(1)
        if not bool(documents[:, -1].any()):
            return None
        own = self._places(length, positions.device)[self.axis.rank]
        return documents[:, own]

    def _all(self, own_BS: Tensor) -> Tensor:
        """Numbers of all ranks' tokens, [B, ranks, S]."""
        origin = Origin("", None, Shard(1), Replicate())
        return gather_now(own_BS.contiguous()[None], 0, self.axis, self.axis.size, origin).movedim(0, 1)

    def _masks(self, documents: Tensor) -> dict[bool, Tensor]:
        """What a query sees: keys of its own document; and those that come later not."""
        places = self._places(documents.shape[1], documents.device)
        is_own = documents[:, :, None, None] == self._all(documents)[:, None]
        is_before = places[self.axis.rank][:, None, None] >= places
        return {False: is_own[:, None], True: (is_own & is_before)[:, None]}


def sharing_of(
    model: nn.Module,
    mesh: DeviceMesh,
    way: ContextAttention = ContextAttention.GATHER,
    reduce_scatter: ReduceScatter = ReduceScatter.AUTO,
) -> Sharing | None:
    """How an unsharded model's sequences are shared on a mesh; None where they aren't. Raises ModelError for
    a model that can't be shared."""
    names = mesh.mesh_dim_names or ()
    if CONTEXT_AXIS not in names or mesh[CONTEXT_AXIS].size() == 1:
        return None
    axis = Axis.of(mesh, CONTEXT_AXIS, reduce_scatter)
    fit = Fit(model, axis.size)
    fit.check()
    return Sharing(axis, way, fit)


class _Catch(TorchFunctionMode):
    """Takes torch's own attention for a module."""

    def __init__(self, sharing: Sharing, origin: Origin) -> None:
        super().__init__()
        self._sharing, self._origin = sharing, origin

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ATTENTION:
            return self._sharing.attend(self._origin, arguments_of(args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _catch(module: nn.Module, sharing: Sharing, origin: Origin) -> None:
    def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with attention_is_torch_s(), _Catch(sharing, origin):
            return inner(*args, **kwargs)

    wrap(module, around)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
