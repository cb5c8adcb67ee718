"""`shardwise verify`: prove on real ranks that a plan trains the unsharded model, or name the parameter, the rule and the reason."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from shardwise.cli.options import check_choice, check_seq
from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh, Role
from shardwise.core.plan import TheirPlan

if TYPE_CHECKING:
    from shardwise.core.verification import Verification, VerificationRun
    from shardwise.verify.case import Case

_OUTPUT = "Output"
_PROOF = "Proof"
_SIZES = ("auto", "given", "small")
_DTYPES = ("auto", "float64", "float32")
_DEVICES = ("cpu", "cuda")
DEFAULT_MODEL = "llama3-debug"


def verify(
    plans: Annotated[
        list[str] | None,
        typer.Argument(
            help="Built-in plans, TOML files, hf (a Hugging Face model's own), own (the factory shards itself).",
            show_default="hf for hf:... models, else rowwise",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="As shardwise models says; give it again for more models.",
            show_default=DEFAULT_MODEL,
        ),
    ] = None,
    mesh: Annotated[str, typer.Option(help="The tp axis: that many ranks on this machine.")] = "tp=2",
    batch: Annotated[int, typer.Option(help="Sequences.", min=1, rich_help_panel=_PROOF)] = 2,
    seq: Annotated[
        int, typer.Option(help="Tokens of each; a multiple of tp.", min=2, rich_help_panel=_PROOF)
    ] = 16,
    dtype: Annotated[
        str,
        typer.Option(
            help="auto: float64, and float32 for a model that doesn't run in it.", rich_help_panel=_PROOF
        ),
    ] = "auto",
    size: Annotated[
        str,
        typer.Option(
            help="small: a twin with the same modules at small sizes. given: the model itself. auto: the twin of a large model.",
            rich_help_panel=_PROOF,
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu (gloo) or cuda (NCCL).", rich_help_panel=_PROOF)] = "cpu",
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds without a sign of life after which a case is given up.",
            min=5,
            rich_help_panel=_PROOF,
        ),
    ] = 120,
    sequence_parallel: Annotated[
        bool,
        typer.Option(
            "--sequence-parallel/--no-sequence-parallel", help="Of built-in plans.", rich_help_panel=_PROOF
        ),
    ] = True,
    static: Annotated[
        bool,
        typer.Option(
            "--static",
            help="Only what needs no ranks: seconds, for any size and tp; proves nothing.",
            rich_help_panel=_PROOF,
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON document on stdout, nothing else.", rich_help_panel=_OUTPUT),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the page and the data.", show_default="none", rich_help_panel=_OUTPUT),
    ] = None,
) -> int:
    """Prove on real ranks that a plan trains the model it should: outputs, loss, every gradient, and two optimizer steps.

    The same weights run unsharded and sharded. What may differ is what rounding does to the unsharded model itself. What differs more is
    named: the parameter, the rule, and the most likely reason. Exit code 1 if a plan is wrong, crashes, or shards nearly nothing; with
    --static, if a check without ranks finds something.

    [dim]shardwise verify rowwise colwise routed[/]
    [dim]shardwise verify --model hf:qwen3 --model hf:apertus[/]
    [dim]shardwise verify --static --model hf:path/config.json --mesh tp=8[/]
    [dim]shardwise verify my-plan.toml --model mypackage.models:build --mesh tp=4 --out page[/]
    """
    shape = Mesh.parse(mesh)
    check_choice("--dtype", dtype, _DTYPES)
    check_choice("--size", size, _SIZES)
    check_choice("--device", device, _DEVICES)
    if shape.world_size != shape.tp or shape.tp < 2:
        raise OptionError(
            f"--mesh {mesh}: verify compares one tp axis of two ranks or more with one rank. Use --mesh tp=2."
        )
    if seq % shape.tp:
        raise OptionError(
            f"--seq {seq} is no multiple of tp={shape.tp}, as sequence parallelism needs. Use {-(-seq // shape.tp) * shape.tp}."
        )
    console = Console(stderr=as_json)
    from shardwise.cli.progress import ProgressLine
    from shardwise.launch import is_main

    with ProgressLine() as progress:
        done = 0

        def on_answer(answer: "Verification", total: int) -> None:
            nonlocal done
            done += 1
            progress.advance(done, total, f"{answer.model} under {answer.plan}: {answer.verdict}")

        progress.say("tracing" if static else "starting ranks")
        run = prove_plans(
            models or [DEFAULT_MODEL],
            plans or [],
            tp=shape.tp,
            batch=batch,
            seq=seq,
            small=None if size == "auto" else size == "small",
            dtype=None if dtype == "auto" else dtype,
            device=device,
            sequence_parallel=sequence_parallel,
            timeout_s=timeout,
            static=static,
            on_answer=on_answer,
        )
    return _deliver(run, console, as_json=as_json, out=out) if is_main() else 0


def prove_plans(
    models: list[str],
    plans: list[str],
    *,
    tp: int,
    batch: int,
    seq: int,
    small: bool | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    sequence_parallel: bool = True,
    timeout_s: float = 120.0,
    static: bool = False,
    on_answer: "Callable[[Verification, int], None]" = lambda *_: None,
) -> "VerificationRun":
    """Each model under each plan, named as a user names them; no plan means the model's own. static: without ranks. See shardwise.testing."""
    from shardwise.core.verification import VerificationRun
    from shardwise.launch import is_main
    from shardwise.verify.run import verify as run_cases
    from shardwise.verify.without_ranks import check

    started = datetime.now(UTC)
    mesh = Mesh.of({Role.CUTS_TENSORS: tp})
    cases = _cases(models, plans, seq, small, dtype, sequence_parallel)
    if static:
        checked = (
            check(
                cases, mesh=mesh, batch=batch, seq=seq, on_answer=lambda answer: on_answer(answer, len(cases))
            )
            if is_main()
            else ()
        )
        return VerificationRun(
            str(mesh), "none", batch, seq, started.isoformat(timespec="seconds"), _versions(), checked
        )
    found = run_cases(
        cases,
        mesh=mesh,
        device_type=device,
        batch=batch,
        seq=seq,
        timeout_s=timeout_s,
        on_answer=lambda answer: on_answer(answer, len(cases)),
    )
    return VerificationRun(
        str(mesh), device, batch, seq, started.isoformat(timespec="seconds"), _versions(), found
    )


