"""What is planted in a step on a mesh, a fault or something harmless; axis_mutants.py says in which and why.

Each is a function that gives a context: while it lasts, what runs is another. A step of one process, which
has nothing to sum, is left alone.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from shardwise.parallel.experts import combined, route_to_experts
from shardwise.parallel.stages import Stage
from shardwise.parallel.styles import experts
from shardwise.step import build, clipping, gradient_sums, pipeline, train
from shardwise.step.clipping import clip_gradients
from shardwise.step.gradient_sums import GradientSums
from shardwise.step.train import TrainStep, shard_with_fsdp

MicroBatches = Sequence[tuple[Tensor, Tensor]]
Plant = Callable[[], AbstractContextManager[object]]
Change = Callable[[Tensor, "Groups"], Tensor]


class Groups:
    """The process groups of a step, by axis."""

    def __init__(self, step: TrainStep) -> None:
        assert step._sums is not None
        self._groups = step._sums.groups

    def along(self, axis: str) -> dist.ProcessGroup:
        return self._groups[(axis,)]


def planted(owner: Any, name: str, value: Any) -> Plant:
    return lambda: patch.object(owner, name, value)


def around_gradients(
    change: Callable[[TrainStep, MicroBatches, Callable[[MicroBatches], Tensor]], Tensor],
) -> Plant:
    """change: of the sharded step's gradients(): (step, its micro-batches, what runs them) -> loss."""
    right = TrainStep.gradients

    def gradients(step: TrainStep, micro_batches: MicroBatches) -> Tensor:
        if step._sums is None:
            return right(step, micro_batches)
        return change(step, micro_batches, lambda given: right(step, given))

    return planted(TrainStep, "gradients", gradients)


class _Skips:
    """torch.distributed, less some of its all-reduces."""

    def __init__(self, skips: Callable[[int], bool]) -> None:
        self._skips, self._number = skips, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, *args: Any, **kwargs: Any) -> None:
        self._number += 1
        if not self._skips(self._number - 1):
            dist.all_reduce(*args, **kwargs)


# --------------------------------------------------------------------------------------------- gradients


def unsummed(axes: tuple[str, ...], name: str = "") -> Plant:
    """The step doesn't sum over these axes: one parameter's gradient, or all."""
    right = GradientSums.axes_of

    def plant() -> AbstractContextManager[object]:
        meant: list[nn.Parameter | None] = [None]

        def gradients(step: TrainStep, micro_batches: MicroBatches, run: Any) -> Tensor:
            meant[0] = dict(step.model.named_parameters()).get(name)
            loss: Tensor = run(micro_batches)
            return loss

        def axes_of(sums: GradientSums, parameter: Tensor) -> tuple[str, ...]:
            is_meant = not name or parameter is meant[0]
            return tuple(axis for axis in right(sums, parameter) if not (is_meant and axis in axes))

        stack = ExitStack()
        stack.enter_context(around_gradients(gradients)())
        stack.enter_context(patch.object(GradientSums, "axes_of", axes_of))
        return stack

    return plant


def sums_reversed() -> Plant:
    right = GradientSums.sum

    def turned(sums: GradientSums, parameters: Iterable[nn.Parameter], *more: Any) -> None:
        right(sums, list(parameters)[::-1], *more)

    return planted(GradientSums, "sum", turned)


