"""Carries out whatever stands for a plan: one of ours, transformers' own, or none where the factory has
sharded the model itself."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.plan import AnyPlan, Plan, TheirPlan
from shardwise.parallel.apply import Applied, is_applied, mark_applied, parallelize
from shardwise.parallel.loss import DTensorLoss


def apply_any(model: nn.Module, plan: AnyPlan, mesh: DeviceMesh) -> nn.Module:
    """Shards `model` in place over the "tp" axis of `mesh`, and returns it. Raises what parallelize() and
    parallelize_hugging_face() raise."""
    match plan:
        case Plan():
            parallelize(model, plan, mesh)
        case TheirPlan.HF:
            from shardwise.parallel.engines.hugging_face import parallelize_hugging_face

            parallelize_hugging_face(model, mesh)
        case TheirPlan.OWN:
            if not is_applied(model):  # a factory may have called parallelize(), which knows more
                mark_applied(model, Applied(None, DTensorLoss()))  # it takes whole logits too
        case TheirPlan.UNSHARDED:
            pass
    return model
