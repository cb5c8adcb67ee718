"""Launcher: a command of shardwise on all hosts of a job, written as a script or a manifest. Standard library
only."""

import re
from dataclasses import dataclass
from typing import Annotated

from shardwise.core.errors import OptionError
from shardwise.core.export import File
from shardwise.core.option import Option, check_options
from shardwise.core.shown import shown

PANEL = "The job"
TARGETS = ("torchrun", "slurm", "kubernetes")
COMMANDS = ("train", "compare", "verify")
# of Kubernetes (RFC 1123, with room for a pod's number), so that every target takes it
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?")
_PARTITION = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class LauncherOptions:
    """What only launcher knows. hosts, gpus: None where the mesh decides."""

    target: Annotated[
        str, Option(f"What starts the hosts: {', '.join(TARGETS)}.", PANEL, choices=TARGETS, flag="--for")
    ] = TARGETS[0]
    command: Annotated[str, Option(f"What runs on them: {', '.join(COMMANDS)}.", PANEL, choices=COMMANDS)] = (
        COMMANDS[0]
    )
    add: Annotated[
        str,
        Option(
            "More words of that command, quoted as in a shell: --add '--steps 1000 --out /runs/mine'.",
            PANEL,
            shown="none",
        ),
    ] = ""
    hosts: Annotated[int | None, Option("Of the job.", PANEL, 1, shown="as many as the mesh needs")] = None
    gpus: Annotated[
        int | None, Option("Of a host, or with --device cpu its ranks.", PANEL, 1, shown="8, or all ranks")
    ] = None
    name: Annotated[str, Option("The job's.", PANEL)] = "shardwise"
    hours: Annotated[float, Option("Time limit.", PANEL, 0.02)] = 24.0
    max_restarts: Annotated[
        int, Option("How often torchrun starts all ranks anew after one has failed.", PANEL, 0)
    ] = 3
    port: Annotated[int, Option("On which the first host has the rendezvous.", PANEL, 1, 65535)] = 29400
    image: Annotated[
        str | None, Option("A container's, with Shardwise in it; Kubernetes needs one.", PANEL, shown="none")
    ] = None
    mount: Annotated[
        tuple[str, ...],
        Option(
            "Into the container, WHAT:PATH: a folder of the host, or for Kubernetes a PersistentVolumeClaim. "
            "Repeat it for others.",
            PANEL,
            shown="none",
        ),
    ] = ()
    partition: Annotated[str | None, Option("Slurm's.", PANEL, shown="Slurm's default")] = None

    def __post_init__(self) -> None:
        check_options(self)
        if not self.hours < float("inf"):
            raise OptionError(f"--hours is {self.hours}. Use a number of hours.")
        if self.port > 65535:
            raise OptionError(f"--port is {self.port}. Use 1 to 65535.")
        if not _NAME.fullmatch(self.name):
            raise OptionError(
                f'--name is "{shown(self.name)}". Use at most 50 small letters, digits and hyphens, a letter '
                "first and no hyphen last."
            )
        if self.partition is not None and not _PARTITION.fullmatch(self.partition):
            raise OptionError(
                f'--partition is "{shown(self.partition)}". Use letters, digits, dots, hyphens '
                "and underscores."
            )
        for each in self.mount:
            Mount.of(each)


@dataclass(frozen=True, slots=True)
class Mount:
    """source: a folder of the host where it is absolute, else a claim's name. path: in the container."""

    source: str
    path: str

    @classmethod
    def of(cls, text: str) -> "Mount":
        """Raises OptionError for what isn't WHAT:PATH."""
        source, colon, path = text.partition(":")
        if not (source and colon and path.startswith("/")) or ":" in path or "," in text:
            raise OptionError(
                f'--mount is "{shown(text)}". Write WHAT:PATH, such as /data:/data, without commas and '
                "further colons."
            )
        if not source.startswith("/") and not _NAME.fullmatch(source):
            raise OptionError(
                f'--mount is "{shown(text)}": {shown(source)} is neither an absolute path nor the name of a '
                "claim."
            )
        return cls(source, path)

    @property
    def is_folder(self) -> bool:
        return self.source.startswith("/")


@dataclass(frozen=True, slots=True)
class Job:
    """What a launcher is written of. words: of the command, after `shardwise`. carried: files that it reads,
    for a target whose hosts don't see this one's. made_by: the command that makes the launcher again."""

    name: str
    words: tuple[str, ...]
    hosts: int
    ranks_of_a_host: int
    has_gpus: bool
    minutes: int
    max_restarts: int
    port: int
    made_by: str
    image: str | None = None
    mounts: tuple[Mount, ...] = ()
    partition: str | None = None
    carried: tuple[File, ...] = ()

    def torchrun(self, endpoint: str, run_id: str) -> tuple[str, ...]:
        """The words that start a host's ranks; those of endpoint and run_id are taken as they are."""
        return (
            "torchrun",
            f"--nnodes={self.hosts}",
            f"--nproc-per-node={self.ranks_of_a_host}",
            f"--max-restarts={self.max_restarts}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint}:{self.port}",
            f"--rdzv-id={run_id}",
            "-m",
            "shardwise",
            *self.words,
        )


@dataclass(frozen=True, slots=True)
class Launcher:
    """files: one, which begins with the command that makes it. start: what to type, in their folder."""

    target: str
    command: str
    files: tuple[File, ...]
    hosts: int
    ranks_of_a_host: int
    start: str
