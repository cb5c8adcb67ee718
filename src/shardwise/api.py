"""The verbs as one calls them from Python: a Case in, a Result out, which a notebook shows as the page that
--out writes.

    case = shardwise.case(model="llama3-debug", mesh="tp=2", plans=["rowwise", "colwise"])
    shardwise.explain(case)
    shardwise.compare(case, rounds=5).to_html("report.html")

What only one verb knows are keywords, by the names of the command's options. Raised are the errors of
shardwise.core.errors, of one line each. Ranks and workers are processes that import nothing of the caller's
script: it needs no `if __name__ == "__main__":`, and a notebook can compare."""

import html
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from shardwise.core.case import Case
from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh, Role
from shardwise.core.plan import suggest
from shardwise.verbs.progress import Progress, silent

if TYPE_CHECKING:
    from shardwise.core.beside import Beside
    from shardwise.core.difference import Difference, RunProfile
    from shardwise.core.dims import Dims
    from shardwise.core.explanation import Contrast, Explanation
    from shardwise.core.export import Export
    from shardwise.core.look_up import LookUps
    from shardwise.core.made_plan import MadePlan
    from shardwise.core.measurement import Comparison
    from shardwise.core.prediction_run import PredictionRun
    from shardwise.core.sample import Calibration
    from shardwise.core.search import Search
    from shardwise.core.sweep import Sweep
    from shardwise.core.token_folder import TokenFolder
    from shardwise.core.training import Training
    from shardwise.core.verification import VerificationRun

Answer = TypeVar("Answer")
HEIGHT = 640
WIDTH = 100


