"""Checkpoints of a run: saved while it trains on, found, and taken up again.

A save copies this rank's share of the state to host memory and returns; a thread writes it. Ranks talk in it
over a group of their own: to begin, to say what they wrote, to hear whether it was published. A save that
fails leaves the earlier ones, and is told in a line; the next one tries again. One is written at a time: a
second save waits for the first, so that all ranks save the same steps without asking one another.
"""

import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import msgspec
import torch
from torch import nn

from shardwise.core.errors import CheckpointError
from shardwise.core.mesh import Mesh
from shardwise.core.shown import told
from shardwise.core.training import Saved
from shardwise.train.checkpoints.finding import Found, candidates, damage, remove_beyond
from shardwise.train.checkpoints.form import Entry, File, Manifest, file_of
from shardwise.train.checkpoints.publishing import begin, give_up, partial_of, publish
from shardwise.train.checkpoints.reading import in_short, index_of, misfits, read_into
from shardwise.train.checkpoints.shares import Claim, Shares, shared_out
from shardwise.train.checkpoints.state import (
    MODEL,
    draw_anew,
    fresh_state,
    held_by,
    of_model,
    random_targets,
    take_random,
)
from shardwise.train.checkpoints.talk import Talk
from shardwise.train.checkpoints.writing import Buffer, write_file

_WRITE_S = 1800.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a save ended, the same on all ranks. why: what went wrong, where it wasn't published. size: bytes
    that all ranks wrote; seconds: from the save's begin to its end."""

    step: int
    why: str | None
    size: int
    seconds: float

    @property
    def published(self) -> bool:
        return self.why is None


class _Written(msgspec.Struct, frozen=True):
    """What a rank says of its file."""

    file: File | None = None
    problem: str | None = None


class _Candidate(msgspec.Struct, frozen=True):
    name: str
    problem: str | None
    manifest: Manifest | None


