"""What one run of the training step gives: logits, loss and gradients; and, where something is wrong, what
each module gave and got back.

It is the step that is timed (step/train.py): data-parallel ranks, micro-batches, FSDP and recompute are run
as they are there.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.core.errors import RunError
from shardwise.core.program import Phase
from shardwise.core.shown import told
from shardwise.parallel.apply import applied_to, is_applied
from shardwise.parallel.loss import DTensorLoss, PlainLoss
from shardwise.parallel.stages import stage_of
from shardwise.step.portion import MicroBatches, Portion
from shardwise.step.train import TrainStep
from shardwise.verify.held import local
from shardwise.verify.noise import NoDropout, SplitMatmuls

SEED = 0

Batch = tuple[Tensor, Tensor]
"""Ids and labels, [B, S] each."""

ALONE = Portion()


def micro_batches(batch: Batch, model: nn.Module, portion: Portion) -> MicroBatches:
    """Of a global batch. A model that isn't sharded takes ids on its device; others may want them on the
    host, for routes."""
    ids_BS, labels_BS = batch
    if not is_applied(model):
        ids_BS = ids_BS.to(next(model.parameters()).device)
    return portion.cut(ids_BS, labels_BS)


@dataclass(slots=True)
class Call:
    """One call of a module in the forward: its (first) output and the gradient that came back to it, as this
    rank has them."""

    module: str
    output: Tensor | None = None
    gradient: Tensor | None = None


@dataclass(slots=True)
class Observed:
    """logits: of this rank's portion; None on a stage of a pipeline that gives none. gradients: by parameter
    name, None where none arrived. calls: in the order in which they ended; empty unless asked for. coarsest:
    see SplitMatmuls; None unless the matmuls were split."""

    logits: Tensor | None
    loss: float
    gradients: dict[str, Tensor | None]
    calls: list[Call] = field(default_factory=list)
    coarsest: torch.dtype | None = None

    @property
    def own_logits(self) -> Tensor:
        """Of a model that isn't cut into stages."""
        assert self.logits is not None
        return self.logits


class ModuleError(RunError):
    """A run that failed, with the innermost module that was being called."""

    def __init__(self, module: str, message: str) -> None:
        super().__init__(message)
        self.module = module


class LogitsError(RunError):
    """Logits of the wrong width, which a loss would take for whole."""

    def __init__(self, width: int, whole: int) -> None:
        super().__init__(
            f"the logits are {width} wide on a rank, the unsharded model's {whole}, "
            "and the loss takes them for whole"
        )


def observe(
    model: nn.Module,
    batch: Batch,
    portion: Portion = ALONE,
    *,
    split: int = 1,
    trail: bool = False,
    width: int | None = None,
) -> Observed:
    """The gradients of one global batch, without dropout. split: see SplitMatmuls. width: of whole logits.

    Raises ModuleError with the module in which it failed, and LogitsError where a loss for whole logits gets
    a part of them.
    """
    model.zero_grad(set_to_none=True)
    torch.manual_seed(SEED)
    watch = _Watch(model, width)
    splitting = SplitMatmuls(split) if split > 1 else None
    step = TrainStep(model, mesh=portion.mesh, reduce_once=portion.reduce_once, on_phase=watch.enter_phase)
    with ExitStack() as stack:
        stack.enter_context(NoDropout())
        if splitting is not None:
            stack.enter_context(splitting)
        stack.enter_context(watch.hooked(trail=trail))
        try:
            loss = step.gradients(micro_batches(batch, model, portion))
        except LogitsError:
            raise
        except Exception as error:
            raise watch.failure(error) from error
    gradients = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    return Observed(
        portion.joined(watch.logits) if watch.logits else None,
        float(local(loss)),
        gradients,
        watch.calls,
        splitting.coarsest if splitting is not None else None,
    )


class _Watch:
    """Sees the logits, the module that is being called, and, with a trail, what each module gives and gets
    back. width: see observe()."""

    def __init__(self, model: nn.Module, width: int | None) -> None:
        self.logits: list[Tensor] = []
        self.calls: list[Call] = []
        self._model = model
        self._width = width if isinstance(applied_to(model).loss, PlainLoss | DTensorLoss) else None
        self._phase = Phase.FORWARD
        self._open: list[str] = []

    def enter_phase(self, phase: Phase) -> None:
        self._phase = phase
        self._open.clear()  # a recomputed forward ends early, and leaves its modules open

    def failure(self, error: Exception) -> ModuleError:
        if self._phase is Phase.REDUCE:
            return ModuleError("", f"what is called after the backward raised {told(error)}")
        if self._phase is not Phase.FORWARD:
            return ModuleError("", f"the backward raised {told(error)}")
        where = self._open[-1] if self._open else ""
        return ModuleError(where, f"{where or 'the model'} raised {told(error)}")

    @contextmanager
    def hooked(self, *, trail: bool) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, module in self._model.named_modules():

                def enter(*_: Any, name: str = name) -> None:
                    self._open.append(name)

                def leave(_: nn.Module, __: Any, output: object, *, name: str = name) -> None:
                    if self._phase is Phase.FORWARD:  # not in a recomputed one
                        self._open.pop()
                        if trail:
                            self._take_note(name, output)

                hooks.enter_context(module.register_forward_pre_hook(enter, prepend=True))
                hooks.enter_context(module.register_forward_hook(leave))
            hooks.enter_context(self._model.register_forward_hook(self._take_logits))
            yield

    def _take_logits(self, model: nn.Module, __: Any, logits: Tensor) -> None:
        stage = stage_of(model)
        if stage is not None and not stage.gives_logits:
            return
        if self._width is not None and logits.shape[-1] != self._width:
            raise LogitsError(int(logits.shape[-1]), self._width)
        self.logits.append(local(logits.detach()))

    def _take_note(self, name: str, output: object) -> None:
        call = Call(name)
        self.calls.append(call)
        tensor = _first_tensor(output)
        if tensor is None:
            return
        call.output = local(tensor.detach()).clone()

        def came_back(gradient: Tensor) -> None:
            call.gradient = local(gradient.detach()).clone()

        if tensor.requires_grad:
            tensor.register_hook(came_back)


def _first_tensor(output: object) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        tensors = (_first_tensor(each) for each in output)
        return next((tensor for tensor in tensors if tensor is not None), None)
    return None
