"""`shardwise compare`: runs sharding plans on real ranks and says which is better, and by how much."""

from collections.abc import Iterator
from datetime import UTC, datetime

from shardwise.cli.asked import RUN, Call, Command, Shown, command
from shardwise.cli.output import TERMINAL
from shardwise.cli.progress import ProgressLine
from shardwise.core.errors import OptionError
from shardwise.core.pipeline import BALANCED
from shardwise.files.run_folder import RunFolder
from shardwise.verbs.compare import BATCH, SEQ, Compared, CompareOptions
from shardwise.verbs.compare import compare as compare_plans
from shardwise.verbs.compare_checks import DEFAULT_PLANS


@command(
    Command(
        CompareOptions,
        shared=(*RUN, "machine"),
        about={
            "machine": "The file of this machine (shardwise calibrate writes it), or its name: "
            "--profile then lays each plan's prediction beside its profile."
        },
        defaults={
            "plans": Shown(
                f"{' '.join(DEFAULT_PLANS)}, without @dtensor for a model with a tied head; hf for hf:..., "
                "own for what shards itself"
            ),
            "model": "llama3-debug",
            "mesh": "tp=2",
            "batch": BATCH,
            "seq": SEQ,
        },
        out="Folder for HTML and data.",
        out_shown="runs/compare-TIME",
    )
)
def compare(call: Call[CompareOptions]) -> int:
    """Run sharding plans on real ranks and say which is better, and by how much.

    Every plan is checked first: its loss and every gradient must equal the unsharded model's. Then whole
    training steps are timed in interleaved rounds. The first plan runs twice, so the noise is seen.

    [dim]shardwise compare[/]
    [dim]shardwise compare rowwise colwise --mesh tp=4 --seq 1024 --rounds 20[/]
    [dim]shardwise compare rowwise colwise routed --module tok_embeddings[/]
    [dim]shardwise compare rowwise routed --profile[/]
    [dim]shardwise compare rowwise routed --profile --machine mine.toml[/]
    [dim]shardwise compare rowwise mine.toml --text notes/ --tokenizer tokenizer.json --json[/]
    [dim]torchrun --nproc-per-node 8 -m shardwise compare --config llama3_8b_tp8[/]
    """
    if "machine" in call.typed and not call.own.profile and call.case.step.stages != BALANCED:
        raise OptionError(
            "--machine is for what --profile lays beside its profiles, and for --stages balanced. Add one, "
            "or leave it out."
        )
    started = datetime.now(UTC)
    with ProgressLine() as progress:
        done = compare_plans(
            call.case, call.own, progress, open_folder=lambda: RunFolder(call.output.out, "compare", started)
        )
    if done.answer is None or done.folder is None:
        return 0
    from shardwise.files.document import write_document
    from shardwise.report.common.deliver import write_all

    # terminal or JSON first, then files: a disk that is full by now loses nothing that was measured
    if call.output.form != TERMINAL or done.answer.measurements:
        call.output.show(done.answer)
    if not done.answer.measurements:
        done.folder.write("comparison.json", write_document(done.answer))
        for line in done.answer.verdict if call.output.form == TERMINAL else ():
            call.output.say(line)
        return 1
    for name, page in _pages(done):
        done.folder.write(name, page)
    call.output.say(f"\nReport: {write_all(done.answer, done.folder)}")
    return 0


def _pages(done: Compared) -> Iterator[tuple[str, str]]:
    """A page of each plan's profile: the first's alone, the others' beside it; and of each beside its
    prediction, with its data."""
    from shardwise.files.document import write_document
    from shardwise.profiles.diff import diff
    from shardwise.report.diff.beside_html import beside_html
    from shardwise.report.diff.html import difference_html, run_html
    from shardwise.verbs.compare_ranks import folder_name

    for each in done.laid:
        name = f"beside-{folder_name(each.both.predicted.label)}"
        yield f"{name}.html", beside_html(each.both, each.pictures)
        yield f"{name}.json", write_document(each.both).decode()

    for number, (run, pictures) in enumerate(zip(done.runs, done.pictures, strict=True)):
        if number == 0:
            yield f"profile-{folder_name(run.label)}.html", run_html(run, pictures)
        else:
            both = difference_html(diff(done.runs[0], run), [*done.pictures[0], *pictures])
            yield f"diff-{folder_name(run.label)}.html", both
