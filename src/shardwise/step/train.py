"""The training step: gradients of one global batch (in micro-batches), reduced, clipped, one AdamW step.

Loss: mean over the valid labels of the global batch; each data-parallel rank and each micro-batch adds its
summand, so uneven valid tokens weigh as they do on one process. FSDP sums gradients inside the backward, over
the axes of its shards; gradient_sums.py those of all other axes whose ranks see other tokens, after it.

The two engines differ in clipping only: native gradients, and those of a model of which a part is sharded, or
over several meshes, go through clip_gradients (one all-reduce per axis); where PyTorch's own styles have made
every parameter a DTensor, torch.nn.utils.clip_grad_norm_ and full_tensor() clip, as torchtitan did in 2025. A
model that shards itself may have brought its own clipping, and what is to be called before it.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from shardwise.core.case import FOREACH, FUSED, StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.op_names import ALTERNATE_MATMULS, KEPT_OPS
from shardwise.core.plan import Engine
from shardwise.core.program import Phase
from shardwise.parallel.apply import applied_to
from shardwise.parallel.loss import Loss, count_valid
from shardwise.parallel.stages import stage_of
from shardwise.step.balance import Balances
from shardwise.step.clipping import clip_gradients
from shardwise.step.gradient_sums import GradientSums
from shardwise.step.groups import make_groups, mesh_of
from shardwise.step.pipeline import Passes
from shardwise.torch_private import replicas_of_fsdp


@dataclass(frozen=True, slots=True)
class StepResult:
    """Scalar tensors, equal on all ranks: the global batch's mean loss, and the gradient norm before
    clipping."""

    loss: Tensor
    gradient_norm: Tensor


def _overload(name: str) -> object:
    """Of an op by its name: `aten::mm`."""
    space, _, op = name.partition("::")
    return getattr(getattr(torch.ops, space), op).default


_MATMULS, _KEPT = (frozenset(map(_overload, names)) for names in (ALTERNATE_MATMULS, KEPT_OPS))


def recompute_in(layers: Collection[nn.Module] | nn.ModuleList, what: str = "full") -> None:
    """Activation checkpointing of each of these modules, which keeps its input. full: runs all of it again in
    the backward. selective-ops: all but what core/op_names.py says. Raises OptionError for no layers.
    """
    if not len(layers):
        raise OptionError(
            f"--recompute {what}: the model has no nn.ModuleList of layers, which could be recomputed one by "
            "one. Leave it out."
        )
    contexts = {"full": noop_context_fn, "selective-ops": _selective}[what]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)


def _selective() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of one layer's forward and of its second one."""
    # PyTorch before 2.13 asks in the second forward too
    matmuls = {again: count(1) for again in (False, True)}

    def policy(context: SelectiveCheckpointContext, op: object, *_: object, **__: object) -> CheckpointPolicy:
        kept = next(matmuls[context.is_recompute]) % 2 == 1 if op in _MATMULS else op in _KEPT
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-any-return]


def mixed_precision(settings: StepSettings) -> MixedPrecisionPolicy:
    """FSDP's, as the settings name it."""
    names = (settings.param_dtype, settings.reduce_dtype)
    param_dtype, reduce_dtype = (getattr(torch, name) if name else None for name in names)
    return MixedPrecisionPolicy(param_dtype, reduce_dtype)


def shard_with_fsdp(
    model: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    *,
    reshard: bool = True,
) -> None:
    """FSDP2 over a 1-D mesh, a unit per layer, summing gradients (the step's loss is normalised over the
    global batch already). reshard: after the forward; what lies outside of layers never is, for the backward
    begins there."""
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    sum_gradients(model)


