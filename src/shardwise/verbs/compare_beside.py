"""What compare predicts of its own plans, to be laid beside their profiles: nothing here starts a rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardwise.core.beside import Beside, PredictedStep
from shardwise.core.case import Case
from shardwise.core.difference import RunProfile, StepPicture
from shardwise.core.errors import OptionError
from shardwise.core.timeline import Timeline
from shardwise.verbs.predict import predict
from shardwise.verbs.progress import Progress


@dataclass(frozen=True, slots=True)
class Side:
    """A plan's predicted step, and as a Timeline."""

    step: PredictedStep
    timelines: tuple[Timeline, ...]


@dataclass(frozen=True, slots=True)
class Laid:
    """A plan's prediction beside its profile. pictures: the predicted step, then the measured one."""

    both: Beside
    pictures: tuple[StepPicture, ...]


def predicted_sides(
    case: Case, plans: Sequence[str], labels: Sequence[str], device: str, progress: Progress
) -> tuple[Side, ...]:
    """Each plan's step on the case's machine, which is the one that runs. device: cpu or cuda. Raises
    InputError for what can't be predicted."""
    from shardwise.predict.machines import load_machine

    assert case.machine is not None
    machine = load_machine(case.machine)
    if machine.device != device:
        raise OptionError(
            f"--machine {case.machine}: describes {machine.device} devices, and the ranks run on {device}. "
            f"Give the file of this machine (shardwise calibrate --device {device} writes one), or leave it "
            "out."
        )
    done = predict(replace(case, plans=tuple(plans)), progress=progress)
    steps = [step for _, step in done.line_by_line()]
    drawn = [timelines for name, _, timelines in done.timelines() if name.startswith("timeline-")]
    return tuple(
        Side(replace(step, label=label), tuple(timelines))
        for step, label, timelines in zip(steps, labels, drawn, strict=True)
    )


def laid(side: Side, run: RunProfile, timelines: Sequence[Timeline], drawn: Sequence[StepPicture]) -> Laid:
    """drawn: pictures of the run. Raises InputError where the prediction is of another step than ran."""
    from shardwise.profiles.beside import beside
    from shardwise.profiles.picture import picture

    predicted = picture(f"{side.step.label}, predicted", side.timelines)
    pictures = (*([predicted] if predicted is not None else []), *drawn)
    return Laid(beside(side.step, run, timelines), pictures)
