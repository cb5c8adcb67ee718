"""What one run of a model gives: its logits, loss and gradients; and, where something is wrong, what each module gave and got back."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.core.errors import RunError
from shardwise.core.shown import told
from shardwise.parallel.apply import loss_of
from shardwise.parallel.loss import DTensorLoss, PlainLoss
from shardwise.verify.noise import NoDropout, SplitMatmuls

SEED = 0


@dataclass(slots=True)
class Call:
    """One call of a module: its (first) output and the gradient that came back to it, as this rank has them."""

    module: str
    output: Tensor | None = None
    gradient: Tensor | None = None


@dataclass(slots=True)
class Observed:
    """gradients: by parameter name, None where none arrived. calls: in the order in which they ended; empty unless asked for.

    coarsest: see SplitMatmuls; None unless the matmuls were split.
    """

    logits: Tensor
    loss: float
    gradients: dict[str, Tensor | None]
    calls: list[Call] = field(default_factory=list)
    coarsest: torch.dtype | None = None


def observe(
    model: nn.Module,
    ids_BS: Tensor,
    labels_BS: Tensor,
    *,
    split: int = 1,
    trail: bool = False,
    width: int | None = None,
) -> Observed:
    """One forward and backward, without dropout. split: see SplitMatmuls. width: of whole logits.

    Raises ModuleError with the module in which it failed, and LogitsError where a loss for whole logits gets a part of them.
    """
    model.zero_grad(set_to_none=True)
    torch.manual_seed(SEED)
    calls: list[Call] = []
    loss_function = loss_of(model)
    splitting = SplitMatmuls(split) if split > 1 else None
    with ExitStack() as stack:
        stack.enter_context(NoDropout())
        if splitting is not None:
            stack.enter_context(splitting)
        if trail:
            stack.enter_context(_recorded(model, calls))
        with _named(model):
            logits = model(ids_BS)
        if (
            width is not None
            and logits.shape[-1] != width
            and isinstance(loss_function, PlainLoss | DTensorLoss)
        ):
            raise LogitsError(int(logits.shape[-1]), width)
        try:
            loss = loss_function(logits, labels_BS)
            with loss_function.backward_context():
                loss.backward()
        except Exception as error:
            raise ModuleError("", f"the backward raised {told(error)}") from error
    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return Observed(
        local(logits.detach()),
        float(local(loss.detach())),
        gradients,
        calls,
        splitting.coarsest if splitting is not None else None,
    )


class ModuleError(RunError):
    """A run that failed, with the innermost module that was being called."""

    def __init__(self, module: str, message: str) -> None:
        super().__init__(message)
        self.module = module


class LogitsError(RunError):
    """Logits of the wrong width, which a loss would take for whole."""

    def __init__(self, width: int, whole: int) -> None:
        super().__init__(
            f"the logits are {width} wide on a rank, the unsharded model's {whole}, and the loss takes them for whole"
        )


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _named(model: nn.Module) -> Iterator[None]:
    """What a forward raises becomes a ModuleError."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():

        def enter(*_: Any, name: str = name) -> None:
            stack.append(name)

        def leave(*_: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    except Exception as error:
        where = stack[-1] if stack else ""
        raise ModuleError(where, f"{where or 'the model'} raised {told(error)}") from error
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recorded(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():

        def seen(_: nn.Module, __: Any, output: object, *, name: str = name) -> None:
            call = Call(name)
            calls.append(call)
            tensor = _first_tensor(output)
            if tensor is not None:
                call.output = local(tensor.detach()).clone()
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: _keep(call, gradient))

        handles.append(module.register_forward_hook(seen))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(call: Call, gradient: Tensor) -> None:
    call.gradient = local(gradient.detach()).clone()


def _first_tensor(output: object) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        return next((found for found in map(_first_tensor, output) if found is not None), None)
    return None
