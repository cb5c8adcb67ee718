"""`shardwise launcher`: a script or a manifest that starts a command on all hosts of a job."""

from pathlib import Path

from shardwise.cli.asked import ALL, Call, Command, Shown, command, refuse
from shardwise.core.errors import OptionError
from shardwise.core.export import File
from shardwise.core.launcher import Launcher, LauncherOptions
from shardwise.core.shown import shown
from shardwise.files.launchers import MARK
from shardwise.files.run_folder import check_makeable
from shardwise.report.common.streams import write_out
from shardwise.verbs.launcher import launcher as make


@command(
    Command(
        LauncherOptions,
        shared=ALL,
        defaults={"model": Shown("the command's own"), "mesh": Shown("none: it must be named")},
        about={"device": "auto and cuda ask for GPUs; cpu for none."},
        has_json=False,
        out="Folder for the file; without it it goes to stdout.",
        check_out=lambda out, values: check_makeable(out),
    )
)
def launcher(call: Call[LauncherOptions]) -> int:
    """Write what starts a command on many hosts: a script for torchrun or Slurm, or a Kubernetes manifest.

    On each host torchrun starts its ranks, which meet at the first host (c10d rendezvous) and are started
    anew after a failure. What the command is asked is a case: options, or a case file. The file begins with
    the command that made it; each word in it is quoted.

    [dim]shardwise launcher --for slurm --config found/case-1.toml --add '--out /runs/mine' --out jobs[/]
    [dim]shardwise launcher mine.toml --model llama3-8b --mesh fsdp=8,tp=8 --add '--out /runs/mine'[/]
    [dim]shardwise launcher --for kubernetes --config case.toml --image team/shardwise --mount runs:/runs[/]
    [dim]shardwise launcher rowwise colwise --mesh tp=16 --gpus 8 --command compare --for slurm[/]
    """
    from shardwise.cli.main import verbs

    what = verbs().get(call.own.command)
    known = {asked.key for asked in what.asked()} if what is not None else set(ALL)
    refuse(call.typed - known, ALL, f"{call.own.command} has no such option")
    made = make(call.case, call.own, given=call.given & known & set(ALL), config=call.config)
    folder = call.output.out
    if folder is None:
        for file in made.files:
            write_out(file.text.encode())
        return 0
    for file in made.files:
        _write(folder, file)
    call.output.say(told(made, folder))
    return 0


def told(made: Launcher, folder: Path) -> str:
    hosts = f"{made.hosts} host{'s' * (made.hosts > 1)} of {made.ranks_of_a_host} ranks"
    return f"{folder / made.files[0].name}: {hosts}. Start it in that folder, {made.start}"


def _write(folder: Path, file: File) -> None:
    """Raises OptionError where a file stands in the way that isn't ours."""
    path = folder / file.name
    if path.exists() and not _is_ours(path):
        raise OptionError(
            f"--out {shown(folder)}: {file.name} is there, and shardwise launcher hasn't made it. Name "
            "another folder, or --name."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(file.text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"--out {shown(folder)}: {error.strerror}. Name another folder.") from None


def _is_ours(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as text:
            return any(f"# {MARK}shardwise launcher" in text.readline() for _ in range(2))
    except (OSError, UnicodeDecodeError):
        return False
