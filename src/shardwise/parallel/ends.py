"""What lies before and after a model's row of layers: read off one forward on meta tensors, so that a
pipeline's stages can be cut.

Told of any model: which modules hand parameters to what runs before the layers and after them, what a layer
gives, and what passes from one layer to the next. What can't be cut is refused here, before anything is
built.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardwise.core.errors import ModelError
from shardwise.core.layer_name import layer_index
from shardwise.core.pipeline import Span
from shardwise.dims.record import Entered, Left, Op, Record, Source, Value
from shardwise.dims.trace import record_of, seq_within
from shardwise.models.layers import Layers, find_layers
from shardwise.models.model_source import ModelSource
from shardwise.models.source import vocab_size_of
from shardwise.parallel.styles import class_of

_LEAST = 3  # the first layer, one in between, the last


@dataclass(frozen=True, slots=True)
class Ends:
    """before, after: modules outside the layers that own parameters which are read there. called_before: all
    modules that are called before the first layer. width: of what passes between layers, [B, S, width].
    gives: a layer gives a tuple of so many, whose first is that; 0: the tensor itself.
    """

    model: str
    layers: Layers
    before: tuple[str, ...]
    after: tuple[str, ...]
    called_before: tuple[tuple[str, type[nn.Module]], ...]
    width: int
    gives: int


def ends_of(source: ModelSource) -> Ends:
    """Raises ModelError for a model that no pipeline can run."""
    whole = source.build(dtype=torch.bfloat16)
    layers = find_layers(whole)
    if layers is None:
        raise _refused(source.name, "it has no nn.ModuleList of layers, which could be dealt to stages")
    _check_shared(whole, source.name, layers)
    short = source.build(dtype=torch.bfloat16)
    layers.shorten(short, min(layers.count, max(_LEAST, layers.kinds(whole))))
    given: list[object] = []
    modules = list(layers.modules(short))
    hooks = [module.register_forward_hook(lambda _, __, out: given.append(out)) for module in modules]
    record = record_of(short, vocab_size_of(short), seq=seq_within(source.max_seq))
    for hook in hooks:
        hook.remove()
    read = _Reading(record, source.name, layers.prefix, len(modules))
    before, after = _owners(short, read, source.name, layers.prefix)
    called = tuple((name, class_of(short.get_submodule(name))) for name in read.called_before())
    return Ends(source.name, layers, before, after, called, read.width(), _gives(given, source.name))


def check_spans(whole: nn.Module, ends: Ends, spans: Sequence[Span]) -> None:
    """Raises ModelError where layers of several parts share a parameter."""
    part_of = {layer: part for part, span in enumerate(spans) for layer in span.indices}
    seen: dict[nn.Parameter, tuple[int, str]] = {}
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        index = layer_index(name, ends.layers.prefix)
        if index is None:
            continue
        part, first = seen.setdefault(parameter, (part_of[index], name))
        if part != part_of[index]:
            raise _refused(ends.model, f"{first} and {name} are one parameter, and on several stages")


def _check_shared(whole: nn.Module, model: str, layers: Layers) -> None:
    """Whether layers and what is around them share a parameter."""
    inside: dict[nn.Parameter, str] = {}
    outside: dict[nn.Parameter, str] = {}
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        (outside if layer_index(name, layers.prefix) is None else inside)[parameter] = name
    for parameter in inside.keys() & outside.keys():
        raise _refused(model, f"{inside[parameter]} and {outside[parameter]} are one parameter")


class _Reading:
    """A record, told by where its events stand: before the first layer, in one, between two, after the
    last."""

    def __init__(self, record: Record, model: str, prefix: str, count: int) -> None:
        self.record, self.model, self.prefix, self.count = record, model, prefix, count
        self.entered: dict[int, Entered] = {}
        self.left: dict[int, Left] = {}
        for event in record.events:
            index = layer_index(event.module, prefix)
            if index is None or event.module != f"{prefix}.{index}" or isinstance(event, Op):
                continue
            kept = self.entered if isinstance(event, Entered) else self.left
            if index in kept:
                raise self.refused(f"{event.module} is called twice in a forward")
            kept[index] = event  # type: ignore[assignment]
        if sorted(self.entered) != list(range(count)):
            raise self.refused(f"its forward doesn't call all of {prefix}")

    def refused(self, why: str) -> ModelError:
        return _refused(self.model, why)

    def reads(self) -> Iterator[tuple[str, str, str]]:
        """(parameter, module in whose call it is read, "before", "in", "between" or "after")."""
        done, depth = 0, 0
        for event in self.record.events:
            index = layer_index(event.module, self.prefix)
            if index is not None and event.module == f"{self.prefix}.{index}" and not isinstance(event, Op):
                depth += 1 if isinstance(event, Entered) else -1
                done += isinstance(event, Left)
            if isinstance(event, Op):
                where = (
                    "in" if depth else "before" if not done else "after" if done == self.count else "between"
                )
                for value in event.inputs:
                    if value.source is Source.PARAMETER:
                        yield value.name, event.module, where

    def called_before(self) -> Iterator[str]:
        for event in self.record.events:
            if event is self.entered[0]:
                return
            if isinstance(event, Entered) and event.module:
                yield event.module

    def width(self) -> int:
        """Raises ModelError where more passes between layers than one tensor [B, S, width]."""
        for index in range(1, self.count):
            taken = self.entered[index].inputs
            carried = [value for value in taken if value.has_gradient]
            if len(carried) != 1:
                raise self.refused(
                    f"{len(carried)} tensors that need gradients go into {self.prefix}.{index}, and stages "
                    "pass one on"
                )
            if carried[0] is not next((value for value in taken if _is_hidden(value)), None):
                raise self.refused(f"what {self.prefix}.{index} takes first isn't what needs a gradient")
            if not any(value is carried[0] for value in self.left[index - 1].outputs):
                raise self.refused(
                    f"what {self.prefix}.{index - 1} gives is changed before {self.prefix}.{index} takes it"
                )
        shape, ids = self.left[0].outputs[0].shape, self.record.ids
        assert ids is not None
        if len(shape) != 3 or shape[:2] != ids.shape:
            raise self.refused(
                f"{self.prefix}.0 gives {list(shape)} for ids {list(ids.shape)}, and stages pass "
                "[B, S, width] on"
            )
        return shape[2]


def _is_hidden(value: Value) -> bool:
    return len(value.shape) == 3 and value.is_live


def _owners(
    model: nn.Module, read: _Reading, name: str, prefix: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Modules outside the layers whose own parameters are read before them, and after them."""
    owners: dict[str, list[str]] = {}
    first: dict[nn.Parameter, str] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if layer_index(path, prefix) is None:
            owners.setdefault(first.setdefault(parameter, path), []).append(path.rpartition(".")[0])
    sides: dict[str, set[str]] = {"before": set(), "after": set()}
    for path, module, where in read.reads():
        if path not in owners:
            continue
        if where not in sides:
            raise _refused(name, f"{path} is read {where} the layers, which are on several stages")
        # a parameter that another module's code reads is needed wherever its owners are
        sides[where] |= {module} if module in owners[path] else set(owners[path])
    for owner in sides["before"] | sides["after"]:
        if not owner or prefix.startswith(f"{owner}."):
            raise _refused(name, f"{owner or 'the model itself'} owns parameters beside the layers")
    order = [path for path, _ in model.named_modules()]
    return tuple(p for p in order if p in sides["before"]), tuple(p for p in order if p in sides["after"])


def _gives(given: Sequence[object], name: str) -> int:
    sizes = {
        0 if isinstance(each, Tensor) else len(each) if isinstance(each, tuple) else -1 for each in given
    }
    if len(sizes) != 1 or -1 in sizes:
        raise _refused(name, "its layers give neither a tensor nor a tuple")
    return sizes.pop()


def _refused(model: str, why: str) -> ModelError:
    return ModelError(f'model "{model}": {why}, so no pipeline can run it. Use a mesh with pp=1.')
