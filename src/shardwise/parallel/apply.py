"""The way in from Python: `parallelize(model, plan, mesh)` on a user's own module, and the loss that goes
with its logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.core.errors import MeshError, PlanError
from shardwise.core.mesh import NAMES, TENSOR_AXIS, Mesh, role_of
from shardwise.core.plan import Engine, Family, Plan
from shardwise.core.program import RuleUse
from shardwise.core.rule import RuleRef
from shardwise.parallel.builtin import builtin_plan
from shardwise.parallel.context.share import sharing_of
from shardwise.parallel.engines.dtensor import apply_dtensor
from shardwise.parallel.engines.native import apply_native
from shardwise.parallel.loss import Loss, PlainLoss
from shardwise.parallel.ownership import Order
from shardwise.torch_private import check

_ATTRIBUTE = "_shardwise"


@dataclass(frozen=True, slots=True)
class Applied:
    """What parallelize() did to a model. row_order: the order in which parameters are kept that aren't kept
    in their own. foreign: another library's plan instead. parts: parameters that are whole on each tp rank,
    which finds a part of their gradient. after_backward: what is called after the backward, before gradients
    are clipped. clip: clips them to a largest norm and returns the norm before, in place of our clipping."""

    plan: Plan | None
    loss: Loss
    row_order: dict[str, Order] = field(default_factory=dict)
    foreign: tuple[RuleUse, ...] | None = None
    parts: frozenset[str] = frozenset()
    after_backward: Callable[[], object] | None = None
    clip: Callable[[float], Tensor] | None = None

    def rule_for(self, name: str) -> RuleRef | None:
        """The rule that holds for a parameter or module, or for the nearest module around it that has one."""
        while name:
            rule = self._rule_of(name)
            if rule is not None:
                return rule
            name = name.rpartition(".")[0]
        return self._rule_of("")

    def _rule_of(self, name: str) -> RuleRef | None:
        if self.foreign is not None:
            return next((use.rule for use in self.foreign if name in use.modules), None)
        rule = self.plan.rule_for(name) if self.plan is not None else None
        return rule.ref if rule is not None else None


def parallelize(model: nn.Module, plan: Plan | str, mesh: DeviceMesh) -> nn.Module:
    """Shards `model` in place over the "tp" axis of `mesh`, and returns it.

    plan: a Plan, or the name of a built-in one (of GPT's rules where the model has its pos_embeddings, of a
    mixture's where it has feed_forward.experts, else of Llama's). mesh: a DeviceMesh with an axis named "tp",
    or one of a single axis with a name that isn't another of ours, such as a trainer's "tensor_parallel";
    give the whole mesh, not its tp part, for then what can't be combined with its other axes is refused here
    ("dp" holds whole replicas, any other may shard parameters further), and where it has an axis "cp" the
    model takes this rank's part of each sequence. Every rank must hold the same weights (or all of them
    meta). Parameters become DTensors, so FSDP2 (`fully_shard`, applied afterwards over
    another axis), optimizers (made afterwards) and torch.distributed.checkpoint compose. Sharded logits want
    `loss_of(model)`.

    Raises PlanError, before anything is changed, where the plan doesn't fit the model; ModelError where its
    sequences can't be shared over "cp"; MeshError where the mesh has no "tp" axis.
    """
    check()
    if isinstance(plan, str):
        plan = builtin_plan(plan, family=_family_of(model))
    check_has_tensor_axis(mesh, "parallelize")
    if is_applied(model):
        raise PlanError(
            f'plan "{plan.name}": the model is sharded already. Build a fresh one for another plan.'
        )
    sharded = next(
        (name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)), None
    )
    if sharded is not None:
        raise PlanError(
            f'plan "{plan.name}": {sharded} is a DTensor already. Call parallelize() before fully_shard().'
        )
    fsdp = _ranks_sharding_further(mesh)
    sharing = sharing_of(model, mesh, plan.context_attention, plan.reduce_scatter)
    match plan.engine:
        case Engine.NATIVE:
            loss, row_order, parts = apply_native(model, plan, mesh, fsdp=fsdp)
            applied = Applied(plan, loss, row_order, parts=parts)
        case Engine.DTENSOR:
            applied = Applied(plan, apply_dtensor(model, plan, mesh, fsdp=fsdp))
    if sharing is not None:
        sharing.install(model)
    mark_applied(model, applied)
    return model


def _family_of(model: nn.Module) -> Family:
    """GPT's where the model has GPT's table of positions, that of mixtures where its feed-forward is one,
    else Llama's."""
    if "pos_embeddings" in dict(model.named_children()):
        return Family.GPT
    is_moe = any(name.endswith("feed_forward.experts") for name, _ in model.named_modules())
    return Family.MOE if is_moe else Family.LLAMA


def mark_applied(model: nn.Module, applied: Applied) -> None:
    """Notes on the model what was done to it."""
    setattr(model, _ATTRIBUTE, applied)


def check_has_tensor_axis(mesh: DeviceMesh, who: str) -> None:
    """Raises MeshError for a mesh without an axis that is taken for tp: the one of that name, or the only
    one, which others may call as they like."""
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    if TENSOR_AXIS not in names and (mesh.ndim > 1 or role_of(names[0]) is not None):
        raise MeshError(f'{who}: the mesh has axes {mesh.mesh_dim_names}. Name one of them "tp".')


def _ranks_sharding_further(mesh: DeviceMesh) -> int:
    """Those of FSDP's axes, and of axes that aren't ours, of which nobody knows."""
    if mesh.ndim == 1:
        return 1
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    ours = Mesh(tuple((name, sizes[name]) for name in NAMES if name in sizes))
    others = (size for name, size in sizes.items() if role_of(name) is None)
    return math.prod((*map(ours.size, ours.shard_axes), *others))


def applied_to(model: nn.Module) -> Applied:
    """What parallelize() did to the model; for a model that isn't sharded, the plain loss."""
    return getattr(model, _ATTRIBUTE, Applied(None, PlainLoss()))


def is_applied(model: nn.Module) -> bool:
    """Whether parallelize(), or what stands in its place, has been here."""
    return hasattr(model, _ATTRIBUTE)


def loss_of(model: nn.Module) -> Loss:
    """Cross-entropy for the model's logits, whether they are whole or this rank's part of the vocabulary: see
    loss.Loss."""
    return applied_to(model).loss
