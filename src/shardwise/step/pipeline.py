"""The passes of a step over a pipeline's stages: torch.distributed.pipelining's schedules, run over what
parallel/stages.py made of the model.

Token ids and labels are on every stage, so stages exchange nothing but what passes between layers, and its
gradient, of sizes that all of them know. The last part's losses are summands of the global mean. A parameter
at both ends has a part of its gradient at each: those are added up over the two.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shardwise.core.mesh import STAGES_AXIS
from shardwise.core.pipeline import Schedule
from shardwise.core.program import Phase
from shardwise.parallel.loss import Loss
from shardwise.parallel.peers import add_peers
from shardwise.parallel.stages import Stage
from shardwise.torch_private import keeps_parameters, run_micro_batches


class Passes:
    """Runs the micro-batches of a step through this rank's parts of a model. reduce_once: FSDP keeps whole
    gradients until a part's last backward. on_phase: told each phase as it begins."""

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        mesh: DeviceMesh,
        loss: Loss,
        on_phase: Callable[[Phase], None],
        *,
        reduce_once: bool = False,
    ) -> None:
        self._reduce_once = reduce_once
        self._model, self._stage, self._loss, self._on_phase = model, stage, loss, on_phase
        self.group = mesh.get_group(STAGES_AXIS)
        self._units = {part: self._units_of(part) for part in stage.parts}
        # of a layer's: what lies outside is kept after the forward in any case
        self._keeps = any(
            keeps_parameters(unit) for part in stage.parts for unit, runs in self._units[part] if runs
        )
        self._schedules: dict[tuple[int, torch.Size], Any] = {}
        self._valid: Tensor | None = None

    def run(self, ids: Sequence[Tensor], labels: Sequence[Tensor], valid: Tensor) -> Tensor:
        """ids, labels: [B, S] of each micro-batch; valid: labels that count in the global batch. Leaves
        gradients in `.grad`, and returns the sum of this rank's losses: 0 but on the last stage."""
        device = next(self._model.parameters()).device
        key = (len(ids), ids[0].shape)
        if key not in self._schedules:
            self._schedules[key] = self._schedule(len(ids), ids[0], device)
        self._valid = valid
        losses: list[Tensor] = []
        run_micro_batches(
            self._schedules[key],
            [{"ids_BS": a, "labels_BS": b} for a, b in zip(ids, labels, strict=True)],
            losses,
        )
        # losses are in float32 at least, and all stages add alike
        total = torch.zeros((), dtype=torch.promote_types(self._stage.dtype, torch.float32), device=device)
        for loss in losses:
            total = total + loss.detach()
        return total

    def run_forward(self, ids: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """Losses without gradients, summed over the labels that count: 0 but on the last stage. One
        micro-batch after the other, each through all parts."""
        stage, device = self._stage, next(self._model.parameters()).device
        total = torch.zeros((), dtype=torch.promote_types(stage.dtype, torch.float32), device=device)
        for ids_BS, labels_BS in zip(ids, labels, strict=True):
            for part in stage.parts:
                received = None
                if part > 0:
                    received = torch.empty(stage.shape(ids_BS), dtype=stage.dtype, device=device)
                    dist.recv(received, group=self.group, group_src=stage.pipeline.stage_of(part - 1))
                    received.requires_grad_()
                # with gradients, for by them a part knows what goes on to the next
                with torch.enable_grad():
                    given = stage.run(self._model, part, ids_BS, received).detach()
                if part < stage.pipeline.parts - 1:
                    dist.send(
                        given.contiguous(), group=self.group, group_dst=stage.pipeline.stage_of(part + 1)
                    )
                else:
                    total = total + self._loss(given, labels_BS, 1)
        return total

    def sum_tied(self) -> None:
        """Adds up the gradients of what both ends hold. The stages between take no part."""
        stage = self._stage
        if not stage.tied or not (stage.is_first or stage.is_last):
            return
        parameters = dict(self._model.named_parameters())
        peer = stage.pipeline.stages - 1 if stage.is_first else 0
        for name in stage.tied:
            gradient = parameters[name].grad
            if gradient is not None:
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                add_peers(local, self.group, peer, name.rpartition(".")[0], Phase.REDUCE, _TIED)

    @property
    def counted_elsewhere(self) -> frozenset[nn.Parameter]:
        """What this rank holds, and the first stage counts."""
        if not self._stage.is_last:
            return frozenset()
        parameters = dict(self._model.named_parameters())
        return frozenset(parameters[name] for name in self._stage.tied)

    def _schedule(self, micro_batches: int, ids_BS: Tensor, device: torch.device) -> Any:
        from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

        from shardwise.step.torch_part import TorchPart

        stage = self._stage
        stage.pipeline.check(micro_batches)
        shape = stage.shape(ids_BS)
        parts = [
            TorchPart(stage, part, shape, device, self.group, self._caller(part), self._around_backward)
            for part in stage.parts
        ]
        told: Any = {"loss_fn": _given, "scale_grads": False}
        match stage.pipeline.schedule:
            case Schedule.GPIPE:
                return ScheduleGPipe(parts[0], micro_batches, **told)
            case Schedule.ONE_F_ONE_B:
                return Schedule1F1B(parts[0], micro_batches, **told)
            case Schedule.INTERLEAVED:
                return ScheduleInterleaved1F1B(list(parts), micro_batches, **told)

    def _caller(self, part: int) -> Callable[..., Tensor]:
        def call(ids_BS: Tensor, labels_BS: Tensor, received: Tensor | None = None) -> Tensor:
            self._on_phase(Phase.FORWARD)
            given = self._stage.run(self._model, part, ids_BS, received)
            if part < self._stage.pipeline.parts - 1:
                return given
            self._on_phase(Phase.LOSS)
            return self._loss(given, labels_BS, self._valid)

        return call

    @contextmanager
    def _around_backward(self, part: int, is_last: bool) -> Iterator[None]:
        self._on_phase(Phase.BACKWARD)
        self._tell_units(part, is_last)
        with self._loss.backward_context():
            yield

    def _tell_units(self, part: int, is_last: bool) -> None:
        """What FSDP does in the backward that comes: whether it reduces a part's gradients, and whether it
        frees the parameters that it kept after the forward, which other micro-batches still need. What lies
        outside the layers belongs to the parts at the ends."""
        for unit, _ in self._units[part]:
            if self._reduce_once:
                unit.set_requires_gradient_sync(is_last, recurse=False)
            if self._keeps:
                unit.set_reshard_after_backward(is_last, recurse=False)

    def _units_of(self, part: int) -> list[tuple[FSDPModule, bool]]:
        """FSDP's, and whether they are the part's layers or lie in them."""
        is_end = part in (0, self._stage.pipeline.parts - 1)
        found = self._stage.units(self._model, part)
        return [(each, runs) for each, runs in found if isinstance(each, FSDPModule) and (runs or is_end)]


_TIED = (
    "The first stage and the last hold one parameter, and each found a part of its gradient: the two are "
    "added."
)


def _given(loss: Tensor, _: object) -> Tensor:
    """The last part gives its loss, so that its logits go with it."""
    return loss
