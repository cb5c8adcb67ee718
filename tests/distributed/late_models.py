"""Models whose fault, or what can't be told of them, shows beside the gradients of one batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


class Plain(nn.Module):
    """long: only sequences of more than 20 tokens take it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(48, 16)
        self.long = nn.Linear(16, 16)
        self.up = nn.Linear(16, 16)
        self.head = nn.Linear(16, 48)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x = self.words(ids_BS)
        if ids_BS.shape[1] > 20:
            x = x + self.long(x)
        given: Tensor = self.head(x + torch.tanh(self.up(x)))
        return given


def not_taken(mesh: DeviceMesh | None = None) -> nn.Module:
    """A wrong gradient in the branch that short sequences don't take."""
    model = Plain()
    if mesh is not None:
        model.long.weight.register_hook(lambda gradient: 2 * gradient)
    return model


def shorter(mesh: DeviceMesh | None = None) -> nn.Module:
    """Whatever dtype is asked for."""
    return Plain().to(torch.bfloat16)


def raises_alone(mesh: DeviceMesh | None = None) -> nn.Module:
    """On the second rank, sharded or not."""
    model = Plain()
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
        model.up.register_forward_pre_hook(_fail)
    return model


def _fail(*_: object) -> None:
    raise ValueError("only on this rank")


def trained_when_sharded(mesh: DeviceMesh | None = None) -> nn.Module:
    model = Plain()
    if mesh is None:
        model.up.bias.requires_grad_(False)
    return model


def wrong_in_the_last_step(mesh: DeviceMesh | None = None) -> nn.Module:
    """The first backwards are right: of the two batches that are compared, and of the first step."""
    model = Plain()
    if mesh is not None:
        model.up.weight.register_hook(_doubled_after(3))
    return model


def _doubled_after(backwards: int) -> Callable[[Tensor], Tensor]:
    seen = [0]

    def hook(gradient: Tensor) -> Tensor:
        seen[0] += 1
        return gradient * 2 if seen[0] > backwards else gradient

    return hook


def slightly_off(mesh: DeviceMesh | None = None) -> nn.Module:
    model = Plain()
    if mesh is not None:
        model.up.weight.register_hook(lambda gradient: gradient * (1 + 1e-6))
    return model
