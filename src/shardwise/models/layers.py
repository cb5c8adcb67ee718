"""The repeated layers of a model: which list (or dict by number) of modules holds them, and whether they are
equal, so that one can stand for all.

Equal: the same modules of the same types with the same plain attributes, hooks, parameters and buffers
(names, shapes, dtypes). A layer's own number doesn't count. What a forward does with such a number isn't seen
here; trace/extend.py compares what really ran.
"""

from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass

from torch import nn

from shardwise.core.layer_name import layer_index
from shardwise.torch_private import hook_counts

_OWN_NUMBER = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "idx"})
_PLAIN = (int, float, bool, str, type(None))


@dataclass(frozen=True, slots=True)
class Layers:
    """`count` layers named prefix.0, prefix.1, ..."""

    prefix: str
    count: int
    are_equal: bool

    def modules(self, model: nn.Module) -> Iterator[nn.Module]:
        """The layers that `model` has (it may be a shortened one)."""
        yield from model.get_submodule(self.prefix).children()

    def numbered(self, model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
        """The same, each with its number in the whole model."""
        for number, layer in model.get_submodule(self.prefix).named_children():
            yield int(number), layer

    def kinds(self, model: nn.Module) -> int:
        """How many of the first layers hold one of each kind."""
        signatures = [_signature(layer) for layer in self.modules(model)]
        return 1 + max(signatures.index(signature) for signature in signatures)

    def representative(self, model: nn.Module) -> Callable[[str], str]:
        """The name of a module or parameter -> that of the same one in the first layer of its kind."""
        signatures = [_signature(layer) for layer in self.modules(model)]
        first = [signatures.index(signature) for signature in signatures]

        def like(name: str) -> str:
            index = layer_index(name, self.prefix)
            if index is None:
                return name
            return f"{self.prefix}.{first[index]}{name[len(f'{self.prefix}.{index}') :]}"

        return like

    def shorten(self, model: nn.Module, count: int) -> None:
        """Leaves the first `count` layers."""
        parent_name, _, own_name = self.prefix.rpartition(".")
        layers = model.get_submodule(self.prefix)
        if isinstance(layers, nn.ModuleDict):
            for number in list(layers)[count:]:
                del layers[number]
            return
        assert isinstance(layers, nn.ModuleList)
        setattr(model.get_submodule(parent_name), own_name, layers[:count])


def find_layers(model: nn.Module, among: Collection[str] | None = None) -> Layers | None:
    """The outermost list of modules that holds the most parameters; None where the model has no such list. A
    stage of a pipeline has its own under their numbers in the whole model.
    among: names of modules of which the list's first must be one."""
    best: tuple[int, str, nn.ModuleList | nn.ModuleDict] | None = None
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList | nn.ModuleDict)
            and len(module)
            and all(number.isdecimal() for number in dict(module.named_children()))
            and (among is None or f"{name}.0" in among)
            and not (best and name.startswith(f"{best[1]}."))
        ):
            size = sum(parameter.numel() for parameter in module.parameters())
            if best is None or size > best[0]:
                best = (size, name, module)
    if best is None:
        return None
    _, name, layers = best
    first, *others = map(_signature, layers.children())
    return Layers(name, len(layers), all(other == first for other in others))


def copied(model: nn.Module) -> nn.Module | None:
    """The same model once more. None where it can't be copied, or something in it may speak of its own
    modules: a hook, a parameter that was worked out of others, a function that has them in its closure."""
    for module in model.modules():
        closures = (getattr(value, "__closure__", None) for value in vars(module).values())
        if any(hook_counts(module)) or any(closures):
            return None
    try:
        return deepcopy(model)
    except Exception:  # whatever its own __deepcopy__ raises
        return None


def _signature(layer: nn.Module) -> tuple[object, ...]:
    return tuple(
        (
            name,
            type(module),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items(), key=lambda item: item[0])
                if isinstance(value, _PLAIN) and key not in _OWN_NUMBER
            ),
            hook_counts(module),
            tuple(
                (key, tuple(p.shape), p.dtype)
                for key, p in module.named_parameters(recurse=False, remove_duplicate=False)
            ),
            tuple(
                (key, tuple(b.shape), b.dtype)
                for key, b in module.named_buffers(recurse=False, remove_duplicate=False)
            ),
        )
        for name, module in layer.named_modules()
    )