def summed_by_a_gather() -> Plant:
    def gathered(parts: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        for part in parts:
            every = [torch.empty_like(part) for _ in range(group.size())]
            dist.all_gather(every, part.contiguous(), group=group)
            part.copy_(torch.stack(every).sum(0))

    return planted(gradient_sums, "_sum_flattened", gathered)


def changed(name: str, change: Change) -> Plant:
    """What this rank has of a parameter's gradient is another, when all is summed."""

    def gradients(step: TrainStep, micro_batches: MicroBatches, run: Any) -> Tensor:
        loss: Tensor = run(micro_batches)
        gradient = _gradient(step, name)
        if gradient is not None:
            with torch.no_grad():
                gradient.copy_(change(gradient, Groups(step)))
        return loss

    return around_gradients(gradients)


def _gradient(step: TrainStep, name: str) -> Tensor | None:
    """Of a parameter, this rank's part; None where another stage has it."""
    parameter = dict(step.model.named_parameters()).get(name)
    gradient = parameter.grad if parameter is not None else None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def times(factor: float) -> Change:
    return lambda gradient, _: factor * gradient


def summed_over(axis: str) -> Change:
    def change(gradient: Tensor, groups: Groups) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=groups.along(axis))
        return total

    return change


def of_the_next(axis: str) -> Change:
    def change(gradient: Tensor, groups: Groups) -> Tensor:
        group = groups.along(axis)
        parts = [torch.empty_like(gradient) for _ in range(group.size())]
        dist.all_gather(parts, gradient.contiguous(), group=group)
        return parts[(group.rank() + 1) % group.size()]

    return change


def zero_on_the_last(name: str) -> Plant:
    def change(gradient: Tensor, _: Groups) -> Tensor:
        return torch.zeros_like(gradient) if dist.get_rank() == dist.get_world_size() - 1 else gradient

    return changed(name, change)


def not_reduced(name: str) -> Plant:
    """What a plan's styles sum over tp at the end of the backward stays a part."""
    from benchmarks.mutants import not_reduced as of_plan

    return of_plan(name)


def fsdp_averages() -> Plant:
    right = FSDPModule.set_gradient_divide_factor
    return planted(
        FSDPModule, "set_gradient_divide_factor", lambda module, factor: right(module, 2.0 * factor)
    )


