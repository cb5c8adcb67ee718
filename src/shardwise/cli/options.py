"""What several commands' options share: allowed values, and how a wrong one is told."""

from typing import TYPE_CHECKING, Annotated

import typer

from shardwise.core.case import StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.mesh import SHARDS_AXIS, Mesh
from shardwise.core.plan import TheirPlan, suggest

if TYPE_CHECKING:
    from shardwise.models.source import ModelSource

DTYPES = ("float32", "bfloat16", "float64")
RECOMPUTE = ("none", "selective-ops", "full")
STEP = "Training step"

ParamDtype = Annotated[
    str | None,
    typer.Option(
        help="What FSDP gathers parameters in, and layers compute in (MixedPrecisionPolicy).",
        show_default="the --dtype",
        rich_help_panel=STEP,
    ),
]
ReduceDtype = Annotated[
    str | None,
    typer.Option(
        help="What FSDP reduces gradients in.", show_default="what layers compute in", rich_help_panel=STEP
    ),
]
Recompute = Annotated[
    str,
    typer.Option(
        help="Activation checkpointing of each layer: none, selective-ops (all but fused attention and every second matmul) or full.",
        rich_help_panel=STEP,
    ),
]


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises OptionError for a value that isn't offered."""
    if value not in allowed:
        raise OptionError(f'{option} is "{value}".{suggest(value, allowed)} Allowed: {", ".join(allowed)}.')


def check_dtypes(dtype: str, param_dtype: str | None, reduce_dtype: str | None) -> None:
    """Raises OptionError for a dtype that isn't offered."""
    for option, value in (
        ("--dtype", dtype),
        ("--param-dtype", param_dtype),
        ("--reduce-dtype", reduce_dtype),
    ):
        if value is not None:
            check_choice(option, value, DTYPES)


def check_precision(settings: StepSettings, mesh: Mesh) -> None:
    """Raises OptionError for a dtype that isn't offered, and for mixed precision without ranks that FSDP shards over."""
    check_dtypes(settings.dtype, settings.param_dtype, settings.reduce_dtype)
    sharded = SHARDS_AXIS in dict(mesh.axes) and mesh.fsdp * mesh.context > 1
    for option, value in (("--param-dtype", settings.param_dtype), ("--reduce-dtype", settings.reduce_dtype)):
        if value is not None and not sharded:
            raise OptionError(
                f"{option} {value}: is FSDP's mixed precision, and mesh {mesh} has no fsdp ranks. Add fsdp=2 or more, or use --dtype."
            )


def check_batch(settings: StepSettings, mesh: Mesh) -> None:
    """Raises OptionError for a batch that can't be cut into equal parts."""
    parts = mesh.data_parallel * settings.accumulation
    if settings.batch % parts:
        raise OptionError(
            f"--batch {settings.batch} can't be cut into {mesh.data_parallel} data-parallel parts of {settings.accumulation} micro-batches. "
            f"Use a multiple of {parts}."
        )


def default_plan(model: str) -> str:
    """A Hugging Face model's own plan, rowwise for all others."""
    return str(TheirPlan.HF) if model.startswith("hf:") else "rowwise"


def check_seq(seq: int, source: "ModelSource") -> None:
    """Raises OptionError for a sequence that is longer than the model's learned positions."""
    if source.max_seq is not None and seq > source.max_seq:
        more = f"{',' if '?' in source.name else '?'}max_seq={seq}"
        raise OptionError(
            f'--seq {seq}: {source.name} has positions for {source.max_seq}. Use --seq {source.max_seq}, or --model "{source.name}{more}".'
        )
