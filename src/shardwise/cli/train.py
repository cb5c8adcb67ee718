"""`shardwise train`: runs a plan's training step on text, from a proof before it to a checkpoint after it,
through failures."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shardwise.cli.asked import RUN, Call, Command, Shown, command
from shardwise.cli.progress import ProgressLine
from shardwise.core.errors import OptionError, RunError
from shardwise.core.training import Ended, TrainOptions, is_reached
from shardwise.files.run_folder import RunFolder, check_free, holds_run
from shardwise.launch import is_restart, joined
from shardwise.verbs.checks import DEFAULT_PLAN
from shardwise.verbs.train import BATCH, SEQ, Live
from shardwise.verbs.train import train as train_it

_EVERY_S = 10.0
"""Between two lines of a run that has no terminal."""
STOPPED = 4
"""The exit code of a run that was asked to stop and has saved: go on with --resume."""


def _check_out(out: Path, values: Mapping[str, Any]) -> None:
    """A run that goes on has its folder already."""
    if values["resume"]:
        RunFolder.again(out)
    elif not (joined() and holds_run(out)):
        check_free(out)


@command(
    Command(
        TrainOptions,
        shared=(*RUN, "documents", "machine"),
        defaults={
            "plans": Shown(DEFAULT_PLAN),
            "model": "llama3-debug",
            "mesh": "tp=2",
            "batch": BATCH,
            "seq": SEQ,
        },
        about={
            "plans": "A built-in plan, a .toml file, hf or hf-ep (a Hugging Face model's own), own (the "
            "factory shards itself) or unsharded.",
            "machine": "A machine of `shardwise machines`, to predict the step and watch it.",
        },
        out="Folder of the run: settings, steps.jsonl, checkpoints, the page.",
        out_shown="runs/train-TIME",
        check_out=_check_out,
        one_plan=True,
    )
)
def train(call: Call[TrainOptions]) -> int:
    """Train a model under a plan: the very step that explain, verify and predict speak of, on text.

    First the plan is proved on a small twin and, with --machine, predicted. Then the ranks start; when one
    dies or hangs all are started again from the last checkpoint, and the losses are those of a run that
    nothing disturbed. Ctrl-C and SIGTERM save and end with exit code 4; --resume goes on, on this mesh or
    another.

    [dim]shardwise train --mesh fsdp=2,tp=2 --steps 200[/]
    [dim]shardwise train rowwise --text corpus/ --batch 32 --seq 1024 --out run[/]
    [dim]shardwise train --config case.toml --out run --resume --mesh tp=4[/]
    [dim]torchrun --nproc-per-node 8 --max-restarts 3 -m shardwise train --config case.toml --out run[/]
    """
    from shardwise.report.common.deliver import write_all

    out, started, options = call.output.out, datetime.now(UTC), call.own
    if out is None and (options.resume or joined()):
        why = "--resume goes on with a run" if options.resume else "torchrun may start the ranks again"
        raise OptionError(f"--out is missing: {why}, so its folder must be named.")
    again = out is not None and joined() and holds_run(out)
    if again:
        options = replace(options, resume=True)  # torchrun, or who runs it, has started the job again

    folder: RunFolder | None = None

    def open_folder(goes_on: bool) -> RunFolder:
        nonlocal folder
        if goes_on:
            assert out is not None
            folder = RunFolder.again(out)
        else:
            folder = RunFolder(out, "train", started, has_events=False)
        return folder

    with ProgressLine(_EVERY_S) as progress:

        def on_step(live: Live) -> None:
            progress(_line(live), live.record.step, live.steps)

        done = train_it(
            call.case,
            options,
            progress,
            open_folder=open_folder,
            on_step=on_step,
            tell=lambda line: progress.above(line, call.output.say),
            is_restart=again and (is_restart() or not call.own.resume),
        )
    if done is None:
        return 0
    call.output.show(done)
    if folder is not None:
        call.output.say(f"\nPage: {write_all(done, folder)}")
    if done.unsaved is not None:
        return RunError.exit_code
    if done.ended is Ended.DONE and not is_reached(done):
        return 1
    return {Ended.DONE: 0, Ended.REFUSED: 1, Ended.STOPPED: STOPPED}[done.ended]


def _line(live: Live) -> str:
    """Of a step that is done: its loss, and under it the rest."""
    record = live.record
    said = [f"norm {record.gradient_norm:.3g}", f"{record.tokens / record.seconds:,.0f} tokens/s"]
    if live.mfu is not None:
        said.append(f"MFU {live.mfu:.1%}")
    if live.predicted_s is not None:
        said.append(f"{record.seconds / live.predicted_s:.2f} x predicted")
    if record.held_bytes is not None:
        said.append(f"{record.held_bytes / 2**30:.2f} GiB")
    if record.data_s > 0.01 * record.seconds:
        said.append(f"waited {record.data_s / record.seconds:.0%} for text")
    return f"loss {record.loss:.4f}\n{', '.join(said)}"
