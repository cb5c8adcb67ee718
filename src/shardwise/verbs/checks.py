"""What several verbs check of a case before they start, with the model in hand."""

from typing import TYPE_CHECKING

from shardwise.core.case import Case
from shardwise.core.errors import OptionError, PlanError

if TYPE_CHECKING:
    from shardwise.models.source import ModelSource

ROWWISE = "rowwise"
DEFAULT_PLAN = f"{ROWWISE}; hf for hf:..., own for what shards itself"
"""default_plan() in words."""


def default_plan(source: "ModelSource") -> str:
    """What is taken where no plan is named: the source's own, else rowwise. Raises OptionError for a model
    that it says nothing of."""
    import torch

    from shardwise.parallel.builtin import builtin_plan
    from shardwise.parallel.resolve import resolve

    if source.default_plan is not None:
        return source.default_plan
    try:
        resolve(source.build(dtype=torch.float32), builtin_plan(ROWWISE, family=source.family), tp=1)
    except PlanError:
        raise OptionError(
            f"no plan is named, and the built-in ones' rules aren't for {source.name}. Name a .toml file; "
            f"`shardwise plan --model {source.name} --toml` makes one."
        ) from None
    return ROWWISE


def check_stages(case: Case, source: "ModelSource") -> None:
    """Raises OptionError, and ModelError, for a pipeline that the model or the settings can't have."""
    pipeline = case.step.pipeline(case.mesh)
    pipeline.check(case.step.accumulation)
    if pipeline.stages == 1:
        return
    import torch

    from shardwise.parallel.ends import check_spans, ends_of

    ends = ends_of(source)
    spans = pipeline.spans(ends.layers.count, source.name)
    check_spans(source.build(dtype=torch.float32), ends, spans)


def check_recompute(case: Case, source: "ModelSource") -> None:
    """Raises OptionError for a recompute of more layers than the model has."""
    if case.step.recompute_layers is None:
        return
    import torch

    from shardwise.core.pipeline import Span, recomputed_spans
    from shardwise.models.layers import find_layers

    layers = find_layers(source.build(dtype=torch.float32))
    spans = (Span(0, layers.count),) if layers is not None else ()
    recomputed_spans(spans, case.step.recompute_layers, source.name)


def check_seq(seq: int, source: "ModelSource") -> None:
    """Raises OptionError for a sequence that is longer than the model's learned positions."""
    if source.max_seq is not None and seq > source.max_seq:
        or_more = ""
        if "max_seq" in getattr(source, "numbers", ()):
            or_more = f', or --model "{source.name}{"," if "?" in source.name else "?"}max_seq={seq}"'
        raise OptionError(
            f"--seq {seq}: {source.name} has positions for {source.max_seq}. Use --seq "
            f"{source.max_seq}{or_more}."
        )


def check_router_decides(case: Case) -> None:
    """For a verb that runs the step. Raises OptionError for a load that is only to be assumed."""
    if case.step.expert_load != 1:
        raise OptionError(
            f"--expert-load {case.step.expert_load:g}: is for explain and predict; here the router decides. "
            "Leave it out."
        )


def check_fsdp(case: Case) -> None:
    """Raises OptionError for what FSDP alone does, without ranks that it shards over."""
    mesh, step = case.mesh, case.step
    if mesh.shard_axes:
        return
    for option, is_asked in (
        ("--no-reshard-after-forward", not step.reshard_after_forward),
        ("--reduce-once", step.reduce_once),
    ):
        if is_asked:
            raise OptionError(
                f"{option}: is what FSDP does, and mesh {mesh} has no fsdp ranks. Add fsdp=2 or more, or "
                "leave it out."
            )
    for option, value in (("--param-dtype", step.param_dtype), ("--reduce-dtype", step.reduce_dtype)):
        if value is not None:
            raise OptionError(
                f"{option} {value}: is FSDP's mixed precision, and mesh {mesh} has no fsdp ranks. "
                "Add fsdp=2 or more, or use --dtype."
            )
