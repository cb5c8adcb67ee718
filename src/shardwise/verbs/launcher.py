"""launcher: a case and a job -> Launcher: what starts a command of shardwise on all hosts. No ranks, no
torch."""

import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from shardwise.core.case import Case, words_of
from shardwise.core.errors import OptionError
from shardwise.core.export import File
from shardwise.core.launcher import Job, Launcher, LauncherOptions, Mount
from shardwise.core.option import Asked, options_of
from shardwise.core.shown import shown
from shardwise.files.launchers import target_named
from shardwise.files.launchers.kubernetes import CARRIED

DEVICES_PER_HOST = 8
LARGEST_CARRIED = 900_000  # bytes; a ConfigMap may have 1 MiB
PLANS, SUFFIX = "plans", ".toml"


def launcher(
    case: Case, options: LauncherOptions | None = None, *, given: Collection[str], config: str | None = None
) -> Launcher:
    """given: the case's keys that the command is told; the others it is to choose. config: of the case file
    that it reads. Raises OptionError where mesh and hosts don't fit, for words that don't print, and for what
    the target can't do without."""
    options = options or LauncherOptions()
    _check_folder(options, config)
    hosts, ranks = _shared_out(case, options, given)
    carried = tuple(_carried(case, config)) if options.target == "kubernetes" else ()
    target = target_named(options.target)
    job = Job(
        options.name,
        tuple(_words(case, options, given, config, {name for name, _ in carried})),
        hosts,
        ranks,
        case.device != "cpu",
        max(1, round(options.hours * 60)),
        options.max_restarts,
        options.port,
        shlex.join(_made_by(case, options, given, config)),
        options.image,
        tuple(map(Mount.of, options.mount)),
        options.partition,
        tuple(file for _, file in carried),
    )
    _check_printable([*job.words, job.made_by, job.image or "", *options.mount])
    name = f"{options.name}.{target.SUFFIX}"
    file = File(name, target.text(job))
    return Launcher(options.target, job.made_by, (file,), hosts, ranks, target.START.format(name))


def _check_folder(options: LauncherOptions, config: str | None) -> None:
    """Raises OptionError for a run of training that nothing gives a folder."""
    is_named = any(word.partition("=")[0] == "--out" for word in _split(options.add))
    if options.command == "train" and config is None and not is_named:
        raise OptionError(
            "train needs a folder for its checkpoints, which all hosts see. Add --add '--out /runs/mine'."
        )


def _shared_out(case: Case, options: LauncherOptions, given: Collection[str]) -> tuple[int, int]:
    """(hosts, ranks of each)."""
    if "mesh" not in given:
        raise OptionError("no mesh is named. Add --mesh, such as fsdp=8,tp=8, or a --config that has one.")
    world = case.mesh.world_size
    ranks = options.gpus or (world // options.hosts if options.hosts else min(DEVICES_PER_HOST, world))
    hosts = options.hosts or -(-world // max(1, ranks))
    if hosts * ranks != world:
        raise OptionError(
            f"--mesh {case.mesh}: has {world} ranks, and {hosts} hosts of {ranks} have {hosts * ranks}. Use "
            "--hosts and --gpus whose product is the mesh's."
        )
    return hosts, ranks


def _words(
    case: Case, options: LauncherOptions, given: Collection[str], config: str | None, carried: Collection[str]
) -> Iterator[str]:
    """Of the command, after `shardwise`; files that are carried by where they lie in a pod."""
    yield options.command
    for plan in case.plans if PLANS in given else ():
        yield _there(plan, carried)
    machine = _there(case.machine, carried) if case.machine is not None else None
    yield from words_of(replace(case, machine=machine), set(given) - {PLANS})
    if config is not None:
        yield from ("--config", _there(config, carried))
    yield from _split(options.add)


def _there(name: str, carried: Collection[str]) -> str:
    return f"{CARRIED}/{Path(name).name}" if name in carried else name


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise OptionError(f'--add is "{shown(text)}": {error}. Quote it as in a shell.') from None


def _carried(case: Case, config: str | None) -> Iterator[tuple[str, File]]:
    """(as it was named, file) of the case file, the plans and the machine that are files here. Raises
    OptionError for two that are called alike, and for more than a ConfigMap holds."""
    names = [
        name for name in (config, *case.plans, case.machine) if name is not None and Path(name).is_file()
    ]
    found: dict[str, str] = {}
    total = 0
    for name in dict.fromkeys(names):
        path = Path(name)
        if found.setdefault(path.name, name) != name:
            raise OptionError(
                f"{shown(name)} and {shown(found[path.name])}: two files of one name can't lie in one folder "
                "of a pod. Rename one."
            )
        text = _read(path)
        total += len(text.encode())
        if total > LARGEST_CARRIED:
            raise OptionError(
                f"{shown(name)}: more than {LARGEST_CARRIED:,} bytes can't go into a ConfigMap. Put it on a "
                "--mount."
            )
        yield name, File(path.name, text)


def _read(path: Path) -> str:
    if not all(each.isascii() and (each.isalnum() or each in "-_.") for each in path.name):
        raise OptionError(
            f"{shown(path.name)}: the name of a file in a ConfigMap has letters, digits, dots, hyphens and "
            "underscores alone. Rename it."
        )
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_CARRIED + 1).decode("utf-8")
    except OSError as error:
        raise OptionError(f"{shown(path)}: {error.strerror}. Give a file that can be read.") from None
    except UnicodeDecodeError:
        raise OptionError(f"{shown(path)}: not UTF-8 text.") from None


def _made_by(
    case: Case, options: LauncherOptions, given: Collection[str], config: str | None
) -> Iterator[str]:
    yield from ("shardwise", "launcher")
    yield from words_of(case, given)
    if config is not None:
        yield from ("--config", config)
    for asked in options_of(LauncherOptions):
        value = getattr(options, asked.field)
        if asked.field == "target" or value != asked.default:
            yield from _option(asked, value)


def _option(asked: Asked, value: object) -> Iterator[str]:
    for each in value if isinstance(value, tuple) else (value,):
        yield from (asked.flag, f"{each:g}" if isinstance(each, float) else str(each))


def _check_printable(words: Sequence[str]) -> None:
    """What doesn't print could end a comment, or a line."""
    for word in words:
        if not word.isprintable():
            raise OptionError(f'"{shown(word)}": has characters that don\'t print. Leave them out.')