def left_out_of_fsdp(name: str) -> Plant:
    right, right_shard = shard_with_fsdp, fully_shard

    def shard(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        own = {each for each_name, each in model.named_parameters() if each_name == name}

        def without(module: nn.Module, **more: Any) -> Any:
            return right_shard(module, ignored_params=own, **more)

        with patch.object(train, "fully_shard", without):
            right(model, *args, **kwargs)

    return planted(build, "shard_with_fsdp", shard)


# ----------------------------------------------------------------------------------------- losses and norms


def all_labels_count() -> Plant:
    def gradients(step: TrainStep, micro_batches: MicroBatches, run: Any) -> Tensor:
        with patch.object(train, "count_valid", lambda labels: labels.new_tensor(labels.numel())):
            loss: Tensor = run(micro_batches)
        return loss

    return around_gradients(gradients)


def valid_not_summed() -> Plant:
    """The first all-reduce of a step counts what is valid on all ranks."""

    def gradients(step: TrainStep, micro_batches: MicroBatches, run: Any) -> Tensor:
        with patch.object(train, "dist", _Skips(lambda number: number == 0)):
            loss: Tensor = run(micro_batches)
        return loss

    return around_gradients(gradients)


def labels_of_the_next() -> Plant:
    def gradients(step: TrainStep, micro_batches: MicroBatches, run: Any) -> Tensor:
        group = step._tokens
        assert group is not None
        changed = []
        for ids, labels in micro_batches:
            every = [torch.empty_like(labels) for _ in range(group.size())]
            dist.all_gather(every, labels.contiguous(), group=group)
            changed.append((ids, every[(group.rank() + 1) % group.size()]))
        loss: Tensor = run(changed)
        return loss

    return around_gradients(gradients)


def labels_rolled() -> Plant:
    def gradients(step: TrainStep, micro_batches: MicroBatches, run: Any) -> Tensor:
        loss: Tensor = run([(ids, ids.roll(-1, 1).to(labels.device)) for ids, labels in micro_batches])
        return loss

    return around_gradients(gradients)


def norm_not_summed() -> Plant:
    return planted(clipping, "dist", _Skips(lambda _: True))


def counted_on_each_rank() -> Plant:
    return planted(clipping, "_counts_here", lambda *_: True)


# --------------------------------------------------------------------------------------------- experts


def next_expert() -> Plant:
    right = route_to_experts
    return planted(
        experts,
        "route_to_experts",
        lambda index, n_experts, *rest: right((index + 1) % n_experts, n_experts, *rest),
    )


def _combined(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Plant:
    right = combined
    return planted(experts, "combined", lambda *given: right(*change(*given)))


def last_choice_dropped() -> Plant:
    def change(rows: Tensor, expand: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = torch.ones_like(weights)
        kept[:, -1] = 0
        return rows, expand, weights * kept

    return _combined(change)


def unweighted() -> Plant:
    return _combined(lambda rows, expand, weights: (rows, expand, 0 * weights + 1 / weights.shape[1]))


def swapped_back() -> Plant:
    return _combined(lambda rows, expand, weights: (rows, expand.roll(1, 0), weights))


def no_gradient_to_experts() -> Plant:
    right = experts._Shared._computed
    return planted(experts._Shared, "_computed", lambda *given: right(*given).detach())


# ---------------------------------------------------------------------------------------------- stages


def tied_not_summed() -> Plant:
    return planted(pipeline.Passes, "sum_tied", lambda _: None)


def tied_summed_twice() -> Plant:
    right = pipeline.Passes.sum_tied

    def twice(passes: pipeline.Passes) -> None:
        right(passes)
        right(passes)

    return planted(pipeline.Passes, "sum_tied", twice)


def tied_counted_twice() -> Plant:
    return planted(pipeline.Passes, "counted_elsewhere", frozenset())


def norm_of_a_stage() -> Plant:
    right = clip_gradients

    def clip(parameters: Any, max_norm: float, **given: Any) -> Tensor:
        return right(parameters, max_norm, **given | {"stages": None})

    return planted(train, "clip_gradients", clip)


def loss_of_each_micro_batch() -> Plant:
    right = pipeline.Passes.run
    return planted(
        pipeline.Passes,
        "run",
        lambda passes, ids, labels, valid: right(passes, ids, labels, valid / len(ids)),
    )


def layer_twice() -> Plant:
    right = Stage.run

    def again(stage: Stage, model: nn.Module, part: int, ids: Tensor, received: Tensor | None) -> Tensor:
        layer = model.get_submodule(stage.last_layer(part))
        once = layer.forward
        with patch.object(layer, "forward", lambda hidden, *rest: once(once(hidden, *rest), *rest)):
            return right(stage, model, part, ids, received)

    return planted(Stage, "run", again)


# ---------------------------------------------------------------------------------------------- sequences


def contiguous_positions() -> Plant:
    def places(_: Any, length: int, device: torch.device) -> Tensor:
        return torch.arange(length * dist.get_world_size(), device=device).view(-1, length)

    return lambda: patch("shardwise.parallel.context.share.Sharing._places", places)


def positions_from_0() -> Plant:
    def positions(_: Any, ids_BS: Tensor) -> Tensor:
        return torch.arange(ids_BS.shape[1], device=ids_BS.device)[None]

    return lambda: patch("shardwise.parallel.context.share.Sharing._positions", positions)


def own_keys_only() -> Plant:
    def blocks(q: Tensor, asked: Any) -> list[Any]:
        from shardwise.parallel.context.blocks import block_of

        rank = asked.axis.rank
        return [block_of(rank, rank, q.shape[-2], is_causal=asked.is_causal)]

    return lambda: patch("shardwise.parallel.context.gather._blocks", blocks)


def gradients_of_keys_kept() -> Plant:
    def own(gradients: Tensor, dim: int, axis: Any, _: Any) -> Tensor:
        kept: Tensor = gradients.chunk(axis.size, dim)[axis.rank]
        return kept

    return lambda: patch("shardwise.parallel.context.gather.scatter_sum_now", own)
