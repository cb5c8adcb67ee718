"""How a checkpoint comes to count: all files are on the disk in step-N.partial, then the manifest, then the
folder gets its name, which is one step of the file system. Who dies before that leaves what nobody takes for
a checkpoint; who dies after it, a whole one."""

import shutil
from pathlib import Path

from shardwise.core.training import Saved
from shardwise.train.checkpoints.finding import PARTIAL, REMOVED, folder_of, misfit
from shardwise.train.checkpoints.form import FORMAT, INDEX, MANIFEST, VERSION, File, Manifest, write_manifest
from shardwise.train.checkpoints.writing import fsync_folder, write_file


def partial_of(folder: Path, step: int) -> Path:
    return folder / f"{folder_of(step)}{PARTIAL}"


def begin(folder: Path, step: int) -> None:
    """An empty folder for a save; what an earlier run left half-written is removed. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.glob(f"step-*{PARTIAL}"), *folder.glob(f"step-*{REMOVED}")):
        shutil.rmtree(left)
    partial_of(folder, step).mkdir()


def publish(folder: Path, saved: Saved, mesh: str, files: tuple[File, ...], index: bytes) -> str | None:
    """Makes the files that all ranks have written a checkpoint. Returns what is wrong with them, if
    something is. Raises OSError."""
    partial, final = partial_of(folder, saved.step), folder / folder_of(saved.step)
    problem = next(filter(None, (misfit(partial, file) for file in files)), None)
    if problem is not None:
        return f"{problem}, as rank 0 sees it. Use a folder that all hosts share"
    every = (write_file(partial, INDEX, [index]), *files)
    manifest = Manifest(FORMAT, VERSION, saved, mesh, len(files), every)
    write_file(partial, MANIFEST, [write_manifest(manifest)])
    fsync_folder(partial)
    before = final.with_name(final.name + REMOVED)
    if final.exists():  # of a run that went another way from an earlier step
        final.rename(before)
    partial.rename(final)
    fsync_folder(folder)
    shutil.rmtree(before, ignore_errors=True)
    return None


def give_up(folder: Path, step: int) -> None:
    """Frees what a save that failed has taken."""
    shutil.rmtree(partial_of(folder, step), ignore_errors=True)