def _cases(
    models: list[str],
    plans: list[str],
    seq: int,
    small: bool | None,
    dtype: str | None,
    sequence_parallel: bool,
) -> "list[Case]":
    """Each model under each plan, looked at here, so that a typo costs no ranks."""
    from shardwise.core.plan import Plan
    from shardwise.models.source import find_model
    from shardwise.parallel.plans import load_any_plan
    from shardwise.verify.case import Case

    cases = []
    for model in models:
        source = find_model(model)
        check_seq(seq, source)
        for name in plans or [str(TheirPlan.HF) if model.startswith("hf:") else "rowwise"]:
            plan = load_any_plan(name, sequence_parallel=sequence_parallel, family=source.family)
            if plan is TheirPlan.UNSHARDED:
                raise OptionError('plan "unsharded" has nothing to verify. Name a plan that shards.')
            is_ours = isinstance(plan, Plan)
            cases.append(
                Case(
                    model,
                    plan.to_toml() if is_ours else str(plan),  # type: ignore[union-attr]
                    plan.name if is_ours else str(plan),
                    small,
                    dtype,
                )
            )
    return cases


def _versions() -> tuple[tuple[str, str], ...]:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("shardwise", "torch", "transformers"):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)


def _deliver(run: "VerificationRun", console: Console, *, as_json: bool, out: Path | None) -> int:
    from shardwise.report.common.deliver import deliver

    cases = [(each.model, each.plan) for each in run.verifications]
    asked = {"cases": cases, "mesh": run.mesh, "device": run.device}
    deliver(run, "json" if as_json else "terminal", console, out, settings=asked)
    return 1 if run.is_no else 0