@dataclass(frozen=True, slots=True, repr=False)
class Result(Generic[Answer]):
    """What a verb found. answer: the noun, with all numbers. str() and a prompt show what a terminal
    shows."""

    answer: Answer
    page: Callable[[], Mapping[str, object]] = field(default=dict, compare=False)

    def to_json(self) -> str:
        """The document that the command writes with --json."""
        return self._text("json")

    def to_html(self, path: str | Path) -> Path:
        """Writes the page, which needs no network; returns its path."""
        path = Path(path)
        path.write_text(self._text("html", **self.page()), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        """For notebooks: the page in a frame, so that its styles stay its own."""
        page = html.escape(self._text("html", **self.page()))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: {HEIGHT}px; border: 0"></iframe>'

    def __str__(self) -> str:
        from rich.console import Console

        from shardwise.report.common.deliver import show

        text = io.StringIO()
        show(self.answer, "terminal", Console(file=text, width=WIDTH, no_color=True))
        return text.getvalue()

    def __repr__(self) -> str:
        return str(self)

    def _text(self, form: str, **page: object) -> str:
        from shardwise.report.common.formats import format_named
        from shardwise.report.common.room import room_of

        (content,) = format_named(form).files(room_of(self.answer), self.answer, **page).values()
        return bytes(content).decode()


def case(**keys: Any) -> Case:
    """What is asked of a verb, from plain values: case(model="llama3-8b", mesh="tp=8", plans=["rowwise"],
    seq=4096).

    The keys are those of a case file and of the commands' options: model, mesh, plans, machine, device,
    sequence_parallel, context_attention, batch, seq, dtype, param_dtype, reduce_dtype, accumulation,
    reshard_after_forward, reduce_once, recompute, recompute_layers, optimizer_kernel, learning_rate,
    max_norm, seed, text, tokenizer, random_ids. Raises OptionError for an unknown one."""
    return Case.of(**{"model": "llama3-debug", "mesh": "tp=2", **keys})


def explain(case: Case, *, progress: Progress = silent, **options: Any) -> "Result[Explanation | Contrast]":
    """What the case's first plan does and why, and `against`, a second plan, beside it. No ranks, no GPU."""
    from shardwise.verbs.explain import ExplainOptions
    from shardwise.verbs.explain import explain as run

    return Result(run(case, _made(ExplainOptions, options), progress).answer)


def plan(case: Case, *, progress: Progress = silent, **options: Any) -> "Result[MadePlan]":
    """A native plan for the case's model on its mesh, whatever the model, with the reason for each rule. No
    ranks, no GPU. answer.plan is the Plan; answer.to_toml() its file."""
    from shardwise.verbs.plan import PlanOptions
    from shardwise.verbs.plan import plan as run

    return Result(run(case, _made(PlanOptions, options), progress))


def dims(case: Case, *, progress: Progress = silent) -> "Result[Dims]":
    """Which dims of the model's weights must be cut together, and why others can't be; what explain --dims
    shows. Beside each weight stands what the case's first plan does with it, if there is one."""
    from shardwise.verbs.plan import dims as run

    return Result(run(case, progress))


def verify(
    case: Case, *, models: Sequence[str] = (), progress: Progress = silent, **options: Any
) -> "Result[VerificationRun]":
    """Whether each of the case's plans trains its model right, or each of `models`: proved on tp ranks of
    this machine, or with static=True checked without any."""
    from shardwise.verbs.verify import VerifyOptions
    from shardwise.verbs.verify import verify as run

    return Result(run(case, _made(VerifyOptions, options), progress, models=models))


def compare(
    case: Case, *, out: str | Path | None = None, progress: Progress = silent, **options: Any
) -> "Result[Comparison]":
    """Which of the case's plans is better, and by how much: each proved, then timed on ranks of this machine.
    An answer without measurements says what is wrong. out: a folder for events as they come, and for the
    traces of profile=True."""
    from shardwise.files.run_folder import RunFolder, check_free
    from shardwise.verbs.compare import CompareOptions
    from shardwise.verbs.compare import compare as run

    started = datetime.now(UTC)
    if out is not None:
        check_free(Path(out))
    folder = None if out is None else (lambda: RunFolder(Path(out), "compare", started))
    with _no_script():
        done = run(case, _made(CompareOptions, options), progress, open_folder=folder)
    assert done.answer is not None, "torchrun's other ranks have no answer"
    return Result(done.answer)


def diff(
    first: str | Path,
    second: str | Path | None = None,
    *,
    case: Case | None = None,
    progress: Progress = silent,
    **options: Any,
) -> "Result[Difference | RunProfile | Beside]":
    """Where the time of a profiled run's steps went, and of a second one's beside it. Of the two, one may be
    a saved prediction; case: it is predicted, and laid beside the first."""
    from shardwise.verbs.diff import DiffOptions
    from shardwise.verbs.diff import diff as run

    with _no_script():
        done = run(first, second, _made(DiffOptions, options), progress, case=case)
    return Result(done.answer, lambda: {"pictures": done.pictures()})


def predict(case: Case, *, progress: Progress = silent, **options: Any) -> "Result[PredictionRun]":
    """Time and memory of each of the case's plans on its machine, term by term. No ranks, no GPU."""
    from shardwise.verbs.predict import PredictOptions
    from shardwise.verbs.predict import predict as run

    return Result(run(case, _made(PredictOptions, options), progress).answer)


def sweep(
    case: Case,
    *,
    devices: int | None = None,
    micro_batches: Sequence[int] = (1, 2, 4, 8),
    progress: Progress = silent,
    **options: Any,
) -> "Result[Sweep]":
    """predict over every mesh of so many devices (by default as many as the case's mesh has), and sizes of
    micro-batches. Of the case's own mesh only its context ranks are kept."""
    from shardwise.verbs.predict import PredictOptions
    from shardwise.verbs.sweep import SweepOptions
    from shardwise.verbs.sweep import sweep as run

    asked = SweepOptions(devices or case.mesh.world_size, tuple(micro_batches))
    case = replace(case, mesh=Mesh.of({Role.CUTS_SEQUENCE: case.mesh.context}))
    with _no_script():
        return Result(run(case, asked, _made(PredictOptions, options), progress))


def look_up(
    case: Case,
    *,
    degrees: Sequence[int] = (),
    batches: Sequence[int] = (),
    progress: Progress = silent,
    **options: Any,
) -> "Result[LookUps]":
    """The table of token ids alone, under each of the case's plans (by default the five styles), on `degrees`
    tensor-parallel ranks (by default the case's tp) and batches of so many sequences: which is best where."""
    from shardwise.verbs.look_up import LookUpOptions
    from shardwise.verbs.look_up import look_up as run
    from shardwise.verbs.predict import PredictOptions

    asked = LookUpOptions(tuple(degrees), tuple(batches))
    return Result(run(case, asked, _made(PredictOptions, options), progress))


def export(case: Case, *, progress: Progress = silent, **options: Any) -> "Result[Export]":
    """The case's first plan as files of a framework (framework="pytorch", "hf", ...): answer.files, each with
    its name and text; what the format can't say in answer.left_out, and what that costs in answer.cost."""
    from shardwise.verbs.export import ExportOptions
    from shardwise.verbs.export import export as run

    return Result(run(case, _made(ExportOptions, options), progress))


def search(case: Case, *, progress: Progress = silent, **options: Any) -> "Result[Search]":
    """The best plan for the case's model on its machine, its runners-up, and its proof; the case's plans
    and mesh don't count. answer.found[0].plan is the best plan's file."""
    from shardwise.verbs.search import SearchOptions
    from shardwise.verbs.search import search as run

    with _no_script():
        return Result(run(case, _made(SearchOptions, options), progress))


def train(case: Case, out: str | Path, *, progress: Progress = silent, **options: Any) -> "Result[Training]":
    """Trains the case's model under its first plan, with the folder `out`; with resume=True goes on from its
    newest checkpoint. answer.ended says how it went; steps.jsonl has every step."""
    from shardwise.core.training import TrainOptions
    from shardwise.files.run_folder import RunFolder, check_free
    from shardwise.verbs.train import train as run

    def open_folder(goes_on: bool) -> RunFolder:
        if goes_on:
            return RunFolder.again(Path(out))
        return RunFolder(Path(out), "train", datetime.now(UTC), has_events=False)

    asked = _made(TrainOptions, options)
    if not asked.resume:
        check_free(Path(out))
    with _no_script():
        done = run(case, asked, progress, open_folder=open_folder)
    if done is None:
        raise OptionError("train: of torchrun's ranks the first one has the answer. Use the command there.")
    return Result(done)


def calibrate(*, device: str = "auto", progress: Progress = silent, **options: Any) -> "Result[Calibration]":
    """This machine, measured: answer.machine is what predict takes. Minutes, or with quick=True seconds."""
    from shardwise.verbs.calibrate import CalibrateOptions
    from shardwise.verbs.calibrate import calibrate as run

    return Result(run(_made(CalibrateOptions, options), progress, device=device))


def tokens(
    out: str | Path,
    *files: str | Path,
    tokenizer: str | Path | None = None,
    text_key: str = "text",
    end_token: str | None = None,
    progress: Progress = silent,
    **options: Any,
) -> "Result[TokenFolder]":
    """Files as token ids in the folder `out`, which text=[out] of a case then names; vocab_size=N instead of
    a tokenizer trains one on them."""
    from shardwise.core.case import TextSource
    from shardwise.verbs.tokens import TokensOptions
    from shardwise.verbs.tokens import tokens as run

    named = None if tokenizer is None else str(tokenizer)
    text = TextSource(tokenizer=named, text_key=text_key, end_token=end_token)
    asked = _made(TokensOptions, {"files": tuple(map(str, files)), **options})
    return Result(run(Path(out), text, asked, progress))


def check_tokens(folder: str | Path, *, progress: Progress = silent) -> "Result[TokenFolder]":
    """A folder of tokens, read whole: answer.problems has what isn't as its manifest says."""
    from shardwise.verbs.tokens import check_tokens as run

    return Result(run(Path(folder), progress))


@contextmanager
def _no_script() -> Iterator[None]:
    """multiprocessing's workers import the script that started them; ours have no use for it, and it may have
    no guard against running twice."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _made(noun: Any, options: dict[str, Any]) -> Any:
    """A verb's options. Raises OptionError for one that it doesn't know."""
    known = [each.name for each in fields(noun)]
    for name in options:
        if name not in known:
            raise OptionError(f'unknown option "{name}".{suggest(name, known)} Allowed: {", ".join(known)}.')
    return noun(**options)
