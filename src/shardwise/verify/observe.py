"""What one run of the training step gives: logits, loss and gradients; and, where something is wrong, a trail
of what each module took and gave (trail.py).

It is the step that is timed (step/train.py): data-parallel ranks, micro-batches, FSDP and recompute are run
as they are there.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.core.batch_part import padded
from shardwise.core.errors import RunError
from shardwise.core.program import AFTER_THE_BACKWARD, Phase
from shardwise.core.shown import told
from shardwise.parallel.apply import applied_to, is_applied
from shardwise.parallel.loss import DTensorLoss, PlainLoss
from shardwise.parallel.stages import stage_of
from shardwise.step.groups import mesh_of
from shardwise.step.portion import MicroBatches, Portion
from shardwise.step.train import TrainStep
from shardwise.verify.held import local
from shardwise.verify.noise import NoDropout, SplitMatmuls
from shardwise.verify.trail import NOTHING, Change, Point, Trail

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
class Observed:
    """logits: of this rank's portion; None on a stage of a pipeline that gives none. gradients: by parameter
    name, None where none arrived. points: in the order of the forward; empty unless asked for. coarsest: see
    SplitMatmuls; None unless the matmuls were split. given: what each backward gave each parameter, by name;
    empty unless asked for."""

    logits: Tensor | None
    loss: float
    gradients: dict[str, Tensor | None]
    points: list[Point] = field(default_factory=list)
    coarsest: torch.dtype | None = None
    given: dict[str, list[Tensor]] = field(default_factory=dict)

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
    change: Mapping[int, Change] = NOTHING,
) -> Observed:
    """The gradients of one global batch, without dropout. split: see SplitMatmuls. trail: with what each
    module took and gave. width: of whole logits. change: of the gradient that comes back to a point of the
    trail, by its number.

    Raises ModuleError with the module in which it failed, and LogitsError where a loss for whole logits gets
    a part of them.
    """
    model.zero_grad(set_to_none=True)
    torch.manual_seed(SEED)
    watch = _Watch(model, width, mesh_of(portion.mesh).tp if portion.mesh is not None else 1)
    marks = Trail(model, change) if trail else None
    splitting = SplitMatmuls(split) if split > 1 else None
    step = TrainStep(model, mesh=portion.mesh, reduce_once=portion.reduce_once, on_phase=watch.enter_phase)
    with ExitStack() as stack:
        stack.enter_context(NoDropout())
        if splitting is not None:
            stack.enter_context(splitting)
        stack.enter_context(watch.hooked())
        if marks is not None:
            stack.enter_context(marks.hooked(lambda: watch.phase is Phase.FORWARD))  # not in a recomputed one
        try:
            loss = step.gradients(micro_batches(batch, model, portion))
        except (LogitsError, ModuleError):
            raise
        except Exception as error:
            raise watch.failure(error) from error
    gradients = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    return Observed(
        portion.joined(watch.logits) if watch.logits else None,
        float(local(loss)),
        gradients,
        marks.points if marks is not None else [],
        splitting.coarsest if splitting is not None else None,
        marks.given if marks is not None else {},
    )


class _Watch:
    """Sees the logits, and the module that is being called. width: see observe(). tp: ranks."""

    def __init__(self, model: nn.Module, width: int | None, tp: int) -> None:
        self._tp = tp
        self.logits: list[Tensor] = []
        self._model = model
        self._width = width if isinstance(applied_to(model).loss, PlainLoss | DTensorLoss) else None
        self.phase = Phase.FORWARD
        self._open: list[str] = []

    def enter_phase(self, phase: Phase) -> None:
        self.phase = phase
        self._open.clear()  # a recomputed forward ends early, and leaves its modules open

    def failure(self, error: Exception) -> ModuleError:
        if self.phase is Phase.REDUCE:
            return ModuleError("", f"{AFTER_THE_BACKWARD} raised {told(error)}")
        if self.phase is not Phase.FORWARD:
            return ModuleError("", f"the backward raised {told(error)}")
        where = self._open[-1] if self._open else ""
        return ModuleError(where, f"{where or 'the model'} raised {told(error)}")

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, module in self._model.named_modules():

                def enter(*_: Any, name: str = name) -> None:
                    self._open.append(name)

                def leave(*_: Any) -> None:
                    if self.phase is Phase.FORWARD:  # not in a recomputed one
                        self._open.pop()

                hooks.enter_context(module.register_forward_pre_hook(enter, prepend=True))
                hooks.enter_context(module.register_forward_hook(leave))
            hooks.enter_context(self._model.register_forward_hook(self._take_logits))
            yield

    def _take_logits(self, model: nn.Module, given: Any, logits: Tensor) -> None:
        stage = stage_of(model)
        if stage is not None and not stage.gives_logits:
            return
        ids = next((each for each in given if isinstance(each, Tensor) and each.dim() > 1), None)
        why = padded(ids.shape[1], logits.shape[1], self._tp) if ids is not None else ""
        if why:
            raise ModuleError("", why)
        if self._width is not None and logits.shape[-1] != self._width:
            raise LogitsError(int(logits.shape[-1]), self._width)
        self.logits.append(local(logits.detach()))
