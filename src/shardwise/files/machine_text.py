"""A machine as a machine file's text: the inverse of machine_file.machine_from_toml, exactly (constants,
units and sources included).

Values are written with as many digits as give them back, in the unit of their Constant where the machine has
one.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwise.core.machine import Constant, Link, Machine
from shardwise.files import machine_fields as fields
from shardwise.files.machine_fields import Field, Quantity
from shardwise.files.machine_file import ANY, whole_if, written


def to_toml(machine: Machine) -> str:
    """Raises AssertionError for a constant without its source: a machine's every number says where it comes
    from."""
    return "\n".join(_Writer(machine).lines()) + "\n"


def constant(
    path: str, value: float | Sequence[Sequence[float]], unit: str, source: str, fitted: str | None = None
) -> Constant:
    """A Constant as reading the file gives it. value: in that unit."""
    return Constant(
        path,
        written([list(row) for row in value] if isinstance(value, Sequence) else value),
        unit,
        source,
        fitted,
    )


@dataclass(frozen=True, slots=True)
class _Writer:
    machine: Machine

    def lines(self) -> Iterator[str]:
        machine = self.machine
        for key in ("name", "device", "about"):
            yield f"{key} = {_text(getattr(machine, key))}"
        yield f"devices_per_node = {machine.devices_per_node}"
        yield from self.section("memory", "memory", machine, fields.MEMORY)
        if machine.power_w is not None:
            yield from self.section("power", "power", machine, fields.CAP)
        if machine.error is not None:
            yield from self.section("predictions", "predictions", machine, fields.PREDICTIONS)
        for dtype, matmul in machine.matmuls:
            yield from self.section(f"matmul.{_key(dtype)}", f"matmul.{dtype}", matmul, fields.MATMUL)
            tiles = [(tile.rows, tile.columns, tile.share) for tile in matmul.tiles]
            yield self.many(f"matmul.{dtype}.tiles", tiles)
        for dtype, attention in machine.attentions:
            path = f"attention.{dtype}"
            yield from self.section(f"attention.{_key(dtype)}", path, attention, fields.ATTENTION)
        for name, kernel in machine.kernels:
            yield from self.section(f"kernels.{_key(name)}", f"kernels.{name}", kernel, fields.KERNEL)
        yield from self.section("launch", "launch", machine.launch, fields.LAUNCH)
        if machine.spread is not None:
            yield from self.section("spread", "spread", machine.spread, fields.SPREAD)
        if machine.within.is_known:
            yield from self.link("links.within", machine.within)
        if machine.between is not None:
            yield from self.link("links.between", machine.between)

    def section(self, head: str, path: str, noun: object, each: Sequence[Field]) -> Iterator[str]:
        yield from ("", f"[{head}]", *self.constants(path, noun, each))

    def constants(self, path: str, noun: object, each: Sequence[Field]) -> Iterator[str]:
        """A measured curve instead of the numbers, where there is one; what may be left out only where it was
        told or says something."""
        if getattr(noun, "points", ()):
            yield self.many(f"{path}.points", noun.points)  # type: ignore[attr-defined]
            return
        for one in each:
            value = getattr(noun, one.attribute)
            if one.is_needed or value != one.default or self.known(f"{path}.{one.key}") is not None:
                yield self.one(f"{path}.{one.key}", value, one.quantity)

    def link(self, path: str, link: Link) -> Iterator[str]:
        yield from self.section(path, path, link, fields.LINK)
        if link.reach:
            yield self.many(f"{path}.reach", link.reach)
        for kind, rates in link.rates:
            name = ANY if kind is None else str(kind)
            for index, rate in enumerate(rates):
                yield from ("", f"[[{path}.{name}]]", f"ranks = {rate.ranks}")
                yield from self.constants(f"{path}.{name}[{index}]", rate, fields.COLLECTIVE)

    def known(self, path: str) -> Constant | None:
        return next((each for each in self.machine.constants if each.path == path), None)

    def one(self, path: str, value: float, quantity: Quantity) -> str:
        told = self.known(path)
        assert told is not None, f"{path} has no source"
        unit, _, per = told.unit.partition(" per ")
        scale = dict(quantity.units)[unit] / (self.machine.devices_per_node if per == "node" else 1)
        place = f', per = "{per}"' if quantity.shared else ""
        return self.line(path, _shortest(value, scale), f"{_text(unit)}{place}", told)

    def many(self, path: str, rows: Sequence[Sequence[float]]) -> str:
        told = self.known(path)
        assert told is not None, f"{path} has no source"
        return self.line(path, written([list(row) for row in rows]), _text(told.unit), told)

    def line(self, path: str, value: str, unit: str, told: Constant) -> str:
        fitted = f", fitted = {_text(told.fitted)}" if told.fitted is not None else ""
        return (
            f"{path.rpartition('.')[2]} = {{ value = {value}, unit = {unit}, source = "
            f"{_text(told.source)}{fitted} }}"
        )


def _shortest(value: float, scale: float) -> str:
    """The fewest digits in the unit that give the value back, exactly where any do."""
    in_unit = value / scale
    for digits in range(1, 18):
        text = f"{in_unit:.{digits}g}"
        if float(text) * scale == value:
            break
    return repr(whole_if(float(text)))


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return (
        name
        if name and all((each.isalnum() and each.isascii()) or each in "-_" for each in name)
        else _text(name)
    )
