"""diff: the profiles of all ranks of one run -> RunProfile; of two -> Difference; a prediction and a profile
-> Beside."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from shardwise.core.beside import Beside, PredictedStep
from shardwise.core.case import Case
from shardwise.core.difference import Difference, RunProfile, StepPicture
from shardwise.core.errors import OptionError, TraceError
from shardwise.core.option import Option, check_options
from shardwise.core.timeline import Timeline
from shardwise.verbs.predict import Predicted, PredictOptions
from shardwise.verbs.predict import predict as predict_case
from shardwise.verbs.progress import Progress, silent

PREDICTED = "predicted"


@dataclass(frozen=True, slots=True)
class DiffOptions(PredictOptions):
    """What only diff knows, and what is assumed where it predicts a side."""

    labels: Annotated[str | None, Option("What to call them, comma-separated.", shown="the files' names")] = (
        None
    )
    workers: Annotated[
        int | None, Option("Files read at once; each takes some memory.", least=1, shown="as many as cores")
    ] = None

    def __post_init__(self) -> None:
        PredictOptions.__post_init__(self)
        check_options(self)


@dataclass(frozen=True, slots=True)
class Diffed:
    """Of one run or two, or of a prediction and a run. timelines: of all ranks on one clock, side by side
    with labels; of a prediction as far as they are known. predicted: which side is one, in the order of
    labels."""

    answer: RunProfile | Difference | Beside
    labels: tuple[str, ...]
    timelines: tuple[tuple[Timeline, ...], ...]

    def pictures(self) -> list[StepPicture]:
        """A step of each side, as far as there is one to draw."""
        from shardwise.profiles.picture import picture

        drawn = [picture(label, each) for label, each in zip(self.labels, self.timelines, strict=True)]
        return [each for each in drawn if each is not None]


def diff(
    first: Path | str,
    second: Path | str | None = None,
    options: DiffOptions | None = None,
    progress: Progress = silent,
    *,
    case: Case | None = None,
) -> Diffed:
    """Trace files, folders with one per rank, or run folders of compare --profile or predict --out; of one
    run of two plans these are compared. Where one side is a prediction and the other a profile, they are laid
    side by side. case: predicted, its first plan, beside `first`. Raises InputError for what can't be read,
    and for what isn't of the same step."""
    from shardwise.profiles.ranks import predicted_steps

    options = options or DiffOptions()
    if case is not None:
        if second is not None:
            raise OptionError(
                f"--predict makes the second side, and {second} is given too. Leave one of them out."
            )
        return _beside_case(Path(first), case, options, progress)
    if second is not None:
        saved = [bool(predicted_steps(Path(each))) for each in (first, second)]
        if saved[0] != saved[1]:
            prediction, profile = (first, second) if saved[0] else (second, first)
            return _beside_saved(Path(prediction), Path(profile), options, progress)
    return _runs(Path(first), None if second is None else Path(second), options, progress)


def _runs(first: Path, second: Path | None, options: DiffOptions, progress: Progress) -> Diffed:
    from shardwise.profiles.collectives import share
    from shardwise.profiles.diff import diff as between
    from shardwise.profiles.ranks import sides
    from shardwise.profiles.run import profile_run

    paths = [first, second] if second is not None else list(sides(first))
    labels = _labels(options.labels, paths)
    read = [_read(path, options.workers, progress) for path in paths]
    progress("comparing" if len(paths) > 1 else "adding up")
    shared = [share(timelines) for timelines in read]
    runs = tuple(profile_run(label, *each) for label, each in zip(labels, shared, strict=True))
    answer = between(*runs) if len(runs) > 1 else runs[0]
    return Diffed(answer, tuple(labels), tuple(timelines for timelines, _ in shared))


# --------------------------------------------------------------------------------------------- predicted


def _beside_saved(prediction: Path, profile: Path, options: DiffOptions, progress: Progress) -> Diffed:
    """A prediction that was saved."""
    from shardwise.files.document import read_document
    from shardwise.profiles.ranks import predicted_steps, read_ranks

    files = predicted_steps(prediction)
    if len(files) > 1:
        listed = ", ".join(each.name for each in files)
        raise TraceError(f"{prediction}: has a step of each plan, {listed}. Give one, such as {files[0]}.")
    step = read_document(files[0].read_bytes(), PredictedStep, str(files[0]))
    drawn = files[0].with_name(files[0].name.replace("step-", "timeline-") + ".gz")
    timelines = read_ranks((drawn,), workers=1) if drawn.exists() else ()
    labels = _labels(options.labels, [prediction, profile]) if options.labels is not None else None
    return _beside(step, timelines, profile, labels, options, progress)


def _beside_case(profile: Path, case: Case, options: DiffOptions, progress: Progress) -> Diffed:
    """A prediction that is made now."""
    from shardwise.profiles.ranks import trace_files

    trace_files(profile)  # what isn't there is said before a model is traced
    done = predict_case(replace(case, plans=case.plans[:1]), options, progress)
    labels = None
    if options.labels is not None:
        labels = _labels(options.labels, [Path(done.steps[0].label), profile])
    step, timelines = predicted_side(done)
    return _beside(step, timelines, profile, labels, options, progress)


def predicted_side(done: Predicted, number: int = 0) -> tuple[PredictedStep, tuple[Timeline, ...]]:
    """One of its plans line by line, and as a Timeline."""
    _, step = list(done.line_by_line())[number]
    drawn = [timelines for name, _, timelines in done.timelines() if name.startswith("timeline-")]
    return step, tuple(drawn[number])


def _beside(
    step: PredictedStep,
    drawn: Sequence[Timeline],
    profile: Path,
    labels: Sequence[str] | None,
    options: DiffOptions,
    progress: Progress,
) -> Diffed:
    from shardwise.profiles.beside import beside
    from shardwise.profiles.collectives import share
    from shardwise.profiles.run import profile_run

    if labels is not None:
        step = replace(step, label=labels[0])
    label = labels[1] if labels is not None else _labels(None, [profile])[0]
    timelines, sharing = share(_read(profile, options.workers, progress))
    progress("laying them side by side")
    both = beside(step, profile_run(label, timelines, sharing), timelines)
    return Diffed(both, (f"{step.label}, {PREDICTED}", label), (tuple(drawn), tuple(timelines)))


# --------------------------------------------------------------------------------------------- reading


def _labels(given: str | None, paths: Sequence[Path]) -> list[str]:
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        if len(names) != len(paths) or not all(names) or len(set(names)) < len(names):
            raise OptionError(
                f"--labels {given[:80]}: give {len(paths)} different name{'s' * (len(paths) > 1)}, "
                "separated by commas."
            )
        return names
    whole = [path.resolve() for path in paths]
    names = [path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".pt.trace") for path in whole]
    if len(set(names)) < len(names) or "traces" in names:
        names = [f"{path.parent.name}/{name}" for path, name in zip(whole, names, strict=True)]
    if len(set(names)) < len(names):
        return [f"{name} ({side})" for name, side in zip(names, "AB", strict=False)]
    return names


def _read(path: Path, workers: int | None, progress: Progress) -> Sequence[Timeline]:
    from shardwise.profiles.ranks import read_ranks, trace_files

    files = trace_files(path)
    done = 0

    def on_read(_: Path) -> None:
        nonlocal done
        done += 1
        progress(f"reading {path}", done, len(files))

    progress(f"reading {path}")
    return read_ranks(files, workers=workers, on_read=on_read)
