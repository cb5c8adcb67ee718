"""verify: plans on models -> VerificationRun: proved right on real ranks, or what is wrong and why; or
checked without."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import lcm
from typing import TYPE_CHECKING, Annotated

from shardwise.core.batch_part import check_batch
from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.mesh import RUN, Mesh, check_carried
from shardwise.core.option import Option, check_options
from shardwise.core.plan import AnyPlan, Plan, TheirPlan
from shardwise.core.verification import Verification, VerificationRun
from shardwise.verbs.checks import check_fsdp, check_recompute, check_router_decides, check_seq, default_plan
from shardwise.verbs.progress import Progress, silent
from shardwise.verbs.twin_plan import plan_for_twin

if TYPE_CHECKING:
    from shardwise.models.source import ModelSource
    from shardwise.verify.claim import Claim

PANEL = "Proof"
SEQ = 16


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """The proof's own step: what it shows holds for any, so it is a small one, and not the case's; but how
    it is cut, and what FSDP does, is the case's."""

    batch: Annotated[
        int,
        Option(
            "Sequences, over all ranks.",
            PANEL,
            1,
            shown="two for each data-parallel rank and micro-batch, and once more one",
        ),
    ] = 0
    seq: Annotated[
        int,
        Option(
            "Tokens of each; a multiple of tp, and of 2 cp.",
            PANEL,
            2,
            shown=f"{SEQ}, or the next number that the mesh cuts into equal parts",
        ),
    ] = 0
    dtype: Annotated[
        str,
        Option(
            "auto: float64, and float32 for a model that doesn't run in it.",
            PANEL,
            choices=("auto", "float64", "float32"),
        ),
    ] = "auto"
    size: Annotated[
        str,
        Option(
            "small: a twin with the same modules at small sizes. given: the model itself. auto: the twin of "
            "a "
            "large model.",
            PANEL,
            choices=("auto", "given", "small"),
        ),
    ] = "auto"
    timeout: Annotated[
        float, Option("Seconds without a sign of life after which a case is given up.", PANEL, 5)
    ] = 120.0
    static: Annotated[
        bool, Option("Only what needs no ranks: seconds, for any size and tp; proves nothing.", PANEL)
    ] = False

    def __post_init__(self) -> None:
        check_options(self)


def verify(
    case: Case,
    options: VerifyOptions | None = None,
    progress: Progress = silent,
    *,
    models: Sequence[str] = (),
) -> VerificationRun:
    """The case's model, or each of `models`, under each of its plans; no plan means the model's own. Starts
    the mesh's ranks on this machine, or uses torchrun's: its rank 0 has the answers. Raises InputError for
    names that aren't known, and for a mesh that the step doesn't fit."""
    from shardwise.launch import is_main
    from shardwise.launch.environment import device_type
    from shardwise.verify.run import verify as prove
    from shardwise.verify.without_ranks import check

    options = options or VerifyOptions()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    settings = _settings(case, options)
    claims = [
        claim for model in models or (case.model,) for claim in _claims(case, model, options, settings.seq)
    ]
    done = 0

    def on_answer(answer: Verification) -> None:
        nonlocal done
        done += 1
        progress(f"{answer.model} under {answer.plan}: {answer.verdict}", done, len(claims))

    progress("tracing" if options.static else "starting ranks")
    mesh = case.mesh
    if options.static:
        device = "none"
        answers = check(claims, mesh=mesh, settings=settings, on_answer=on_answer) if is_main() else ()
    else:
        device = device_type(case.device, case.mesh.world_size)
        answers = prove(
            claims,
            mesh=mesh,
            settings=settings,
            also_smallest=not options.batch,
            device_type=device,
            timeout_s=options.timeout,
            on_answer=on_answer,
        )
    smallest = settings.batch // 2 if not (options.batch or options.static) else None
    return VerificationRun(
        str(mesh), device, settings.batch, settings.seq, started, tuple(_versions()), answers, smallest
    )


def _settings(case: Case, options: VerifyOptions) -> StepSettings:
    """The step that is proved. Raises MeshError and OptionError for a mesh that can't carry it."""
    mesh, step = case.mesh, case.step
    check_carried(mesh, "verify", RUN)
    check_fsdp(case)
    check_router_decides(case)
    if mesh.world_size < 2:
        raise OptionError(
            f"--mesh {mesh}: verify compares several ranks with one. Use a mesh of two ranks or more, such "
            "as tp=2 or fsdp=2,tp=2."
        )
    if options.static and mesh.tp < 2:
        raise OptionError(
            f"--mesh {mesh}: without ranks verify looks at what is cut over tp. Use --mesh tp=2 or more, or "
            "leave --static out."
        )
    parts = mesh.data_parallel * step.accumulation
    batch, seq = options.batch or 2 * parts, options.seq or _seq(mesh)
    check_batch(mesh, batch, seq, step.accumulation)
    return replace(step, batch=batch, seq=seq)


def _seq(mesh: Mesh) -> int:
    """Tokens that tp ranks, and context ranks with a chunk from each end, have equal parts of."""
    parts = lcm(mesh.tp * mesh.context, 2 * mesh.context)
    return -(-SEQ // parts) * parts


def _check_sequence(seq: int, mesh: Mesh, source: "ModelSource", plan: AnyPlan) -> None:
    """Raises PlanError where a plan of ours cuts a sequence that its ranks can't have equal parts of. What
    others' plans do is only seen when it runs."""
    if isinstance(plan, Plan) and seq % (mesh.tp * mesh.context):
        import torch

        from shardwise.parallel.any_plan import check_any

        check_any(source, source.build(dtype=torch.float32), plan, mesh, seq)


def _claims(case: Case, model: str, options: VerifyOptions, seq: int) -> "Iterator[Claim]":
    """One model under each plan, looked at here, so that a typo costs no ranks."""
    from shardwise.models.source import find_model
    from shardwise.parallel.plans import load_any_plan, told_apart
    from shardwise.verify.claim import Claim

    source = find_model(model)
    check_seq(seq, source)
    check_recompute(case, source)
    small = None if options.size == "auto" else options.size == "small"
    dtype = None if options.dtype == "auto" else options.dtype
    labels: list[str] = []
    for name in case.plans or (default_plan(source),):
        plan = load_any_plan(
            name,
            sequence_parallel=case.sequence_parallel,
            family=source.family,
            context_attention=case.context_attention,
        )
        if plan is TheirPlan.UNSHARDED and case.mesh.tp > 1:
            raise OptionError(
                f'plan "unsharded" cuts nothing over tp={case.mesh.tp}, so there is nothing to verify. '
                "Name a plan that shards, or a mesh without tp."
            )
        claim = Claim.of(model, plan, twin=small, dtype=dtype)
        _check_sequence(seq, case.mesh, source, plan)
        if isinstance(plan, Plan) and small is not False:
            of_twin = plan_for_twin(plan, source, case.mesh)
            claim = replace(claim, twin_plan=of_twin.to_toml() if of_twin is not None else "")
        labels.append(told_apart(claim.label, labels))
        yield replace(claim, label=labels[-1])


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("shardwise", "torch", "transformers"):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
