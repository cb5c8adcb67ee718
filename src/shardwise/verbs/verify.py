"""verify: plans on models -> VerificationRun: proved right on real ranks, or what is wrong and why; or
checked without."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated

from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.option import Option, check_options
from shardwise.core.plan import Plan, TheirPlan
from shardwise.core.verification import Verification, VerificationRun
from shardwise.verbs.checks import check_seq, default_plan
from shardwise.verbs.progress import Progress, silent
from shardwise.verbs.twin_plan import plan_for_twin

if TYPE_CHECKING:
    from shardwise.verify.claim import Claim

PANEL = "Proof"


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """The proof's own step: what it shows holds for any, so it is a small one, and not the case's."""

    batch: Annotated[int, Option("Sequences.", PANEL, 1)] = 2
    seq: Annotated[int, Option("Tokens of each; a multiple of tp.", PANEL, 2)] = 16
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
    tp ranks on this machine, or uses torchrun's: its rank 0 has the answers. Raises InputError for names that
    aren't known."""
    from shardwise.launch import is_main
    from shardwise.launch.environment import device_type
    from shardwise.verify.run import verify as prove
    from shardwise.verify.without_ranks import check

    options = options or VerifyOptions()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    _check_mesh(case, options)
    claims = [claim for model in models or (case.model,) for claim in _claims(case, model, options)]
    done = 0

    def on_answer(answer: Verification) -> None:
        nonlocal done
        done += 1
        progress(f"{answer.model} under {answer.plan}: {answer.verdict}", done, len(claims))

    progress("tracing" if options.static else "starting ranks")
    mesh, settings = case.mesh, StepSettings(options.batch, options.seq)
    if options.static:
        device = "none"
        answers = check(claims, mesh=mesh, settings=settings, on_answer=on_answer) if is_main() else ()
    else:
        device = device_type(case.device, case.mesh.world_size)
        answers = prove(
            claims,
            mesh=mesh,
            settings=settings,
            device_type=device,
            timeout_s=options.timeout,
            on_answer=on_answer,
        )
    return VerificationRun(
        str(mesh), device, options.batch, options.seq, started, tuple(_versions()), answers
    )


def _check_mesh(case: Case, options: VerifyOptions) -> None:
    mesh, seq = case.mesh, options.seq
    if mesh.world_size != mesh.tp or mesh.tp < 2:
        beside = " compare proves a plan over dp and fsdp, too." if mesh.data_parallel > 1 else ""
        raise OptionError(
            f"--mesh {mesh}: verify compares one tp axis of two ranks or more with one rank. Use --mesh "
            f"tp=2.{beside}"
        )
    if seq % mesh.tp:
        raise OptionError(
            f"--seq {seq} is no multiple of tp={mesh.tp}, as sequence parallelism needs. "
            f"Use {-(-seq // mesh.tp) * mesh.tp}."
        )


def _claims(case: Case, model: str, options: VerifyOptions) -> "Iterator[Claim]":
    """One model under each plan, looked at here, so that a typo costs no ranks."""
    from shardwise.models.source import find_model
    from shardwise.parallel.plans import load_any_plan, told_apart
    from shardwise.verify.claim import Claim

    source = find_model(model)
    check_seq(options.seq, source)
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
        if plan is TheirPlan.UNSHARDED:
            raise OptionError('plan "unsharded" has nothing to verify. Name a plan that shards.')
        claim = Claim.of(model, plan, twin=small, dtype=dtype)
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
