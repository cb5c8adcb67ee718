"""A rank's parts of a state out of a checkpoint's files, whatever parts lie in those: each is put together
of what it has in common with them, so that nobody holds a whole tensor."""

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
from shardwise.train.checkpoints.places import Index, as_array, common, positions_in, sizes_of
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
    shape, where = file.get_slice(name).get_shape(), file_of(part.file)
    if tuple(shape) != sizes_of(part.place):
        raise CheckpointError(f"{name} is {shown(shape)} in {where}, and not as indexed")
    block = _cut(file, name, index)
    if block.dtype != entry.torch_dtype:
        raise CheckpointError(f"{name} is {block.dtype} in {where}, and not as indexed")
    return block


def _cut(file: Any, name: str, index: list[Index]) -> Tensor:
    """What a file has of a tensor at the product of these positions. It is read between the first and the
    last that is wanted."""
    if not index:
        whole: Tensor = file.get_tensor(name)
        return whole
    bounds = [
        each if isinstance(each, slice) else slice(int(each.min()), int(each.max()) + 1) for each in index
    ]
    block: Tensor = file.get_slice(name)[tuple(bounds)]
    for dim, (each, bound) in enumerate(zip(index, bounds, strict=True)):
        if not isinstance(each, slice):
            block = block.index_select(dim, torch.from_numpy(each - bound.start))
    return block


def _put(local: Tensor, index: list[Index], block: Tensor) -> None:
    if all(isinstance(each, slice) for each in index):
        local[tuple(index)].copy_(block)
        return
    arrays = [np.arange(each.start, each.stop) if isinstance(each, slice) else each for each in index]
    local[tuple(torch.from_numpy(each).to(local.device) for each in np.ix_(*arrays))] = block.to(local)


def read_part(held: Held, file: Any, name: str) -> None:
    """Fills a part from a file that has the whole tensor under this name."""
    index = _in_whole(held)
    if index is not None:
        held.local.copy_(_cut(file, name, index))


def put_part(held: Held, whole: Tensor) -> None:
    """The same from the whole tensor."""
    index = _in_whole(held)
    for dim, each in enumerate(index or ()):
        if isinstance(each, slice):
            whole = whole.narrow(dim, each.start, each.stop - each.start)
        else:
            whole = whole.index_select(dim, torch.from_numpy(each).to(whole.device))
    if index is not None:
        held.local.copy_(whole)


def _in_whole(held: Held) -> list[Index] | None:
    """Where its elements are in the whole; None where it has none."""
    found: list[Index] = []
    for positions in map(positions_in, held.place):
        if isinstance(positions, range) and positions.step == 1:
            found.append(slice(positions.start, positions.stop))
        else:
            found.append(as_array(positions))
    return found if held.local.numel() else None