class Checkpoints:
    """Of the ranks of the process group, or of this process alone; all ranks make it, and call it alike.

    folder: that all ranks share. keep: whole checkpoints that are left, the newest ones. mesh: of the ranks:
    on the same one they take up their own random state. timeout_s: of the slowest rank's writing.
    """

    def __init__(
        self, folder: Path, *, keep: int = 3, mesh: Mesh | None = None, timeout_s: float = _WRITE_S
    ) -> None:
        self._folder, self._keep, self._mesh = folder, keep, str(mesh or "")
        self._talk = Talk(timeout_s)
        self._buffer = Buffer()
        self._shares: Shares | None = None
        self._claims: bytes | None = None
        self._thread: threading.Thread | None = None
        self._lines: list[str] = []
        self._outcomes: list[Outcome] = []

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, saved: Saved, wait: bool = False
    ) -> None:
        """Copies the state and has it written; returns as soon as it is copied. wait: not before it is
        published or has failed. Raises CheckpointError for state that can't be saved."""
        if saved.step != step:
            raise AssertionError(f"a checkpoint of step {step} says that it is of step {saved.step}")
        self.finish()
        begun = time.monotonic()
        held, problem = {}, None
        try:
            held = {each.name: each for each in held_by(model, optimizer, self._talk.rank)}
            claims = [Claim.of(each) for each in held.values()]
        except CheckpointError as error:
            problem, claims = str(error), []
        shares = self._shares_of(claims, problem)
        self._buffer.take({name: each.local for name, each in held.items() if name in shares.own})
        self._thread = threading.Thread(
            target=self._write, args=(saved, shares, begun), name=f"checkpoint of step {step}", daemon=True
        )
        self._thread.start()
        if wait:
            self.finish()

    @property
    def is_saving(self) -> bool:
        """Whether a save is being written on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> Outcome | None:
        """Waits for the save that is being written, if one is; how the last one ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._outcomes[-1] if self._outcomes else None

    def lines(self) -> tuple[str, ...]:
        """What the user must know since this was last asked: a save that failed, random state that was drawn
        anew. The same on all ranks, but for what only rank 0 does."""
        found = tuple(self._lines)
        del self._lines[: len(found)]
        return found

    def newest(self) -> Found:
        """The newest checkpoint of the folder of which every byte is as it was written; ranks share the
        reading."""
        own = []
        if self._talk.rank == 0:
            own = [
                _Candidate(path.name, problem, manifest)
                for path, problem, manifest in candidates(self._folder)
            ]
        passed_over: list[str] = []
        for each in self._talk.gather_as(list[_Candidate], own)[0]:
            path, problem = self._folder / each.name, each.problem
            if each.manifest is not None:
                problem = self._damage(path, each.manifest)
            if each.manifest is not None and problem is None:
                return Found(path, each.manifest, tuple(passed_over), checked=True)
            passed_over.append(f"{each.name}: {problem}.")
        return Found(passed_over=tuple(passed_over))

    def restore(self, found: Found, model: nn.Module, optimizer: torch.optim.Optimizer) -> Saved:
        """Fills the model and the optimizer, in place, on the mesh and plan that made the checkpoint or on
        others. Raises CheckpointError, before anything is changed, for one that is damaged or of another
        model."""
        path, manifest = found.path, found.manifest
        if path is None or manifest is None:
            raise AssertionError("there is no checkpoint to restore")
        where = f"checkpoint {path}"
        if not found.checked:
            self._raise(self._damage(path, manifest), where)
        entries = self._agreed(lambda: index_of(path, manifest), where)
        held = list(of_model(model))
        self._raise(self._misfits([each.name for each in held], misfits(held, entries), entries), where)
        shapes = {name: (entry.shape, entry.torch_dtype) for name, entry in entries.items()}
        state = self._agreed(lambda: fresh_state(model, optimizer, shapes), where)
        random = random_targets(model, self._talk.rank)
        is_same = (manifest.mesh, manifest.ranks) == (self._mesh, self._talk.size)
        is_same = is_same and all(each.name in entries for each in random)
        random = random if is_same else []
        self._agreed(lambda: read_into(path, [*held, *state, *random], entries), where)
        if self._talk.first_problem(None if is_same else "anew") is None:
            take_random(model, random)
        else:
            draw_anew(model, manifest.saved.step)
            self._lines.append(
                f"{path.name} was saved on {_ranks(manifest.mesh, manifest.ranks)}, and this is "
                f"{_ranks(self._mesh, self._talk.size)}: random numbers are drawn anew, from the seed "
                f"and step {manifest.saved.step}."
            )
        return manifest.saved

    def _shares_of(self, claims: list[Claim], problem: str | None) -> Shares:
        """Asks all ranks whether what they hold is what it was."""
        told_now = msgspec.json.encode(claims)
        is_known = problem is None and self._shares is not None and told_now == self._claims
        state = problem or ("" if is_known else "new")
        every = self._talk.gather_as(str, state)
        failed = next((each for each in every if each not in ("", "new")), None)
        if failed is not None:
            raise CheckpointError(failed)
        if self._shares is None or any(every):
            # names and places repeat themselves: of 0.4 MB 14 kB are left
            every_rank = map(zlib.decompress, self._talk.gather(zlib.compress(told_now, 1)))
            gathered = [msgspec.json.decode(each, type=list[Claim]) for each in every_rank]
            self._shares, self._claims = shared_out(gathered, self._talk.rank), told_now
        return self._shares

    def _write(self, saved: Saved, shares: Shares, begun: float) -> None:
        try:
            why, size = self._written(saved, shares.index)
        except Exception as error:  # a rank that is gone, or what nobody thought of: training goes on
            why, size = told(error), 0
        self._outcomes.append(Outcome(saved.step, why, size, time.monotonic() - begun))
        if why is not None:
            self._lines.append(
                f"The checkpoint of step {saved.step} wasn't saved: {why.rstrip('.')}. Earlier ones stay."
            )

    def _written(self, saved: Saved, index: bytes) -> tuple[str | None, int]:
        """(what went wrong, bytes of all files)."""
        talk, partial = self._talk, partial_of(self._folder, saved.step)
        leads = talk.rank == 0
        problem = _tried(lambda: begin(self._folder, saved.step), self._folder) if leads else None
        problem = talk.first_problem(problem)
        if problem is not None:
            return problem, 0
        own = _Written()
        try:
            own = _Written(write_file(partial, file_of(talk.rank), self._buffer.pieces))
        except FileNotFoundError:
            own = _Written(
                problem=f"rank {talk.rank} doesn't see {partial}, which rank 0 has made: use a folder that "
                "all hosts share"
            )
        except OSError as error:
            own = _Written(problem=f"rank {talk.rank} can't write {partial}: {error.strerror}")
        every = talk.gather_as(_Written, own)
        files = tuple(each.file for each in every if each.file is not None)
        problem = next((each.problem for each in every if each.problem is not None), None)
        if leads and problem is None:
            problem = _tried(lambda: publish(self._folder, saved, self._mesh, files, index), partial)
        if leads and problem is not None:
            give_up(self._folder, saved.step)
        problem = talk.first_problem(problem)
        if leads and problem is None:
            left = _tried(lambda: remove_beyond(self._folder, self._keep), self._folder)
            if left is not None:
                self._lines.append(f"Older checkpoints stay: {left}.")
        return problem, sum(file.size for file in files)

    def _damage(self, path: Path, manifest: Manifest) -> str | None:
        """Each rank reads its share of the files."""
        own = manifest.files[self._talk.rank :: self._talk.size]
        return self._talk.first_problem(next(filter(None, (damage(path, file) for file in own)), None))

    def _misfits(self, names: list[str], own: list[str], entries: dict[str, Entry]) -> str | None:
        """What a checkpoint has otherwise than the models of all ranks together."""
        known = set().union(*self._talk.gather_as(list[str], names))
        found = list(dict.fromkeys(each for every in self._talk.gather_as(list[str], own) for each in every))
        found += [
            f"the model has no {name}"
            for name in entries
            if name.startswith(f"{MODEL}/") and name not in known
        ]
        if not found:
            return None
        return f"is of another model: {in_short(found)}. Use the model that it was made with"

    def _agreed(self, call: Callable[[], T], where: str) -> T:
        """What `call` gives; on all ranks the error of the first that failed."""
        try:
            given, problem = call(), None
        except CheckpointError as error:
            given, problem = None, str(error).rstrip(".")
        self._raise(self._talk.first_problem(problem), where)
        assert problem is None
        return cast(T, given)

    def _raise(self, problem: str | None, where: str) -> None:
        if problem is not None:
            raise CheckpointError(f"{where}: {problem}.")


def _tried(call: Callable[[], str | None], path: Path) -> str | None:
    """What went wrong, in words."""
    try:
        return call()
    except (OSError, CheckpointError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        return f"can't write {path}: {said}"


def _ranks(mesh: str, ranks: int) -> str:
    return f"mesh {mesh}" if mesh else f"{ranks} rank{'s' if ranks > 1 else ''}"
