"""One training step of a meta model on fake tensors: weights and what is made on their device have shapes and no memory."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from shardwise.models.source import vocab_size_of
from shardwise.parallel.apply import loss_of
from shardwise.step.clipping import clip_gradients


def fake_step(model: nn.Module, mesh: DeviceMesh | None, *, batch: int, seq: int) -> None:
    """Forward, loss, backward, clipping, AdamW; twice on a mesh, since DTensor's first step differs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _make_fake(model, mode)
    parameters = list(model.parameters())
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    # a fused optimizer takes no mixture of DTensors and plain tensors
    optimizer = torch.optim.AdamW([{"params": group} for group in (sharded, plain) if group], lr=1e-3, fused=True)
    ids = torch.randint(0, vocab_size_of(model), (batch, seq + 1))
    with _OntoDevice(mode):
        for _ in range(2 if mesh is not None else 1):
            optimizer.zero_grad(set_to_none=True)
            logits = model(ids[:, :-1])
            if logits.shape[:2] != (batch, seq):
                raise ValueError(f"logits are {tuple(logits.shape)} for ids {(batch, seq)}")
            loss_of(model)(logits, ids[:, 1:]).backward()
            clip_gradients(parameters, 1.0)
            optimizer.step()


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake CPU tensors in the places of all parameters and buffers; those that are one stay one."""
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            with mode:
                made: Tensor = torch.empty_strided(local.shape, local.stride(), dtype=local.dtype, device="cpu")
            if isinstance(tensor, DTensor):
                mesh, placements = tensor.device_mesh, tensor.placements
                made = DTensor.from_local(made, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            known[id(tensor)] = (made, tensor)
        return known[id(tensor)][0]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


class _OntoDevice(TorchFunctionMode):
    """What names its device is made there: fake. What doesn't is the host's."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self._factories = frozenset(_device_constructors())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = (*args[1:], *kwargs.values())
        if func is Tensor.to and type(args[0]) in (Tensor, nn.Parameter) and any(isinstance(item, torch.device | str) for item in given):
            dtype = next((item for item in given if isinstance(item, torch.dtype)), args[0].dtype)
            with self._mode:
                return torch.empty(args[0].shape, dtype=dtype)
        if func in self._factories and kwargs.get("device") is not None and not any(isinstance(item, Tensor) for item in args):
            with self._mode:
                return func(*args, **kwargs)
        return func(*args, **kwargs)
