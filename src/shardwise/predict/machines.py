"""The machines that a command can name: files that come with Shardwise, or a file of the user's. Opens files,
bounded in size."""

from importlib import resources
from pathlib import Path

from shardwise.core.errors import MachineError
from shardwise.core.machine import Machine
from shardwise.core.plan import suggest
from shardwise.core.shown import shown
from shardwise.files.machine_file import machine_from_toml

SUFFIX = ".toml"
LARGEST_FILE = 1_000_000  # bytes; one with every measured curve has a tenth of it


def machine_names() -> tuple[str, ...]:
    """Of the machines that come with Shardwise, sorted."""
    folder = resources.files("shardwise") / "machines"
    return tuple(
        sorted(entry.name.removesuffix(SUFFIX) for entry in folder.iterdir() if entry.name.endswith(SUFFIX))
    )


def machine_text(name: str) -> str:
    """The TOML of a machine that comes with Shardwise. Raises MachineError with the nearest name and all that
    there are."""
    known = machine_names()
    if name not in known:
        begins = next((each for each in known if name and each.startswith(name)), None)
        nearest = f' Did you mean "{begins}"?' if begins is not None else suggest(name[:80], known)
        raise MachineError(
            f'unknown machine "{shown(name)}".{nearest} Known: {", ".join(known)}; '
            "or the path of a .toml file, as `shardwise calibrate` writes."
        )
    return (resources.files("shardwise") / "machines" / f"{name}{SUFFIX}").read_text(encoding="utf-8")


def load_machine(name: str) -> Machine:
    """A machine by name, or from the user's file where the name ends in .toml. Raises MachineError."""
    if not name.endswith(SUFFIX):
        return machine_from_toml(machine_text(name), name)
    return machine_from_toml(_text(Path(name)), shown(name))


def _text(path: Path) -> str:
    where = f"machine file {shown(path)}"
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "can't be a path"
        raise MachineError(
            f"{where}: {reason}. Give the path of a TOML file, or a name of `shardwise machines`."
        ) from None
    if len(data) > LARGEST_FILE:
        raise MachineError(f"{where}: is larger than {LARGEST_FILE:,} bytes, and no machine file is.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise MachineError(f"{where}: not UTF-8 text.") from None
