"""Fills a sharded model with the weights of a Hugging Face folder: each rank reads the slices that it keeps.
What is put together of several tensors is made whole first, one parameter at a time."""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from shardwise.core.errors import ModelError
from shardwise.core.shown import shown
from shardwise.models.hugging_face import HuggingFaceModel
from shardwise.train.checkpoints.form import DTYPES
from shardwise.train.checkpoints.reading import in_short, put_part, read_part
from shardwise.train.checkpoints.state import MODEL, Held, of_model
from shardwise.train.weights.names import Group, groups_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_PLAIN_DTYPES = {"F64", "F32", "F16", "BF16"}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


@torch.no_grad()
def read_weights(folder: Path, model: nn.Module, source: HuggingFaceModel) -> tuple[str, ...]:
    """Gives a model, which any plan and mesh may have sharded, the weights of a folder, in the model's dtype.
    Returns the names of what the model has no use for. Raises ModelError for a folder that has other weights
    than the model's, or none."""
    files, whole = files_of(folder), source.build(dtype=torch.float32)
    groups, unused = groups_of(whole, files)
    wanted = {each.name.removeprefix(f"{MODEL}/"): each for each in of_model(model)}
    left = dict(wanted)
    with ExitStack() as stack:
        opened = _Opened(folder, files, stack)
        for group in groups:
            try:
                _fill(group, opened, left, whole)
            except (SafetensorError, OSError, RuntimeError, ValueError, IndexError) as error:
                raise ModelError(
                    f"weights {folder}: {group.target} can't be read: {shown(error, 120)}"
                ) from None
    if left:
        raise ModelError(
            f"weights {folder}: {in_short([f'there is no {name}' for name in left])}. Use the folder of a "
            f"{source.config.model_type} with the sizes of {source.name}."
        )
    return tuple(unused)


def files_of(folder: Path) -> dict[str, str]:
    """The file of each tensor. Raises ModelError where there are none, or where they lie elsewhere."""
    if (folder / INDEX).is_file():
        try:
            found = msgspec.json.decode((folder / INDEX).read_bytes(), type=_Index).weight_map
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ModelError(f"weights {folder}: {INDEX} can't be read: {shown(error, 120)}") from None
    elif (folder / SINGLE).is_file():
        try:
            with safe_open(folder / SINGLE, "pt") as file:
                found = dict.fromkeys(file.keys(), SINGLE)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"weights {folder}: {SINGLE} can't be read: {shown(error, 120)}") from None
    else:
        raise ModelError(
            f"weights {folder}: has neither {INDEX} nor {SINGLE}. Give a folder of safetensors files, as "
            "save_pretrained() writes it; files that hold Python objects (.bin, .pt) aren't read."
        )
    strange = next((name for name in found.values() if not _PLAIN_NAME.fullmatch(name)), None)
    if strange is not None:
        raise ModelError(
            f'weights {folder}: {INDEX} names the file "{shown(strange)}". Only files beside it are read.'
        )
    return found


class _Opened:
    """The folder's files, each opened once."""

    def __init__(self, folder: Path, files: Mapping[str, str], stack: ExitStack) -> None:
        self._folder, self._files, self._stack = folder, files, stack
        self._handles: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        """The file that a tensor is in."""
        file = self._files[name]
        if file not in self._handles:
            self._handles[file] = self._stack.enter_context(
                safe_open(self._folder / file, "pt", device="cpu")
            )
        return self._handles[file]


def _fill(group: Group, opened: Callable[[str], Any], left: dict[str, Held], whole: nn.Module) -> None:
    """Of the parameters that are left those which the group makes."""
    if group.converter is None:
        held = left.pop(group.target, None)
        if held is not None:
            (_, name), *_ = group.sources
            there = opened(name).get_slice(name)
            _check(held, tuple(there.get_shape()), there.get_dtype())
            read_part(held, opened(name), name)
        return
    if _is_elsewhere(group.target, left):
        return
    tensors = {name: opened(name).get_tensor(name) for _, name in group.sources}
    for tensor in tensors.values():
        _refuse_quantized(DTYPES.get(tensor.dtype, ""))
    for name, tensor in group.convert(tensors, whole).items():
        held = left.pop(name, None)
        if held is not None:
            _check(held, tuple(tensor.shape), DTYPES.get(tensor.dtype, ""))
            put_part(held, tensor)


def _is_elsewhere(target: str, left: Mapping[str, Held]) -> bool:
    """Whether a parameter's module, and so what is made beside it, lives on another stage."""
    module = target.rpartition(".")[0]
    return not any(name.rpartition(".")[0].startswith(module.rpartition(".")[0]) for name in left)


def _check(held: Held, shape: tuple[int, ...], dtype: str) -> None:
    if held.local.is_floating_point():
        _refuse_quantized(dtype)
    if shape != held.shape:
        raise ValueError(f"it is {list(shape)}, and the model's is {list(held.shape)}.")


def _refuse_quantized(dtype: str) -> None:
    """Numbers that mean something with their scales only."""
    if dtype not in _PLAIN_DTYPES:
        raise ValueError(
            f"it is of {dtype or 'another dtype'}, quantized. Use weights in bfloat16 or float32."
        )
