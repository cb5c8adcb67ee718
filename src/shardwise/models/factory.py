"""`package.module:factory`: the user's own model, from a function of the user's own.

Importing runs the user's code, as `python -m package.module` would; nothing else of theirs is read. The
factory may take `dtype` and `mesh` (a DeviceMesh; it may then return a model that it has sharded itself, or a
SelfSharded, which tells more of it) and nothing more. It is called where new tensors are made on the meta
device.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from shardwise.core.errors import ModelError
from shardwise.core.plan import Family, TheirPlan, suggest
from shardwise.core.shown import shown, told
from shardwise.models.dtype import default_dtype
from shardwise.models.self_sharded import gives_logits, module_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_OFFERED = ("dtype", "mesh")


@dataclass(frozen=True, slots=True)
class FactoryModel:
    """A model that the user's function makes. `takes`: those of dtype and mesh that it has parameters for."""

    name: str
    factory: Callable[..., object]
    takes: frozenset[str]
    needs_mesh: bool

    @property
    def about(self) -> str:
        return "your own model"

    @property
    def vocab_size(self) -> int | None:
        return None

    @property
    def max_seq(self) -> None:
        return

    @property
    def family(self) -> Family:
        return Family.LLAMA

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    @property
    def default_plan(self) -> str | None:
        return TheirPlan.OWN if self.takes_mesh else None

    @property
    def initialises(self) -> bool:
        return True

    @property
    def takes_mesh(self) -> bool:
        """Whether it may shard its model itself: build() then wants a mesh."""
        return "mesh" in self.takes

    def small(self, tp: int) -> None:
        """Only its author knows what may be smaller."""
        return

    def build(
        self, *, dtype: torch.dtype, device: torch.device | str = "meta", mesh: "DeviceMesh | None" = None
    ) -> nn.Module:
        """What the factory returns; of a SelfSharded the model. Raises ModelError where it raises, returns no
        module, or needs a mesh and gets none."""
        given: dict[str, object] = {}
        if "dtype" in self.takes:
            given["dtype"] = dtype
        if mesh is not None and self.takes_mesh:
            given["mesh"] = mesh
        elif self.needs_mesh:
            raise ModelError(
                f'model "{self.name}": the factory takes a mesh, and there is none. Give it a default: '
                "mesh=None."
            )
        try:
            with torch.device(device), default_dtype(dtype):
                made = self.factory(**given)
        except (Exception, SystemExit) as error:
            raise ModelError(
                f'model "{self.name}": the factory raised {told(error)} Call it by itself, under '
                'torch.device("meta"), to see where.'
            ) from None
        model = module_of(made, self.name)
        if _is_hugging_face(model) and not gives_logits(model):
            from shardwise.models.hugging_face import give_logits

            give_logits(model)
        return model


def factory_model(factory: Callable[..., object], name: str) -> FactoryModel:
    """Of a function, as people call it. Raises ModelError for arguments that nobody gives it."""
    return FactoryModel(name, factory, *_parameters(factory, name))


def find_factory(text: str) -> FactoryModel:
    """Imports the module and looks at the factory, which isn't called yet. Raises ModelError."""
    name = shown(text)
    module_name, _, path = text.partition(":")
    if len(text) > 500 or not all(
        part.isidentifier() for part in (*module_name.split("."), *path.split("."))
    ):
        raise ModelError(
            f'model "{name}": not of the form package.module:factory, a module to import and a function in '
            "it."
        )
    found: object = _import(module_name, name)
    for part in path.split("."):
        if not hasattr(found, part):
            hint = suggest(part, [own for own in dir(found) if not own.startswith("_")])
            raise ModelError(
                f'model "{name}": {module_name} has no "{part}".{hint} Name a function that returns an '
                "nn.Module."
            )
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise ModelError(
            f'model "{name}": {path} is of type {shown(type(found).__name__)}, which can\'t be called for '
            "a new model. Name a function."
        )
    return factory_model(found, name)


def _import(module_name: str, name: str) -> object:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name is not None
            and f"{module_name}.".startswith(f"{error.name}.")
        ):
            raise ModelError(
                f'model "{name}": no module "{error.name}" in this folder or among the installed packages. '
                "Run it from the folder of your "
                "code, or install your package."
            ) from None
        raise ModelError(
            f'model "{name}": importing {module_name} raised {told(error)} Try: python -c "import '
            f'{module_name}".'
        ) from None


def _parameters(factory: Callable[..., object], name: str) -> tuple[frozenset[str], bool]:
    """(those of dtype and mesh that it takes, whether mesh is one that it needs)"""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (ValueError, TypeError):
        return frozenset(), False
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for p in parameters:
        is_needed = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if is_needed and not (p.name in _OFFERED and p.name in by_name):
            raise ModelError(
                f'model "{name}": the factory needs an argument "{shown(p.name)}". It may take dtype and '
                "mesh; give any other a default, or "
                "name a function that takes none."
            )
    takes = frozenset(by_name) & frozenset(_OFFERED)
    return takes, "mesh" in takes and by_name["mesh"].default is inspect.Parameter.empty


def _is_hugging_face(model: nn.Module) -> bool:
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(model, loaded.PreTrainedModel)
