"""A machine as a machine file's text: the inverse of machine_file.machine_from_toml, exactly (constants, units and sources included).

Values are written with as many digits as give them back, in the unit of their Constant where the machine has one.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwise.core.machine import (
    AttentionRate,
    CollectiveRate,
    Constant,
    KernelRate,
    Link,
    Machine,
    MatmulRate,
    Points,
)
from shardwise.files import machine_file as fields
from shardwise.files.machine_file import ANY, Quantity


def to_toml(machine: Machine) -> str:
    """Raises AssertionError for a constant without its source: a machine's every number says where it comes from."""
    return "\n".join(_Writer(machine).lines()) + "\n"


def constant(
    path: str, value: float | Sequence[Sequence[float]], unit: str, source: str, fitted: str | None = None
) -> Constant:
    """A Constant as reading the file gives it. value: in that unit."""
    return Constant(
        path,
        fields.written([list(row) for row in value] if isinstance(value, Sequence) else value),
        unit,
        source,
        fitted,
    )


@dataclass(frozen=True, slots=True)
class _Writer:
    machine: Machine

    def lines(self) -> Iterator[str]:
        machine = self.machine
        yield f"name = {_text(machine.name)}"
        yield f"device = {_text(machine.device)}"
        yield f"about = {_text(machine.about)}"
        yield f"devices_per_node = {machine.devices_per_node}"
        yield from ("", "[memory]")
        yield self.one("memory.capacity", machine.memory_bytes, fields.CAPACITY)
        yield self.one("memory.bandwidth", machine.memory_bytes_per_s, fields.BANDWIDTH)
        yield self.one("memory.context", machine.context_bytes, fields.HELD)
        if machine.power_w is not None:
            yield from ("", "[power]", self.one("power.cap", machine.power_w, fields.POWER))
        for dtype, matmul in machine.matmuls:
            yield from ("", f"[matmul.{_key(dtype)}]", *self.matmul(f"matmul.{dtype}", matmul))
        for dtype, attention in machine.attentions:
            yield from ("", f"[attention.{_key(dtype)}]", *self.attention(f"attention.{dtype}", attention))
        for name, kernel in machine.kernels:
            yield from ("", f"[kernels.{_key(name)}]", *self.kernel(f"kernels.{name}", kernel))
        yield from ("", "[launch]")
        for name in (*fields.LAUNCH_FIELDS, *fields.DTENSOR_FIELDS):
            seconds = getattr(machine.launch, f"{name}_s")
            if seconds is not None:
                yield self.one(f"launch.{name}", seconds, fields.START)
        if machine.within.is_known:
            yield from self.link("links.within", machine.within)
        if machine.between is not None:
            yield from self.link("links.between", machine.between)

    def matmul(self, path: str, rate: MatmulRate) -> Iterator[str]:
        yield self.one(f"{path}.peak", rate.peak_flops, fields.PEAK)
        yield self.one(f"{path}.units", rate.units, fields.UNITS)
        yield self.many(f"{path}.tiles", [(tile.rows, tile.columns, tile.share) for tile in rate.tiles])
        yield self.one(f"{path}.start", rate.start_s, fields.START)
        yield self.one(f"{path}.extra_k", rate.extra_k, fields.EXTRA_K)

    def attention(self, path: str, rate: AttentionRate) -> Iterator[str]:
        yield self.one(f"{path}.forward", rate.forward_flops, fields.RATE)
        yield self.one(f"{path}.backward", rate.backward_flops, fields.RATE)
        yield self.one(f"{path}.half_sequence", rate.half_sequence, fields.TOKENS)
        yield self.one(f"{path}.start", rate.start_s, fields.START)

    def kernel(self, path: str, rate: KernelRate) -> Iterator[str]:
        if rate.points:
            yield self.points(f"{path}.points", rate.points)
            return
        yield self.one(f"{path}.start", rate.start_s, fields.START)
        yield self.one(f"{path}.rate", rate.bytes_per_s, fields.KERNEL_RATE)
        if math.isfinite(rate.elements_per_s):
            yield self.one(f"{path}.elements", rate.elements_per_s, fields.ELEMENTS)

    def link(self, path: str, link: Link) -> Iterator[str]:
        yield from ("", f"[{path}]", self.one(f"{path}.bandwidth", link.bytes_per_s, fields.LINK_BANDWIDTH))
        if link.reach:
            yield self.points(f"{path}.reach", link.reach)
        for name, seconds in (("start", link.start_s), ("start_per_hop", link.start_per_hop_s)):
            if seconds or self.known(f"{path}.{name}") is not None:
                yield self.one(f"{path}.{name}", seconds, fields.START)
        for kind, rates in link.rates:
            name = ANY if kind is None else str(kind)
            for index, rate in enumerate(rates):
                yield from (
                    "",
                    f"[[{path}.{name}]]",
                    f"ranks = {rate.ranks}",
                    *self.collective(f"{path}.{name}[{index}]", rate),
                )

    def collective(self, path: str, rate: CollectiveRate) -> Iterator[str]:
        if rate.points:
            yield self.points(f"{path}.points", rate.points)
            return
        yield self.one(f"{path}.start", rate.start_s, fields.START)
        yield self.one(f"{path}.rate", rate.bytes_per_s, fields.COLLECTIVE_RATE)

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
        return self.line(
            path,
            json.dumps([[fields.whole_if(each) for each in row] for row in rows]),
            _text(told.unit),
            told,
        )

    def points(self, path: str, points: Points) -> str:
        return self.many(path, points)

    def line(self, path: str, value: str, unit: str, told: Constant) -> str:
        fitted = f", fitted = {_text(told.fitted)}" if told.fitted is not None else ""
        return f"{path.rpartition('.')[2]} = {{ value = {value}, unit = {unit}, source = {_text(told.source)}{fitted} }}"


def _shortest(value: float, scale: float) -> str:
    """The fewest digits in the unit that give the value back, exactly where any do."""
    in_unit = value / scale
    for digits in range(1, 18):
        text = f"{in_unit:.{digits}g}"
        if float(text) * scale == value:
            break
    return repr(fields.whole_if(float(text)))


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return (
        name
        if name and all((each.isalnum() and each.isascii()) or each in "-_" for each in name)
        else _text(name)
    )
