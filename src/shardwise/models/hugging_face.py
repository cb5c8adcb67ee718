"""Hugging Face transformers' causal language models: `hf:TYPE` or `hf:PATH`, and `?KEY=VALUE,...` behind
either.

The configuration is the type's default one or a config.json on this machine. No hub, no weights, no code from
files: keys that ask for those, or for kernels, are dropped. `?` replaces numbers: a key as config.json has it
(dots into a part of it), or one of its language model's. A changed number of layers cuts every list that has
an entry per layer. Widths need no cutting to look at a large model, since nothing is allocated; depth does,
since each layer is traced.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn

from shardwise.core.errors import ModelError
from shardwise.core.named_path import is_config
from shardwise.core.plan import Family, TheirPlan, suggest
from shardwise.core.shown import shown, told
from shardwise.models.changes import parse_changes
from shardwise.models.hugging_face_config import (
    check_counts,
    configured,
    drop,
    dropout_of,
    holds_config,
    language_part,
    parts,
    read_config,
)
from shardwise.models.small import small_values
from shardwise.torch_private import FakeTensor, local_part

# Building stops here, so that an absurd count ends in a line and not in a full memory; the largest known
# models have a tenth of that.
MAX_MODULES = 100_000
# of a table of positions: transformers' own offsets are 2
_MOST_SPARE_ROWS = 2
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
        size = getattr(language_part(self.config)[1], "vocab_size", None)
        return size if isinstance(size, int) else None

    @property
    def max_seq(self) -> int | None:
        """The length of a table of learned positions. Types without one take sequences beyond what they were
        trained for."""
        return _learned_positions(self)

    @property
    def family(self) -> Family:
        return Family.LLAMA

    @property
    def notes(self) -> tuple[str, ...]:
        found = []
        dropout = dropout_of(self.config)
        if dropout:
            found.append(
                "Dropout is on, as in training: "
                f"{', '.join(f'{key} {value:g}' for key, value in dropout.items())}."
            )
        if self.is_quantized:
            found.append("quantization_config is left out: the weights are of the dtype that was asked for.")
        if self.has_experts:
            found.append(
                "Experts are multiplied by grouped_mm, as transformers does by default: each expert's matrix "
                "with the tokens that chose it. It doesn't take float64: there batched_mm copies the weights "
                "that each token meets, and needs far more memory. On real ranks experts run one after the "
                "other."
            )
        return tuple(found)

    @property
    def default_plan(self) -> str:
        return TheirPlan.HF

    @property
    def initialises(self) -> bool:
        return True

    @property
    def has_experts(self) -> bool:
        """Whether transformers lets an implementation of its experts be chosen."""
        return _model_class(self.config)._can_set_experts_implementation() and any(
            "expert" in key and isinstance(value, int) and value > 1
            for part in parts(self.config)
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
        elif _model_class(self.config)._can_set_experts_implementation():
            # whatever the parameters' dtype: FSDP's mixed precision multiplies in another one
            chosen["experts_implementation"] = "batched_mm" if dtype == torch.float64 else "grouped_mm"

        def make() -> nn.Module:
            with _few_modules(self.name), torch.device(device):
                model: nn.Module = AutoModelForCausalLM.from_config(
                    deepcopy(self.config), dtype=dtype, trust_remote_code=False, **chosen
                )
            return model

        model = _tried(make, self.name, "can't build it")
        give_logits(model)
        return model.train()


@lru_cache(maxsize=8)
def _learned_positions(source: HuggingFaceModel) -> int | None:
    """By the configuration's count and a table of as many rows: some types have a few more, and those with a
    padding_idx begin behind it."""
    count = getattr(language_part(source.config)[1], "max_position_embeddings", None)
    if not isinstance(count, int):
        return None
    for module in source.build(dtype=torch.float32).modules():
        if isinstance(module, nn.Embedding) and 0 <= module.num_embeddings - count <= _MOST_SPARE_ROWS:
            begin = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(count, module.num_embeddings - begin)
    return None


def give_logits(model: nn.Module) -> None:
    """Makes model(ids [B, S]) return the logits [B, S, V] alone; modules keep their names.

    Where the model's own forward takes position_ids [B or 1, S], so does this one; positions that restart
    begin a new document. makes_masks: False where another sees to what attention may see, and the positions
    don't tell: each attention then asks for its kind (causal or not), and no mask is made."""
    inner = type(model).forward

    def forward(self: nn.Module, ids_BS: Tensor) -> Tensor:
        with _offline(), _one_document_each(self):
            logits: Tensor = inner(self, input_ids=ids_BS, use_cache=False).logits
        return logits

    def forward_at(
        self: nn.Module, ids_BS: Tensor, position_ids: Tensor | None = None, makes_masks: bool = True
    ) -> Tensor:
        if position_ids is None:
            return forward(self, ids_BS)
        device = next(self.parameters()).device
        if position_ids.device != device:
            position_ids = position_ids.to(device)
        with _offline(), nullcontext() if makes_masks else _without_masks(self):
            logits: Tensor = inner(self, input_ids=ids_BS, position_ids=position_ids, use_cache=False).logits
        return logits

    takes_positions = "position_ids" in inspect.signature(inner).parameters
    model.forward = MethodType(forward_at if takes_positions else forward, model)


