"""`shardwise export`: a plan as files for a framework."""

from dataclasses import dataclass
from pathlib import Path

from shardwise.cli.asked import STEP, Call, Command, command
from shardwise.cli.output import TERMINAL
from shardwise.cli.progress import ProgressLine
from shardwise.core.errors import OptionError
from shardwise.core.export import Export, File
from shardwise.core.shown import shown
from shardwise.files.run_folder import check_makeable
from shardwise.report.common.streams import write_out
from shardwise.verbs.export import ExportOptions
from shardwise.verbs.export import export as make
from shardwise.verbs.predict import MACHINE


@dataclass(frozen=True, slots=True)
class _Asked(ExportOptions):
    pass


@command(
    Command(
        _Asked,
        shared=(*STEP, "learning_rate", "max_norm"),
        defaults={"model": "llama3-debug", "mesh": "tp=2", "machine": MACHINE},
        about={
            "plans": "The plan: a built-in one, a .toml file, or unsharded for FSDP alone.",
            "machine": "On which it is predicted what is lost by what the format can't say.",
        },
        one_plan=True,
        out="Folder for the files; without it they go to stdout.",
        check_out=lambda out, values: check_makeable(out),
    )
)
def export(call: Call[_Asked]) -> int:
    """Write a plan for the framework that you have: code that runs without Shardwise, or what it reads.

    toml: the plan and the case. pytorch: parallelize_module, loss_parallel, FSDP2 and a training step in one
    file. hf: transformers' tp_plan. torchtitan: ShardingConfigs and a config function. automodel: a
    tp_shard_plan. What a format can't say is named, with what it costs to leave it out.

    [dim]shardwise export rowwise --model llama3-8b --mesh fsdp=8,tp=8 --as pytorch --out mine[/]
    [dim]shardwise export mine.toml --as hf --model hf:qwen3 --mesh tp=2[/]
    [dim]shardwise verify own --model sharded:build --mesh tp=2[/]
    """
    with ProgressLine() as progress:
        made = make(call.case, call.own, progress, folder=call.output.out)
    folder = call.output.out
    if folder is not None:
        _write(folder, made)
    if call.output.form != TERMINAL or folder is not None:
        call.output.show(made)
        return 0
    for file in made.files:
        write_out(file.text.encode())
    return 0


def _write(folder: Path, made: Export) -> None:
    """Raises OptionError where a file stands in the way that Shardwise hasn't made."""
    for file in made.files:
        path = folder / file.name
        if path.exists() and not _is_ours(path):
            raise OptionError(
                f"--out {shown(folder)}: {file.name} is there, and shardwise export hasn't made it. Name "
                "another folder."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in made.files:
            _put(folder, file)
    except OSError as error:
        raise OptionError(f"--out {shown(folder)}: {error.strerror}. Name another folder.") from None


def _put(folder: Path, file: File) -> None:
    (folder / file.name).write_text(file.text, encoding="utf-8")


def _is_ours(path: Path) -> bool:
    from shardwise.export.heads import MARK

    try:
        with path.open(encoding="utf-8") as text:
            return text.readline().startswith(f"# {MARK}shardwise export")
    except (OSError, UnicodeDecodeError):
        return False
