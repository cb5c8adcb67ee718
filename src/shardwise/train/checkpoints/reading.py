"""A rank's parts of a state out of a checkpoint's files, whatever parts lie in those: each is put together
of what it has in common with them, so that nobody holds a whole tensor."""

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardwise.core.errors import CheckpointError
from shardwise.core.shown import shown
from shardwise.train.checkpoints.form import INDEX, Entry, Manifest, Part, file_of, read_index
from shardwise.train.checkpoints.places import Index, Place, common, positions_in, sizes_of
from shardwise.train.checkpoints.state import Held

_SHOWN = 3


def index_of(path: Path, manifest: Manifest) -> dict[str, Entry]:
    """Raises CheckpointError."""
    try:
        return read_index((path / INDEX).read_bytes(), manifest.ranks)
    except OSError as error:
        raise CheckpointError(f"{INDEX} can't be read: {error.strerror}") from None


def misfits(held: Iterable[Held], entries: Mapping[str, Entry]) -> list[str]:
    """What of this rank's state a checkpoint has otherwise, or hasn't."""
    found = []
    for each in held:
        entry = entries.get(each.name)
        if entry is None:
            found.append(f"it has no {each.name}")
        elif entry.shape != each.shape:
            found.append(f"{each.name} is {shown(list(entry.shape))} in it, here {list(each.shape)}")
        elif entry.torch_dtype != each.local.dtype:
            found.append(f"{each.name} is {entry.torch_dtype} in it, here {each.local.dtype}")
    return found


def in_short(found: list[str]) -> str:
    """The first few, and how many more."""
    more = len(found) - _SHOWN
    return "; ".join(found[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


@torch.no_grad()
def read_into(path: Path, held: Iterable[Held], entries: Mapping[str, Entry]) -> None:
    """Fills each part, in place. Raises CheckpointError for files that aren't as the index says."""
    with ExitStack() as stack:
        opened: dict[int, Any] = {}

        def file(number: int) -> Any:
            if number not in opened:
                handle = safe_open(path / file_of(number), framework="pt", device="cpu")
                opened[number] = stack.enter_context(handle)
            return opened[number]

        for each in held:
            try:
                _fill(each, entries[each.name], file)
            except (SafetensorError, OSError, RuntimeError, IndexError) as error:
                raise CheckpointError(f"{each.name} can't be read: {shown(error, 120)}") from None


def _fill(held: Held, entry: Entry, file: Any) -> None:
    mine = [positions_in(runs) for runs in held.place]
    filled = 0
    for part in entry.parts:
        theirs = [positions_in(runs) for runs in part.place]
        shared = [common(a, b) for a, b in zip(mine, theirs, strict=True)]
        cuts = [cut for cut in shared if cut is not None]
        if len(cuts) < len(shared):
            continue
        block = _block(file(part.file), held.name, part, entry, [there for _, there in cuts])
        _put(held.local, [here for here, _ in cuts], block)
        filled += block.numel()
    if filled != held.local.numel():
        raise CheckpointError(f"{held.name}: its parts don't cover what this rank holds")


def _block(file: Any, name: str, part: Part, entry: Entry, index: list[Index]) -> Tensor:
    if not part.place:
        block: Tensor = file.get_tensor(name)
    else:
        whole = file.get_slice(name)
        if tuple(whole.get_shape()) != sizes_of(part.place):
            raise CheckpointError(
                f"{name} is {whole.get_shape()} in {file_of(part.file)}, and not as indexed"
            )
        # a file is read between the first and the last that is wanted
        bounds = [
            each if isinstance(each, slice) else slice(int(each.min()), int(each.max()) + 1) for each in index
        ]
        block = whole[tuple(bounds)]
        for dim, (each, bound) in enumerate(zip(index, bounds, strict=True)):
            if not isinstance(each, slice):
                block = block.index_select(dim, torch.from_numpy(each - bound.start))
    if block.dtype != entry.torch_dtype or (not part.place and block.shape != ()):
        raise CheckpointError(f"{name} is {block.dtype} in {file_of(part.file)}, and not as indexed")
    return block


def _put(local: Tensor, index: list[Index], block: Tensor) -> None:
    if all(isinstance(each, slice) for each in index):
        local[tuple(index)].copy_(block)
        return
    arrays = [np.arange(each.start, each.stop) if isinstance(each, slice) else each for each in index]
    local[tuple(torch.from_numpy(each).to(local.device) for each in np.ix_(*arrays))] = block.to(local.device)


def numel(place: Place) -> int:
    return math.prod(sizes_of(place))
