"""A model that a command can name: a spec of ours (models/specs.py), `hf:...` (models/hugging_face.py), a
framework's (models/frameworks/) or `package.module:factory` (models/factory.py)."""

from torch import nn

from shardwise.core.errors import ModelError
from shardwise.core.named_path import HUGGING_FACE
from shardwise.core.plan import suggest
from shardwise.core.shown import shown
from shardwise.models.frameworks import find_in_framework, frameworks
from shardwise.models.model_source import ModelSource as ModelSource
from shardwise.models.specs import SPECS, get_spec

# how a model is named beside the specs' names, and what it then is; each is for every command. Lists and
# help texts show these
NAMINGS = (
    (
        "NAME?KEY=VALUE,...",
        "one of those above with numbers replaced, such as gpt3-175b?n_layers=4; heads and ffn_hidden "
        "follow hidden",
    ),
    ("hf:TYPE", "the default configuration of a Hugging Face model type, such as hf:qwen3"),
    (
        "hf:PATH",
        "a Hugging Face config.json, or the folder that holds it; neither the hub nor weights are read",
    ),
    (
        "hf:...?KEY=VALUE,...",
        "either with some numbers of the configuration replaced, such as hf:qwen3?num_hidden_layers=2",
    ),
    *(naming for framework in frameworks() for naming in framework.namings),
    (
        "package.module:factory",
        "your own: a function that returns an nn.Module, ids [B, S] -> logits [B, S, V]",
    ),
)


def find_model(text: str) -> ModelSource:
    """The model of a name. Raises ModelError where there is none; for `package.module:factory` the user's
    module is imported."""
    if text.partition("?")[0] in SPECS:
        return get_spec(text)
    if text.startswith(HUGGING_FACE):
        from shardwise.models.hugging_face import find_hugging_face

        return find_hugging_face(text)
    if (found := find_in_framework(text)) is not None:
        return found
    if ":" in text:
        from shardwise.models.factory import find_factory

        return find_factory(text)
    in_frameworks = "".join(f"{each.prefix}:..., " for each in frameworks())
    raise ModelError(
        f'unknown model "{shown(text)}".{suggest(text.partition("?")[0][:80], SPECS)} Known: '
        f"{', '.join(SPECS)}; "
        f"NAME?KEY=VALUE,...; or hf:TYPE, hf:PATH of a config.json, {in_frameworks}or "
        "package.module:factory."
    )


def is_of_many(name: str) -> bool:
    """Whether a model is one of the hundreds that a library knows by their types: that one of them can't be
    built says something of it, and ends nothing."""
    return name.startswith(HUGGING_FACE) or name.partition(":")[0] in [each.prefix for each in frameworks()]


def vocab_size_of(model: nn.Module) -> int:
    """How many ids a built model knows: its own or its config's `vocab_size`, or the rows of its (first)
    embedding. Raises ModelError."""
    for holder in (model, getattr(model, "config", None)):
        size = getattr(holder, "vocab_size", None)
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
    name = embedding_of(model)
    if name is not None:
        table: nn.Embedding = model.get_submodule(name)  # type: ignore[assignment]
        return table.num_embeddings
    raise ModelError(
        f"{shown(type(model).__name__)}: no nn.Embedding tells the vocabulary. Give the model an attribute "
        "vocab_size."
    )


def embedding_of(model: nn.Module) -> str | None:
    """The name of the table that token ids are looked up in: the one that a Hugging Face model calls so, else
    the first nn.Embedding; None where there is none."""
    own = getattr(model, "get_input_embeddings", lambda: None)()
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return next((name for name, table in tables.items() if table is own), next(iter(tables), None))
