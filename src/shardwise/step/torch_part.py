"""One part of a model as torch.distributed.pipelining's schedules call it.

What differs from torch's own PipelineStage: shapes are known, so nothing is asked of other stages before the
first step; memory for what comes is taken when it is awaited and given back after its backward, not held for
all micro-batches; errors are those of the model. To be imported where a mesh has stages only: torch's package
takes long to load.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from shardwise.core.program import Phase
from shardwise.parallel.peers import tell
from shardwise.parallel.stages import Stage


class TorchPart(PipelineStage):
    """Part `part` of a stage's model. call: (ids, labels, received) -> what the part gives: the loss of the
    last one. around_backward: what a backward runs in; told whether it is the part's last of the step."""

    def __init__(
        self,
        stage: Stage,
        part: int,
        shape: tuple[int, ...],
        device: torch.device,
        group: dist.ProcessGroup,
        call: Callable[..., Tensor],
        around_backward: Callable[[int, bool], AbstractContextManager[None]],
    ) -> None:
        parts = stage.pipeline.parts
        passed = torch.empty(shape, dtype=stage.dtype, device="meta", requires_grad=True)
        given = passed if part < parts - 1 else torch.empty((), device="meta", requires_grad=True)
        super().__init__(
            _Called(call), part, parts, device,
            input_args=() if part == 0 else (passed,), output_args=(given,), group=group,
        )  # fmt: skip
        self._stage, self._around_backward = stage, around_backward

    # nothing is asked of other stages: all know the shapes

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        return torch.ones(1)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.ones(1)

    # memory for what comes

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_memory():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_memory():
            return super()._prepare_backward_infra(*args, **kwargs)

    def _make_room(self, infos: tuple[Any, ...]) -> None:
        for info in infos:
            if not info.is_root_arg:
                meta = info.tensor_meta
                info.buffer = torch.empty(tuple(meta.shape), dtype=meta.dtype, device=self.device)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._make_room(self.args_recv_info[fwd_chunk_id])
        return self._told(super().get_fwd_recv_ops(fwd_chunk_id), self.stage_index - 1, "recv")

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_last:
            self._make_room(self.grad_recv_info[bwd_chunk_id])
        return self._told(super().get_bwd_recv_ops(bwd_chunk_id), self.stage_index, "recv back")

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._told(super().get_fwd_send_ops(fwd_chunk_id), self.stage_index, "send")

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._told(super().get_bwd_send_ops(bwd_chunk_id), self.stage_index - 1, "send back")

    def _told(self, ops: list[dist.P2POp], giver: int, way: str) -> list[dist.P2POp]:
        """giver: the part whose last layer's output, or its gradient, travels."""
        pipeline = self._stage.pipeline
        here, there = pipeline.stage_of(giver), pipeline.stage_of(giver + 1)
        layer = self._stage.last_layer(giver)
        words = {
            "send": f"Stage {there} needs what {layer}, stage {here}'s last layer, gives.",
            "recv": f"Stage {there} goes on from what {layer}, stage {here}'s last layer, gave.",
            "send back": f"Stage {here} needs the gradient of what its last layer, {layer}, gave.",
            "recv back": f"Stage {there} found the gradient of what stage {here}'s last layer, {layer}, "
            "gave.",
        }[way]
        if pipeline.chunks > 1:
            words = words.replace("last layer", f"last layer of chunk {giver // pipeline.stages}")
        phase = Phase.BACKWARD if "back" in way else Phase.FORWARD
        for op in ops:
            tell(op.tensor, layer, phase, words)
        return ops

    # calls

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().forward_one_chunk(*args, **kwargs)
        except RuntimeError as error:
            raise error.__cause__ or error from None  # torch's own words around it name tensors alone

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        try:
            with self._around_backward(self.stage_index, last_backward):
                super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        except RuntimeError as error:
            raise error.__cause__ or error from None
        for info in (*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info[bwd_chunk_id]):
            info.buffer = None


class _Called(nn.Module):
    """A function as the module that torch's stages want. Its model's parameters aren't its own: FSDP and
    gradients are the step's affair."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self._call = call

    def forward(self, *received: Tensor, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        return self._call(ids_BS, labels_BS, *received)
