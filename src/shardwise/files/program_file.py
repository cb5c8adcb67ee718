"""Programs in files, as predict's --program and --save-program name them."""

from pathlib import Path

from shardwise.core.errors import InputError, RunError
from shardwise.core.program import Program
from shardwise.core.shown import shown
from shardwise.files.program_json import LARGEST_FILE, program_from_json, program_json


def load_program(path: Path) -> Program:
    """A saved program. Raises InputError."""
    try:
        with path.open("rb") as file:
            document = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(
            f"--program {shown(path)}: {error.strerror}. Give the file that --save-program wrote."
        ) from None
    return program_from_json(document, f"--program {shown(path)}")


def write_program(program: Program, path: Path) -> None:
    """Raises RunError where it can't be written."""
    try:
        path.write_bytes(program_json(program))
    except OSError as error:
        raise RunError(f"--save-program {shown(path)}: {error.strerror}. Choose another file.") from None
