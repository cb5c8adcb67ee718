"""Names of modules that stand in a row of layers: `layers.7.attention`. Standard library only."""

import re
from collections.abc import Collection


def moved_name(name: str, prefix: str | None, by: int) -> str:
    """`layers.1.attention` -> `layers.7.attention` for prefix "layers" and by 6; names outside the layers as
    they are."""
    index = layer_index(name, prefix)
    if index is None or by == 0:
        return name
    assert prefix is not None
    tail = name[len(prefix) + 1 + len(str(index)) :]
    return f"{prefix}.{index + by}{tail}"


def any_layer(name: str) -> str:
    """`layers.7.attention` -> `layers.*.attention`: a name as a plan's pattern has it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def repeats(pattern: str) -> bool:
    """Whether it stands for a module of every layer."""
    return "*" in pattern.split(".")


def layer_index(name: str, prefix: str | None) -> int | None:
    """7 for `layers.7.attention` and prefix "layers"; None outside the layers."""
    if prefix is None or not name.startswith(f"{prefix}."):
        return None
    number = name[len(prefix) + 1 :].partition(".")[0]
    return int(number) if number.isdecimal() else None


def is_inside(module: str, others: Collection[str]) -> bool:
    """Whether a module is one of the others, or inside one."""
    return any(module == other or module.startswith(f"{other}.") for other in others)
