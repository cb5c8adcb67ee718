"""What several verbs check of a case before they start, with the model in hand."""

from typing import TYPE_CHECKING

from shardwise.core.case import Case
from shardwise.core.errors import OptionError
from shardwise.core.mesh import SHARDS_AXIS
from shardwise.core.plan import TheirPlan

if TYPE_CHECKING:
    from shardwise.models.source import ModelSource


def default_plan(model: str) -> str:
    """A Hugging Face model's own plan, rowwise for all others."""
    return str(TheirPlan.HF) if model.startswith("hf:") else "rowwise"


def check_seq(seq: int, source: "ModelSource") -> None:
    """Raises OptionError for a sequence that is longer than the model's learned positions."""
    if source.max_seq is not None and seq > source.max_seq:
        more = f"{',' if '?' in source.name else '?'}max_seq={seq}"
        raise OptionError(
            f"--seq {seq}: {source.name} has positions for {source.max_seq}. "
            f'Use --seq {source.max_seq}, or --model "{source.name}{more}".'
        )


def check_precision(case: Case) -> None:
    """Raises OptionError for FSDP's mixed precision without ranks that FSDP shards over."""
    mesh, step = case.mesh, case.step
    if SHARDS_AXIS in dict(mesh.axes) and mesh.fsdp * mesh.context > 1:
        return
    for option, value in (("--param-dtype", step.param_dtype), ("--reduce-dtype", step.reduce_dtype)):
        if value is not None:
            raise OptionError(
                f"{option} {value}: is FSDP's mixed precision, and mesh {mesh} has no fsdp ranks. "
                "Add fsdp=2 or more, or use --dtype."
            )
