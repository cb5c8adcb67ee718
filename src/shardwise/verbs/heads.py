"""Why a step under transformers' own plan can't be traced, where that is its heads: the model's code only
says that a shape doesn't fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shardwise.core.errors import PlanError
from shardwise.core.plan import AnyPlan, TheirPlan

if TYPE_CHECKING:
    from shardwise.models.source import ModelSource


@contextmanager
def naming_heads(source: "ModelSource", plan: AnyPlan, tp: int) -> Iterator[None]:
    """Raises PlanError with the heads that tp ranks can't share out, for any PlanError of a plan that cuts
    them."""
    try:
        yield
    except PlanError as error:
        reason = None
        if plan is TheirPlan.HF or plan is TheirPlan.HF_EP:
            reason = _undivided(source, plan, tp)
        if reason is None:
            raise
        raise PlanError(f'plan "{plan}": {reason}') from error


def _undivided(source: "ModelSource", plan: TheirPlan, tp: int) -> str | None:
    import torch

    from shardwise.parallel.engines.hugging_face import hugging_face_rules
    from shardwise.verify.static import undivided_heads

    model = source.build(dtype=torch.float32)
    found = next(undivided_heads(model, hugging_face_rules(model, plan), tp), None)
    return f"{found.reason}: rule {found.rule}. {found.advice}" if found is not None else None
