"""Whatever stands for a plan: one of ours, transformers' own, or none where the factory has sharded the model
itself. How it is carried out, and how it goes to the ranks as text."""

import math

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh
from shardwise.core.plan import NO_ENGINE, AnyPlan, Plan, TheirPlan
from shardwise.models.model_source import ModelSource
from shardwise.models.self_sharded import sharding_source
from shardwise.parallel.apply import parallelize
from shardwise.parallel.context.fit import attending
from shardwise.parallel.context.share import sharing_of
from shardwise.parallel.resolve import resolve


def apply_any(model: nn.Module, plan: AnyPlan, mesh: DeviceMesh) -> nn.Module:
    """Shards `model` in place over the "tp" axis of `mesh`, and returns it. Raises what parallelize() and
    parallelize_hugging_face() raise."""
    match plan:
        case Plan():
            parallelize(model, plan, mesh)
        case TheirPlan.HF | TheirPlan.HF_EP:
            from shardwise.parallel.engines.hugging_face import parallelize_hugging_face

            sharing = sharing_of(model, mesh)
            parallelize_hugging_face(model, mesh, plan)
            if sharing is not None:
                sharing.install(model)
        case TheirPlan.OWN:
            pass  # build_sharded() has done it
        case TheirPlan.UNSHARDED:
            sharing = sharing_of(model, mesh)
            if sharing is not None:
                sharing.install(model)
    return model


def check_any(source: ModelSource, model: nn.Module, plan: AnyPlan, mesh: Mesh, seq: int) -> None:
    """Raises what apply_any() would, as far as `model`, unsharded and on the meta device, can tell."""
    if mesh.context > 1:
        if plan is TheirPlan.OWN:
            raise OptionError(
                f'plan "own": what the factory shards takes whole sequences, and mesh {mesh} shares them. '
                "Use a mesh without cp, or another plan."
            )
        attending(model, mesh.context, seq)
    match plan:
        case Plan():
            shards = math.prod(map(mesh.size, mesh.shard_axes))
            resolve(model, plan, tp=mesh.tp, seq=seq, fsdp=shards, experts=mesh.experts, context=mesh.context)
        case TheirPlan.HF | TheirPlan.HF_EP:
            from shardwise.parallel.engines.hugging_face import hugging_face_rules

            hugging_face_rules(model, plan)
        case TheirPlan.OWN:
            sharding_source(source)
        case TheirPlan.UNSHARDED:
            if mesh.tp > 1:
                raise OptionError(
                    f'plan "unsharded" shards nothing, and mesh {mesh} has a tp axis. Use tp=1, or another '
                    "plan."
                )


def text_of(plan: AnyPlan) -> str:
    """TOML, or the name of a plan that isn't ours."""
    return plan.to_toml() if isinstance(plan, Plan) else str(plan)


def plan_from(text: str) -> AnyPlan:
    """What text_of() wrote."""
    return TheirPlan(text) if text in list(TheirPlan) else Plan.from_toml(text)


def name_of(plan: AnyPlan) -> str:
    """As results call it."""
    return plan.name if isinstance(plan, Plan) else str(plan)


def engine_of(plan: AnyPlan) -> str:
    """Who carries it out."""
    match plan:
        case Plan(engine=engine):
            return str(engine)
        case TheirPlan.HF | TheirPlan.HF_EP:
            return "transformers"
        case TheirPlan.OWN:
            return "dtensor"
        case TheirPlan.UNSHARDED:
            return NO_ENGINE
