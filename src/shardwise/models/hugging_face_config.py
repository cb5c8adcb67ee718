"""A configuration of transformers as data: read from a config.json on this machine, or a type's default, with
numbers changed. No code, kernels or weights are asked for, and absurd counts are refused before lists of that
length are made."""

import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from shardwise.core.errors import ModelError
from shardwise.core.plan import suggest
from shardwise.core.shown import shown

MAX_CONFIG_BYTES = 1 << 20
MAX_COUNT = 4096
MAX_SIZE = 10**10
_COUNT = re.compile(r"layer|expert|head|label|block|group|beam|branch")
_SIZE = re.compile(r"size|dim|vocab|token|theta|base|width|hidden_per")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_DROPPED = frozenset(
    {"auto_map", "dtype", "torch_dtype", "quantization_config", "use_pretrained_backbone", "kernel_config"}
    | {
        f"{before}{key}{after}"
        for key in _IMPLEMENTATIONS
        for before in ("", "_")
        for after in ("", "_internal")
    }
)
_DEPTH = "num_hidden_layers"


def read_config(target: str, name: str) -> dict[str, Any]:
    path = Path(target)
    try:
        if path.is_dir():
            path = path / "config.json"
        if not path.exists():
            raise ModelError(
                f'model "{name}": no such file. The hub is never read: download config.json and give its '
                "path, or give a type, such as "
                "hf:qwen3."
            )
        if not path.is_file():
            raise ModelError(f'model "{name}": not a file. Give the path of a config.json.')
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ModelError(
            f'model "{name}": {getattr(error, "strerror", None) or shown(error)}. Give the path of a '
            "config.json."
        ) from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ModelError(
            f'model "{name}": larger than {MAX_CONFIG_BYTES >> 20} MiB, which no config.json is.'
        )
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ModelError(f'model "{name}": not UTF-8 text.') from None
    except RecursionError:
        raise ModelError(f'model "{name}": not a config.json: nested too deep.') from None
    except ValueError as error:
        raise ModelError(f'model "{name}": not JSON: {shown(error)}.') from None
    if not isinstance(values, dict):
        raise ModelError(f'model "{name}": a config.json is an object, {{...}}, not {type(values).__name__}.')
    return values


def holds_config(folder: str) -> bool:
    try:
        return (Path(folder) / "config.json").is_file()
    except (OSError, ValueError):
        return False


def drop(values: dict[str, Any]) -> set[str]:
    """Removes, at every depth, the keys that ask for code, kernels, weights or another dtype. Returns those
    that were there."""
    found = {key for key in values if key in _DROPPED and values[key] is not None}
    for key in _DROPPED & values.keys():
        del values[key]
    for value in values.values():
        if isinstance(value, dict):
            found |= drop(value)
    return found


def configured(
    config_class: Any, values: dict[str, Any], changes: Mapping[str, int | float | bool], name: str
) -> Any:
    if not changes:
        return config_class.from_dict(values)
    known = config_class.from_dict(deepcopy(values)) if values else config_class()
    for key, value in changes.items():
        *path, last = _resolve(known, key, name)
        part, place = known, values
        for step in path:
            part = getattr(part, step)
            place = place.setdefault(step, {})
            if hasattr(part, "model_type"):
                place.setdefault("model_type", part.model_type)
        check_counts({last: value}, name)
        if last == _own_name(part, _DEPTH) and isinstance(value, int):
            _cut_lists(part, place, value, name)
        place[last] = value
    return config_class.from_dict(values)


def _resolve(config: Any, key: str, name: str) -> list[str]:
    """The attributes that lead to a key, the last one by its own name. A key that the top lacks may be the
    language model's."""
    *path, last = key.split(".")
    part = config
    for step in path:
        if step not in config.sub_configs or getattr(part, step, None) is None:
            raise _no_such_key(config, key, name)
        part = getattr(part, step)
    if _own_name(part, last) in _keys(part):
        return [*path, _own_name(part, last)]
    sub, language = language_part(config)
    if path or sub is None or _own_name(language, last) not in _keys(language):
        raise _no_such_key(config, key, name)
    return [sub, _own_name(language, last)]


def _no_such_key(config: Any, key: str, name: str) -> ModelError:
    known = {*_keys(config), *config.attribute_map, *_keys(language_part(config)[1])}
    return ModelError(
        f'model "{name}": a {config.model_type} configuration has no '
        f'"{shown(key)}".{suggest(key[:80], sorted(known))}'
    )


def _keys(config: Any) -> set[str]:
    return {key for key in vars(config) if not key.startswith("_")}


def _own_name(config: Any, key: str) -> str:
    """transformers lets many types call the same thing by their own name: n_layer for num_hidden_layers."""
    return str(config.attribute_map.get(key, key))


def language_part(config: Any) -> tuple[str | None, Any]:
    """(key, configuration) of the language model in a composite configuration; (None, config) where it is the
    whole."""
    language = config.get_text_config(decoder=True)
    step = next((key for key in config.sub_configs if getattr(config, key, None) is language), None)
    return (step, language) if step is not None else (None, config)


def parts(config: Any) -> Iterator[Any]:
    yield config
    for key in config.sub_configs:
        if getattr(config, key, None) is not None:
            yield from parts(getattr(config, key))


def _cut_lists(part: Any, place: dict[str, Any], n_layers: int, name: str) -> None:
    """Cuts the lists in `place` that have an entry for each layer; transformers makes those that aren't given
    itself."""
    before = getattr(part, _own_name(part, _DEPTH), None)
    for key, value in place.items():
        if isinstance(value, list) and len(value) == before:
            if n_layers > before:
                raise ModelError(
                    f'model "{name}": {key} has an entry for each of {before} layers, so there can be no '
                    "more than those."
                )
            place[key] = value[:n_layers]


def check_counts(values: Mapping[str, object], name: str) -> None:
    """Refuses absurd whole numbers before transformers makes lists of that length."""
    for key, value in values.items():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                check_counts(inner, name)
            elif isinstance(inner, int):
                is_count = _COUNT.search(key) is not None and _SIZE.search(key) is None
                largest = MAX_COUNT if is_count else MAX_SIZE
                if abs(inner) > largest:
                    raise ModelError(
                        f'model "{name}": {shown(key)} is {shown(inner, 20)}; at most {largest:,} is taken.'
                    )


def dropout_of(config: Any) -> dict[str, float]:
    part = language_part(config)[1]
    is_dropout = re.compile(r"(drop(out)?$|_pdrop$|^dropout|drop_rate|dropout_prob$|layerdrop)")
    return {
        key: float(value)
        for key, value in vars(part).items()
        if is_dropout.search(key)
        and not re.search("classifier|summary", key)  # of heads for other tasks
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and value > 0
    }