def sum_gradients(model: nn.Module) -> None:
    """Has FSDP2, which a model is under already, add the ranks' gradients and not divide the sum."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # else the factor goes to the backend, and gloo knows none
            module.set_force_sum_reduction_for_comms(True)


class TrainStep:
    """One optimizer step of a model, called with the micro-batches of this rank's part of the global batch.

    mesh: the device mesh with the model's axes, or None for one process. loss: in place of the one that goes
    with the model's logits. reduce_once: FSDP keeps whole gradients until the last micro-batch. on_phase:
    told each phase as it begins. optimizer_kernel: one of OPTIMIZER_KERNELS. optimizer: in place of AdamW
    with PyTorch's defaults; see adamw(). check: given the loss and the norm before anything is updated; what
    it raises leaves the weights as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mesh: DeviceMesh | None,
        learning_rate: float = 3e-4,
        max_norm: float = 1.0,
        loss: Loss | None = None,
        reduce_once: bool = False,
        on_phase: Callable[[Phase], None] | None = None,
        optimizer_kernel: str = FUSED,
        optimizer: torch.optim.Optimizer | None = None,
        check: Callable[[StepResult], None] | None = None,
    ) -> None:
        applied = applied_to(model)
        self.model = model
        self.optimizer = optimizer or torch.optim.AdamW(
            _groups(model),
            lr=learning_rate,
            fused=optimizer_kernel == FUSED,
            foreach=optimizer_kernel == FOREACH,
        )
        self._check = check
        self._loss = loss or applied.loss
        self._after_backward, self._own_clip = applied.after_backward, applied.clip
        self._torch_clips = _are_dtensors_of_one_mesh(model.parameters()) and (
            applied.plan is None or applied.plan.engine is Engine.DTENSOR
        )
        self._ids_on_host = applied.plan is not None and applied.plan.engine is Engine.NATIVE
        self._max_norm = max_norm
        self._reduces_once = model if reduce_once and isinstance(model, FSDPModule) else None
        self._on_phase = on_phase or (lambda _: None)
        self._tokens, self._sums = None, None
        if mesh is not None:
            axes, groups = mesh_of(mesh), make_groups(mesh)
            self._tokens = groups.get(axes.token_axes)
            self._sums = GradientSums(axes.summing_axes, groups)
        self._balances = Balances(model, mesh, self._tokens)
        self._passes: Passes | None = None
        stage = stage_of(model)
        if stage is not None:
            assert mesh is not None
            self._torch_clips = False  # it knows of no other stages
            self._passes = Passes(
                model, stage, mesh, self._loss, self._on_phase, reduce_once=self._reduces_once is not None
            )

    def gradients(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Leaves the global batch's gradients in `.grad` (of this rank's shards) and returns the global mean
        loss, a scalar tensor."""
        device = next(self.model.parameters()).device
        labels = [labels_BS.to(device, non_blocking=True) for _, labels_BS in micro_batches]
        valid = torch.stack([count_valid(labels_BS) for labels_BS in labels]).sum()
        if self._tokens is not None:
            dist.all_reduce(valid, group=self._tokens)
        ids = [self.placed(ids_BS) for ids_BS, _ in micro_batches]
        self._balances.begin(len(ids))
        total = (self._run if self._passes is None else self._passes.run)(ids, labels, valid)
        total = self._balances.add_to(total)
        self._on_phase(Phase.REDUCE)
        if self._passes is not None:
            self._passes.sum_tied()
            dist.all_reduce(total, group=self._passes.group)
        if self._sums is not None:
            self._sums.sum(self.model.parameters(), replicas_of_fsdp(self.model))
        if self._after_backward is not None:
            self._after_backward()
        if self._tokens is not None:
            dist.all_reduce(total, group=self._tokens)
        return total

    def _run(self, ids: Sequence[Tensor], labels: Sequence[Tensor], valid: Tensor) -> Tensor:
        """Forward and backward of each micro-batch; the sum of their losses."""
        total = torch.zeros((), device=valid.device)
        for number, (ids_BS, labels_BS) in enumerate(zip(ids, labels, strict=True), 1):
            if self._reduces_once is not None:
                self._reduces_once.set_requires_gradient_sync(number == len(ids))
                self._reduces_once.set_is_last_backward(number == len(ids))
            self._on_phase(Phase.FORWARD)
            logits = self.model(ids_BS)
            self._on_phase(Phase.LOSS)
            loss = self._loss(logits, labels_BS, valid)
            del logits  # the backward frees what it can as it goes
            self._on_phase(Phase.BACKWARD)
            with self._loss.backward_context():
                loss.backward()
            total = total + loss.detach()
        return total

    def placed(self, ids_BS: Tensor) -> Tensor:
        """Token ids where the model wants them: on the host where our embeddings route by them, else on the
        model's device."""
        if self._ids_on_host:
            return ids_BS
        return ids_BS.to(next(self.model.parameters()).device, non_blocking=True)

    def __call__(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> StepResult:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.gradients(micro_batches)
        self._on_phase(Phase.CLIP)
        result = StepResult(loss, self._clip())
        if self._check is not None:
            self._check(result)
        self._on_phase(Phase.OPTIMIZER)
        self.optimizer.step()
        return result

    @torch.no_grad()
    def loss(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy of the global batch, and how many of its labels count: scalar tensors, the
        same on all ranks. No gradients; the model is in eval mode meanwhile."""
        device = next(self.model.parameters()).device
        labels = [labels_BS.to(device, non_blocking=True) for _, labels_BS in micro_batches]
        valid = torch.stack([count_valid(labels_BS) for labels_BS in labels]).sum()
        ids = [self.placed(ids_BS) for ids_BS, _ in micro_batches]
        self.model.eval()
        try:
            if self._passes is None:
                parts = [self._loss(self.model(a), b, valid=1) for a, b in zip(ids, labels, strict=True)]
                total = torch.stack(parts).sum()
            else:
                total = self._passes.run_forward(ids, labels)
                dist.all_reduce(total, group=self._passes.group)
        finally:
            self.model.train()
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # a backward would have; a checkpoint must find shards
        if self._tokens is not None:
            dist.all_reduce(valid, group=self._tokens)
            dist.all_reduce(total, group=self._tokens)
        return total, valid

    def _clip(self) -> Tensor:
        if self._own_clip is not None:
            return _whole(self._own_clip(self._max_norm))
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        if not self._torch_clips or (gradients and not _are_dtensors_of_one_mesh(gradients)):
            _finish_partial(self.model)
            if self._passes is None:
                return clip_gradients(self.model.parameters(), self._max_norm)
            return clip_gradients(
                self.model.parameters(),
                self._max_norm,
                stages=self._passes.group,
                counted_elsewhere=self._passes.counted_elsewhere,
            )
        return _whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm, foreach=True))


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    kernel: str = FUSED,
) -> torch.optim.Optimizer:
    """AdamW over a model that is sharded already. kernel: one of OPTIMIZER_KERNELS. Parameters of fewer than
    two dims (biases, norms) don't decay: they scale or shift what others hold, and have no size to keep
    small."""
    decaying = [
        {
            "params": [each for each in group["params"] if (each.dim() > 1) == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for group in _groups(model)
        for decays in (True, False)
    ]
    groups = [group for group in decaying if group["params"]]
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=betas, eps=eps, fused=kernel == FUSED, foreach=kernel == FOREACH
    )


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """Parameter groups, one for each mesh: a fused optimizer takes no mixture of DTensors of several meshes,
    nor of DTensors and plain tensors, which other libraries' plans leave and which come last."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    plain = groups.pop(None, [])
    return [{"params": group} for group in (*groups.values(), plain) if group]


def _are_dtensors_of_one_mesh(tensors: Iterable[Tensor]) -> bool:
    meshes = {each.device_mesh if isinstance(each, DTensor) else None for each in tensors}
    return len(meshes) == 1 and None not in meshes


def _finish_partial(model: nn.Module) -> None:
    """PyTorch's own styles leave some gradients Partial for whoever meets them first."""
    for parameter in model.parameters():
        gradient = parameter.grad
        if (
            isinstance(parameter, DTensor)
            and isinstance(gradient, DTensor)
            and any(each.is_partial() for each in gradient.placements)
        ):
            parameter.grad = gradient.redistribute(placements=parameter.placements)
