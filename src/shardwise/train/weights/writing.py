"""Makes of a checkpoint a folder that transformers' from_pretrained() reads: its weights in Hugging Face's
own names, in files of a few gigabytes, an index and the configuration.

Each tensor is put together from the checkpoint's parts when its turn comes, so what is held is one tensor (of
experts: a layer's). Where several ranks call it, each writes its share of the files.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shardwise.core.errors import ModelError, RunError
from shardwise.models.hugging_face import HuggingFaceModel
from shardwise.train.checkpoints.finding import Found
from shardwise.train.checkpoints.form import DTYPES, Entry
from shardwise.train.checkpoints.reading import in_short, index_of, read_into
from shardwise.train.checkpoints.state import MODEL, Held
from shardwise.train.checkpoints.talk import Talk
from shardwise.train.checkpoints.writing import header, write_file
from shardwise.train.weights.names import as_in_files, file_groups
from shardwise.train.weights.reading import INDEX, SINGLE

_FILE_BYTES = 5 * 10**9
_TALK_S = 3600.0


@dataclass(frozen=True, slots=True, eq=False)
class _File:
    """groups: of parameters. tensors: what they are made into, on the meta device, in order."""

    groups: list[tuple[str, ...]]
    tensors: dict[str, Tensor]


def write_weights(
    found: Found, source: HuggingFaceModel, out: Path, *, file_bytes: int = _FILE_BYTES
) -> None:
    """Writes the weights of a checkpoint into a new folder `out`. All ranks of a process group call it, or
    one process. file_bytes: of a file, about. Raises ModelError for a checkpoint of another model or a folder
    that is there, RunError where it can't be written."""
    path, manifest = found.path, found.manifest
    if path is None or manifest is None:
        raise AssertionError("there is no checkpoint to make weights of")
    talk, entries = Talk(_TALK_S), index_of(path, manifest)
    whole = source.build(dtype=torch.float32)
    _check(path, whole, entries, source)
    files, partial = _files(whole, entries, file_bytes), out.with_name(out.name + ".partial")
    names = [_name(number, len(files)) for number in range(len(files))]
    problem = None
    if talk.rank == 0:
        problem = _made(out, partial)
    _raise(talk.first_problem(problem), out)
    try:
        for number in range(talk.rank, len(files), talk.size):
            write_file(partial, names[number], _bytes_of(files[number], path, entries, whole))
    except OSError as error:
        problem = f"{error.strerror}"
    problem = talk.first_problem(problem)
    if talk.rank == 0 and problem is None:
        problem = _finished(out, partial, dict(zip(names, files, strict=True)), source, whole)
    _raise(talk.first_problem(problem), out)


def _check(path: Path, whole: nn.Module, entries: Mapping[str, Entry], source: HuggingFaceModel) -> None:
    own = {f"{MODEL}/{name}": tuple(each.shape) for name, each in whole.named_parameters()}
    wrong = [f"it has no {name}" for name in own if name not in entries]
    wrong += [
        f"{name} is {list(entries[name].shape)} in it, here {list(shape)}"
        for name, shape in own.items()
        if name in entries and entries[name].shape != shape
    ]
    if wrong:
        raise ModelError(f"checkpoint {path}: is of another model than {source.name}: {in_short(wrong)}.")


def _files(whole: nn.Module, entries: Mapping[str, Entry], file_bytes: int) -> list[_File]:
    names = [name.removeprefix(f"{MODEL}/") for name in entries if name.startswith(f"{MODEL}/")]
    found, size = [_File([], {})], 0
    for group in file_groups(whole, names):
        empty = {
            name: torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta")
            for name in group
            for entry in (entries[f"{MODEL}/{name}"],)
        }
        tensors = as_in_files(whole, empty)
        more = sum(each.numel() * each.element_size() for each in tensors.values())
        if size and size + more > file_bytes:
            found.append(_File([], {}))
            size = 0
        found[-1].groups.append(group)
        found[-1].tensors.update(tensors)
        size += more
    return found


def _name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def _bytes_of(
    file: _File, path: Path, entries: Mapping[str, Entry], whole: nn.Module
) -> Iterator[bytes | memoryview]:
    described, start = {}, 0
    for name, each in file.tensors.items():
        stop = start + each.numel() * each.element_size()
        described[name] = {
            "dtype": DTYPES[each.dtype],
            "shape": list(each.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    yield header({"__metadata__": {"format": "pt"}, **described})
    names = iter(file.tensors)
    for group in file.groups:
        held = [_whole(name, entries[f"{MODEL}/{name}"]) for name in group]
        read_into(path, held, entries)
        made = as_in_files(whole, {name: each.local for name, each in zip(group, held, strict=True)})
        for name, tensor in made.items():
            assert name == next(names)
            yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _whole(name: str, entry: Entry) -> Held:
    place = tuple(((0, size, 1),) if size else () for size in entry.shape)
    return Held(f"{MODEL}/{name}", entry.shape, place, torch.empty(entry.shape, dtype=entry.torch_dtype))


def _made(out: Path, partial: Path) -> str | None:
    if out.exists():
        return "is there already"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        return f"{error.strerror}"
    return None


def _finished(
    out: Path, partial: Path, files: Mapping[str, _File], source: HuggingFaceModel, whole: nn.Module
) -> str | None:
    """The index, the configuration, and the folder's name."""
    config = deepcopy(source.config)
    config.architectures = [type(whole).__name__]
    tensors = [(name, each) for name, file in files.items() for each in file.tensors]
    size = sum(
        each.numel() * each.element_size() for file in files.values() for each in file.tensors.values()
    )
    index = {"metadata": {"total_size": size}, "weight_map": {each: name for name, each in tensors}}
    try:
        if len(files) > 1:
            write_file(partial, INDEX, [json.dumps(index, indent=2).encode()])
        write_file(partial, "config.json", [config.to_json_string(use_diff=True).encode()])
        partial.rename(out)
    except OSError as error:
        return f"{error.strerror}"
    return None


def _raise(problem: str | None, out: Path) -> None:
    if problem is not None:
        raise RunError(f"weights {out}: {problem}. Choose another folder, or free space there.")