@contextmanager
def _one_document_each(model: nn.Module) -> Iterator[None]:
    """Positions that a model counts itself begin no second document; transformers sees it, makes no mask, and
    asks for causal attention. Of fake ones it can't see it."""
    if not any(isinstance(local_part(each), FakeTensor) for each in model.parameters()):
        yield
        return
    from transformers import masking_utils

    with patch.object(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None):
        yield


_WITHOUT_MASKS = "shardwise_sdpa_without_masks"


@contextmanager
def _without_masks(model: nn.Module) -> Iterator[None]:
    """transformers' attention by torch's own function, under a name for which transformers makes no masks, as
    it makes none for attention that others have registered."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_WITHOUT_MASKS, sdpa_attention_forward)
    found: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    before = [(config, config._attn_implementation) for config in found.values()]
    for config, name in before:
        if name == "sdpa":
            config._attn_implementation = _WITHOUT_MASKS
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def find_hugging_face(text: str) -> HuggingFaceModel:
    """`hf:TYPE` or `hf:PATH`, with `?KEY=VALUE,...` or without. Raises ModelError."""
    name = shown(text)
    target, has_query, query = text.removeprefix("hf:").partition("?")
    if not target:
        raise ModelError(
            f'model "{name}": hf: wants a model type, such as hf:qwen3, or the path of a config.json.'
        )
    changes = parse_changes(query, name) if has_query else {}
    is_path = is_config(target)
    values = read_config(target, name) if is_path else {}
    model_type = values.pop("model_type", None) if is_path else target
    if not isinstance(model_type, str):
        raise ModelError(
            f'model "{name}": the file has no "model_type". Give the config.json of a Hugging Face model.'
        )
    config_class = _config_class(model_type, name, is_type=not is_path)
    dropped = drop(values)
    check_counts(values, name)
    config = _tried(
        lambda: configured(config_class, values, changes, name), name, "refuses its configuration"
    )
    return HuggingFaceModel(name, config, is_quantized="quantization_config" in dropped)


def causal_types() -> tuple[str, ...]:
    """All model types that transformers offers as a causal language model."""
    _need_transformers("hf:")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _config_class(model_type: str, name: str, is_type: bool) -> Any:
    """is_type: the user gave the type itself, which may have been meant as a path."""
    _need_transformers(name)
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = causal_types()
    if model_type not in known:
        what = "is no causal language model" if model_type in CONFIG_MAPPING else "isn't known"
        hint = suggest(model_type[:80], known)
        if is_type and holds_config(model_type):
            hint = f" For the folder of that name write hf:./{shown(model_type)}."
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

    with register_module_module_registration_hook(registered):
        yield
