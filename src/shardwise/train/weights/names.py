"""Which tensors of a Hugging Face folder make up which of a model, by transformers' own rules: most go under
the same name, some under another, and some are put together of several (experts, which files hold one by
one)."""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Tensors of a folder that are made into parameters together. target: the parameter, or the first of
    them. sources: (the rule's pattern, name in the folder). converter: None where it is one and the same."""

    target: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    converter: Any = None

    def convert(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Whole tensors of the folder, by name -> whole parameters, by name."""
        rule = deepcopy(self.converter)
        for pattern, name in self.sources:
            rule.add_tensor(self.target, name, pattern, tensors[name])
        made = rule.convert(self.target, model=model, config=model.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}


def groups_of(model: Any, names: Iterable[str]) -> tuple[list[Group], list[str]]:
    """(what is made of the tensors of a folder, those that the model has no use for). model: the whole one,
    on the meta device."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [each for each in rules if isinstance(each, WeightRenaming)]
    converters = [each for each in rules if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Group] = {}
    unused = []
    for name in sorted(names, key=_naturally):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:
            target, pattern = name, None
        if target not in own:
            unused.append(name)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        group = found.setdefault(target, Group(target, converter=converter))
        group.sources.append((pattern or name, name))
    return list(found.values()), unused


def file_groups(model: Any, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Parameters that are made into tensors of a folder together, in the model's order."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, apply_converters

    rules = [each.reverse_transform() for each in get_model_conversion_mapping(model, add_legacy=False)[::-1]]
    converters = [each for each in rules if isinstance(each, WeightConverter)]
    found: dict[str, list[str]] = {}
    for name in names:
        target, pattern = apply_converters(name, converters)
        found.setdefault(target if pattern is not None else name, []).append(name)
    return [tuple(each) for each in found.values()]


def as_in_files(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder that one of file_groups() is made into; on the meta device too."""
    from transformers.core_model_loading import revert_weight_conversion

    made: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return made


def _naturally(name: str) -> list[tuple[int, str]]:
    """layers.2 before layers.10: experts are stacked in this order."""
    return [(int(each), "") if each.isdecimal() else (-1, each) for each in re.split(r"(\d+)", name)]
