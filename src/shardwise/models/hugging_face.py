"""Hugging Face transformers' causal language models: `hf:TYPE` or `hf:PATH`, and `?KEY=VALUE,...` behind
either.

The configuration is the type's default one or a config.json on this machine. No hub, no weights, no code from
files: keys that ask for those, or for kernels, are dropped. `?` replaces numbers: a key as config.json has it
(dots into a part of it), or one of its language model's. A changed number of layers cuts every list that has
an entry per layer. Widths need no cutting to look at a large model, since nothing is allocated; depth does,
since each layer is traced.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shardwise.core.errors import ModelError
from shardwise.core.plan import Family, suggest
from shardwise.core.shown import shown, told
from shardwise.models.changes import parse_changes
from shardwise.models.small import small_values

MAX_CONFIG_BYTES = 1 << 20
# Building stops here, so that an absurd count ends in a line and not in a full memory; the largest known
# models have a tenth of that.
MAX_MODULES = 100_000
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

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class HuggingFaceModel:
    """A configuration that transformers accepts. `config` is a transformers configuration and isn't
    changed."""

    name: str
    config: Any
    is_quantized: bool = False

    @property
    def about(self) -> str:
        return f"Hugging Face {self.config.model_type}, as transformers builds it"

    @property
    def vocab_size(self) -> int | None:
        size = getattr(_language_part(self.config)[1], "vocab_size", None)
        return size if isinstance(size, int) else None

    @property
    def max_seq(self) -> None:
        """Most types take sequences beyond what they were trained for."""
        return

    @property
    def family(self) -> Family:
        return Family.LLAMA

    @property
    def notes(self) -> tuple[str, ...]:
        found = []
        dropout = _dropout(self.config)
        if dropout:
            found.append(
                "Dropout is on, as in training: "
                f"{', '.join(f'{key} {value:g}' for key, value in dropout.items())}."
            )
        if self.is_quantized:
            found.append("quantization_config is left out: the weights are of the dtype that was asked for.")
        if self.has_experts:
            found.append(
                "Experts run as grouped_mm in bfloat16, which is transformers' default, and as batched_mm "
                "in other dtypes, since grouped_mm can't be traced in those; batched_mm copies the weights "
                "that each token meets, and needs far more memory."
            )
        return tuple(found)

    @property
    def has_experts(self) -> bool:
        """Whether transformers lets an implementation of its experts be chosen."""
        return _model_class(self.config)._can_set_experts_implementation() and any(
            "expert" in key and isinstance(value, int) and value > 1
            for part in _parts(self.config)
            for key, value in vars(part).items()
        )

    def small(self, tp: int) -> "HuggingFaceModel":
        """The twin of models/small.py. Raises ModelError where its own class refuses it."""
        config = _tried(
            lambda: type(self.config).from_dict(small_values(self.config, tp)),
            self.name,
            "refuses its small twin",
        )
        return HuggingFaceModel(self.name, config, self.is_quantized)

    def build(self, *, dtype: torch.dtype, device: torch.device | str = "meta") -> nn.Module:
        """The model, in train mode; calling it with ids gives logits. On another device than meta it has the
        weights of its own initialisation. Raises ModelError."""
        from transformers import AutoModelForCausalLM

        chosen = {}
        is_real = torch.device(device).type != "meta"
        if is_real and _model_class(self.config)._can_set_experts_implementation():
            chosen["experts_implementation"] = "eager"  # a loop over the experts: plain ops, any dtype
        elif dtype != torch.bfloat16 and _model_class(self.config)._can_set_experts_implementation():
            chosen["experts_implementation"] = "batched_mm"

        def make() -> nn.Module:
            with _few_modules(self.name), torch.device(device):
                model: nn.Module = AutoModelForCausalLM.from_config(
                    deepcopy(self.config), dtype=dtype, trust_remote_code=False, **chosen
                )
            return model

        model = _tried(make, self.name, "can't build it")
        give_logits(model)
        return model.train()


def give_logits(model: nn.Module) -> None:
    """Makes model(ids [B, S]) return the logits [B, S, V] alone; modules keep their names."""
    inner = type(model).forward

    def forward(self: nn.Module, ids_BS: Tensor) -> Tensor:
        with _offline():
            logits: Tensor = inner(self, input_ids=ids_BS, use_cache=False).logits
        return logits

    model.forward = MethodType(forward, model)


def find_hugging_face(text: str) -> HuggingFaceModel:
    """`hf:TYPE` or `hf:PATH`, with `?KEY=VALUE,...` or without. Raises ModelError."""
    name = shown(text)
    target, has_query, query = text.removeprefix("hf:").partition("?")
    if not target:
        raise ModelError(
            f'model "{name}": hf: wants a model type, such as hf:qwen3, or the path of a config.json.'
        )
    changes = parse_changes(query, name) if has_query else {}
    is_path = "/" in target or "\\" in target or target.endswith(".json") or target in (".", "..")
    values = _read_config(target, name) if is_path else {}
    model_type = values.pop("model_type", None) if is_path else target
    if not isinstance(model_type, str):
        raise ModelError(
            f'model "{name}": the file has no "model_type". Give the config.json of a Hugging Face model.'
        )
    config_class = _config_class(model_type, name)
    dropped = _drop(values)
    _check_counts(values, name)
    config = _tried(
        lambda: _configured(config_class, values, changes, name), name, "refuses its configuration"
    )
    return HuggingFaceModel(name, config, is_quantized="quantization_config" in dropped)


def causal_types() -> tuple[str, ...]:
    """All model types that transformers offers as a causal language model."""
    _need_transformers("hf:")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _config_class(model_type: str, name: str) -> Any:
    _need_transformers(name)
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = causal_types()
    if model_type not in known:
        what = "is no causal language model" if model_type in CONFIG_MAPPING else "isn't known"
        hint = suggest(model_type[:80], known)
        raise ModelError(
            f'model "{name}": type "{shown(model_type)}" {what} in transformers {__version__}.{hint}'
        )
    return CONFIG_MAPPING[model_type]


def _need_transformers(name: str) -> None:
    try:
        import transformers.models.auto.modeling_auto  # noqa: F401
    except ImportError as error:
        if getattr(error, "name", None) in ("transformers", None) or "transformers" in str(error):
            raise ModelError(
                f"model \"{name}\": transformers isn't installed. Try: pip install 'shardwise[hf]'."
            ) from None
        raise ModelError(f'model "{name}": transformers can\'t be imported: {told(error)}') from None


def _read_config(target: str, name: str) -> dict[str, Any]:
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
        values = json.loads(data)
    except RecursionError:
        raise ModelError(f'model "{name}": not a config.json: nested too deep.') from None
    except ValueError as error:
        raise ModelError(f'model "{name}": not JSON: {shown(error)}.') from None
    if not isinstance(values, dict):
        raise ModelError(f'model "{name}": a config.json is an object, {{...}}, not {type(values).__name__}.')
    return values


def _drop(values: dict[str, Any]) -> set[str]:
    """Removes, at every depth, the keys that ask for code, kernels, weights or another dtype. Returns those
    that were there."""
    found = {key for key in values if key in _DROPPED and values[key] is not None}
    for key in _DROPPED & values.keys():
        del values[key]
    for value in values.values():
        if isinstance(value, dict):
            found |= _drop(value)
    return found


def _configured(
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
        _check_counts({last: value}, name)
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
    sub, language = _language_part(config)
    if path or sub is None or _own_name(language, last) not in _keys(language):
        raise _no_such_key(config, key, name)
    return [sub, _own_name(language, last)]


def _no_such_key(config: Any, key: str, name: str) -> ModelError:
    known = {*_keys(config), *config.attribute_map, *_keys(_language_part(config)[1])}
    return ModelError(
        f'model "{name}": a {config.model_type} configuration has no '
        f'"{shown(key)}".{suggest(key[:80], sorted(known))}'
    )


def _keys(config: Any) -> set[str]:
    return {key for key in vars(config) if not key.startswith("_")}


def _own_name(config: Any, key: str) -> str:
    """transformers lets many types call the same thing by their own name: n_layer for num_hidden_layers."""
    return str(config.attribute_map.get(key, key))


def _language_part(config: Any) -> tuple[str | None, Any]:
    """(key, configuration) of the language model in a composite configuration; (None, config) where it is the
    whole."""
    language = config.get_text_config(decoder=True)
    step = next((key for key in config.sub_configs if getattr(config, key, None) is language), None)
    return (step, language) if step is not None else (None, config)


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for key in config.sub_configs:
        if getattr(config, key, None) is not None:
            yield from _parts(getattr(config, key))


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


def _check_counts(values: Mapping[str, object], name: str) -> None:
    """Refuses absurd whole numbers before transformers makes lists of that length."""
    for key, value in values.items():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                _check_counts(inner, name)
            elif isinstance(inner, int):
                is_count = _COUNT.search(key) is not None and _SIZE.search(key) is None
                largest = MAX_COUNT if is_count else MAX_SIZE
                if abs(inner) > largest:
                    raise ModelError(
                        f'model "{name}": {shown(key)} is {shown(inner, 20)}; at most {largest:,} is taken.'
                    )


def _dropout(config: Any) -> dict[str, float]:
    part = _language_part(config)[1]
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


def _model_class(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _tried(make: Callable[[], T], name: str, what: str) -> T:
    try:
        with _offline(), _silent():
            return make()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f'model "{name}": transformers {what}: {told(_plain(error), 200)} Change the configuration.'
        ) from None


def _plain(error: Exception) -> Exception:
    """transformers' validators wrap the error of the field that is wrong, and their own first line doesn't
    say what it is."""
    return (
        error.__cause__
        if isinstance(error.__cause__, Exception) and "Validation" in type(error).__name__
        else error
    )


@contextmanager
def _silent() -> Iterator[None]:
    """transformers' log lines are about checkpoints, generation and defaults: none is about what a user did
    here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _offline() -> Iterator[None]:
    """The hub's client refuses to connect inside."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _few_modules(name: str) -> Iterator[None]:
    """Ends the building of a model that grows past MAX_MODULES."""
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def registered(*_: object) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise ModelError(
                f'model "{name}": more than {MAX_MODULES:,} modules. Take fewer layers or experts.'
            )

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
