"""The native engine: DTensor parameters, forwards on plain local tensors, explicit collectives."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.collective import Origin
from shardwise.core.mesh import EXPERTS_AXIS, TENSOR_AXIS
from shardwise.core.placement import Partial, Replicate
from shardwise.core.plan import Plan
from shardwise.core.program import REPLICATED_PARAMETERS
from shardwise.parallel.axis import Axis
from shardwise.parallel.checkpoints import speak_of_whole_tensors
from shardwise.parallel.dropout import draw_alike
from shardwise.parallel.loss import Loss
from shardwise.parallel.ownership import Order
from shardwise.parallel.parameters import PartialGradients, refuse_untied
from shardwise.parallel.resolve import head_of, resolve, tied_parameters
from shardwise.parallel.sharder import Work


def apply_native(
    model: nn.Module, plan: Plan, mesh: DeviceMesh, *, fsdp: int
) -> tuple[Loss, dict[str, Order], frozenset[str]]:
    """Shards `model` in place. Returns the loss for its logits, the order of the parameters that aren't kept
    in their own, and the names of those that are whole, of whose gradient each rank finds a part. fsdp: see
    resolve()."""
    axis = Axis.of(mesh, TENSOR_AXIS, plan.reduce_scatter)
    has_experts = EXPERTS_AXIS in (mesh.mesh_dim_names or ())
    experts = Axis.of(mesh, EXPERTS_AXIS, plan.reduce_scatter) if has_experts else None
    n_shared = experts.size if experts is not None else 1
    assignments = resolve(model, plan, tp=axis.size, fsdp=fsdp, experts=n_shared)
    work = Work(axis, experts, mesh, head_of(model))
    # an embedding decides how a weight that it shares with the head is cut
    for assignment in sorted(assignments, key=lambda a: not isinstance(a.module, nn.Embedding)):
        assignment.sharder.apply(assignment, work)
    origin = Origin(REPLICATED_PARAMETERS, None, Partial(), Replicate())
    PartialGradients(model, work.partial, axis, origin)
    draw_alike(model, mesh)
    refuse_untied(model, set(tied_parameters(model).values()))
    named = {module: name for name, module in model.named_modules()}
    parts = frozenset(f"{named[module]}.{name}" for module, name in work.partial)
    return work.loss, speak_of_whole_tensors(model, work.orders), parts
