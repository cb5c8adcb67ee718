"""Runs a style for real on a toy and a few ranks, and records what each rank has at each step."""

from collections.abc import Callable, Mapping

from shardwise.core.errors import OptionError
from shardwise.core.walkthrough import Held, Sizes, Walkthrough
from shardwise.walkthrough import attention, experts, pipeline
from shardwise.walkthrough.run import Run, run_rank, run_whole
from shardwise.walkthrough.scene import Recorded
from shardwise.walkthrough.steps import Steps
from shardwise.walkthrough.subject import Subject, subject_named
from shardwise.walkthrough.thread_ranks import on_threads
from shardwise.walkthrough.toy import TOYS

RANKS = (2, 3, 4)
# kinds of subjects that more than one collective makes up
SCENES: Mapping[str, Callable[[Subject, int], Recorded]] = {
    "experts": experts.record,
    "attention": attention.record,
    "layers": pipeline.record,
}


def record_walkthrough(subject: str, *, ranks: int = 2, module: str | None = None) -> Walkthrough:
    """Runs the subject's style on `ranks` ranks (2, 3 or 4) and records it. module: the name to call the
    module by.

    Raises OptionError for an unknown subject or another number of ranks.
    """
    about = subject_named(subject)
    if ranks not in RANKS:
        raise OptionError(
            f"a walk-through on {ranks} ranks is not offered. Allowed: {', '.join(map(str, RANKS))}."
        )
    if about.kind in SCENES:
        scene = SCENES[about.kind](about, ranks)
        return Walkthrough(subject, module or about.module, scene.sizes, scene.steps, scene.held)
    toy = TOYS[about.kind](about, ranks)
    whole = on_threads(1, lambda *_: run_whole(toy))[0]
    runs = on_threads(ranks, lambda rank, mesh, log: run_rank(toy, rank, mesh, log))
    sizes = Sizes(
        ranks=ranks,
        batch=1,
        sequence=toy.sequence,
        hidden=toy.hidden,
        element_bytes=whole.parameter.element_size(),
        vocabulary=toy.vocabulary,
        features=toy.features,
    )
    held = tuple(_held(rank, run) for rank, run in enumerate(runs))
    return Walkthrough(subject, module or about.module, sizes, tuple(Steps(toy, whole, runs).all()), held)


def _held(rank: int, run: Run) -> Held:
    return Held(
        rank, tuple(run.parameter.shape), run.parameter.nbytes, tuple(run.gradient.shape), run.gradient.nbytes
    )
