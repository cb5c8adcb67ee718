"""A machine as a TOML file's text, and back. Each constant is { value, unit, source }, with `fitted` where it
was fitted; no file is opened here.

    name, device ("cuda" or "cpu"), about, devices_per_node
    [memory]               capacity, bandwidth, context (held by the process beside tensors), workspace
                           (of each handle of the library that multiplies; may be left out: none)
    [power]                cap (optional; for the reader: rates hold under it)
    [predictions]          error (optional; a share: how far off predicted ratios between plans were)
    [matmul.DTYPE]         peak, units, tiles (rows, columns, share of peak), start, extra_k; group,
                           unaligned (optional)
    [attention.DTYPE]      forward, backward, half_sequence, start; [attention."DTYPE KERNEL"]: of one kernel,
                           flash-1, flash-2 or efficient (PyTorch's memory-efficient one)
    [kernels.NAME]         start, rate, elements; or points (bytes, seconds). NAME: an op, a kind of
                           ops, default
    [launch]               forward, backward, collective; dtensor_forward, dtensor_backward (all optional)
    [spread]               work (of one second's), collective: standard deviations of when ranks arrive
                           (optional)
    [links.within]         (optional where devices_per_node is 1) bandwidth; [[links.within.KIND]] ranks,
                           start, rate or points. KIND: a collective, or any. direct (optional): so many
                           devices are joined pair by pair, without a switch, of which the rates are
    [links.between]        the same, and reach (message bytes, share of bandwidth), start, start_per_hop

Bandwidths, capacities and power say per = "device" or per = "node". Every value must lie in its field's
plausible range: a wrong unit puts it outside.
"""

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from shardwise.core.collective import TIMED, CollectiveKind
from shardwise.core.errors import MachineError
from shardwise.core.machine import (
    DEFAULT,
    UNKNOWN_LINK,
    AttentionRate,
    CollectiveRate,
    Constant,
    KernelRate,
    Launch,
    Link,
    Machine,
    MatmulRate,
    Points,
    Spread,
    Tile,
)
from shardwise.core.plan import suggest
from shardwise.core.shown import shown
from shardwise.files.machine_fields import (
    ATTENTION,
    CAP,
    COLLECTIVE,
    KERNEL,
    KERNEL_RATE,
    LAUNCH,
    LINK,
    MATMUL,
    MEMORY,
    PREDICTIONS,
    SPREAD,
    TIME,
    Field,
    Quantity,
)

DEVICES = ("cuda", "cpu")
ANY = "any"
_WRITE = 'Write {} = {{ value = ..., unit = "...", source = "..." }}.'


_ROOT = (
    "name",
    "device",
    "about",
    "devices_per_node",
    "memory",
    "power",
    "predictions",
    "matmul",
    "attention",
    "kernels",
    "launch",
    "spread",
    "links",
)


def machine_from_toml(text: str, source: str = "machine") -> Machine:
    """Reads a machine file's text. Raises MachineError with the field, what is plausible there, and what to
    do."""
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise MachineError(f"{source}: not valid TOML: {error}.") from None
    return _Reader(source, table).machine()


@dataclass(slots=True)
class _Reader:
    source: str
    table: dict[str, Any]
    constants: list[Constant] = field(default_factory=list)
    devices: int = 1

    def machine(self) -> Machine:
        root = _Section(self, "", self.table)
        root.only(_ROOT)
        device = root.text("device")
        if device not in DEVICES:
            raise self.error("device", f'is "{shown(device)}"', f"Allowed: {', '.join(DEVICES)}.")
        self.devices = root.whole("devices_per_node", 1, 1024)
        has_links = "links" in self.table or self.devices > 1
        links = root.section("links", ("within", "between")) if has_links else None
        memory = root.section("memory").numbers(MEMORY)
        power = root.section("power").numbers(CAP) if "power" in self.table else {"power_w": None}
        told = root.section("predictions").numbers(PREDICTIONS) if "predictions" in self.table else {}
        bandwidth = memory["memory_bytes_per_s"]
        kernels = tuple((name, _kernel(part, bandwidth, device)) for name, part in root.sections("kernels"))
        if DEFAULT not in dict(kernels):
            advice = "It serves every op that has no rate of its own: give its start and rate."
            raise self.error(f"kernels.{DEFAULT}", "is missing", advice)
        return Machine(
            name=root.text("name"),
            device=device,
            about=root.text("about"),
            devices_per_node=self.devices,
            **memory,
            **power,
            **told,
            kernels=kernels,
            launch=Launch(**root.section("launch").numbers(LAUNCH)),
            spread=Spread(**root.section("spread").numbers(SPREAD)) if "spread" in self.table else None,
            matmuls=tuple((dtype, _matmul(part)) for dtype, part in root.sections("matmul")),
            attentions=tuple(
                (dtype, AttentionRate(**part.numbers(ATTENTION)))
                for dtype, part in root.sections("attention")
            ),
            within=_link(links.section("within")) if links is not None else UNKNOWN_LINK,
            between=_link(links.section("between")) if links and "between" in links.table else None,
            constants=tuple(self.constants),
        )

    def error(self, path: str, what: str, advice: str) -> MachineError:
        return MachineError(f"{self.source}: {path} {what}. {advice}")


@dataclass(slots=True)
class _Section:
    """A table of the file, and its path in it."""

    reader: _Reader
    path: str
    table: Mapping[str, Any]

    def at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def only(self, known: tuple[str, ...]) -> None:
        for key in self.table:
            if key not in known:
                raise self.reader.error(
                    self.at(shown(key)),
                    "is unknown",
                    f"{suggest(key, known).strip()} Allowed: {', '.join(known)}.".strip(),
                )

    def text(self, key: str) -> str:
        value = self.table.get(key)
        if not isinstance(value, str) or not value:
            raise self.reader.error(
                self.at(key), "is missing" if value is None else "is no text", f'Write {key} = "...".'
            )
        return value

    def whole(self, key: str, low: int, high: int) -> int:
        value = self.table.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            what = "is missing" if value is None else f"is {shown(str(value))}"
            raise self.reader.error(self.at(key), what, f"Write a whole number from {low} to {high}.")
        return value

    def section(self, key: str, known: tuple[str, ...] = ()) -> "_Section":
        value = self.table.get(key)
        if not isinstance(value, dict):
            raise self.reader.error(
                f"[{self.at(key)}]",
                "is missing",
                "A machine file needs that table; `shardwise machines --show NAME` prints one.",
            )
        part = _Section(self.reader, self.at(key), value)
        if known:
            part.only(known)
        return part

    def numbers(self, fields: Sequence[Field], *others: str) -> dict[str, Any]:
        """The constants by attribute; `others` are keys that the caller reads."""
        self.only((*(each.key for each in fields), *others))
        return {
            each.attribute: self.constant(each.key, each.quantity)
            if each.is_needed or each.key in self.table
            else each.default
            for each in fields
        }

    def sections(self, key: str) -> Iterator[tuple[str, "_Section"]]:
        value = self.table.get(key, {})
        if not isinstance(value, dict):
            raise self.reader.error(self.at(key), "is no table", f"Write [{self.at(key)}.NAME].")
        for name in value:
            yield name, _Section(self.reader, self.at(key), value).section(name)

    def constant(self, key: str, quantity: Quantity) -> float:
        """One number in SI."""
        value, scale = self._read(key, quantity)
        if not _is_number(value):
            raise self.reader.error(f"{self.at(key)}.value", f"is {shown(str(value))}", "Write a number.")
        return self.plausible(key, float(value) * scale, quantity)

    def plausible(self, key: str, value: float, quantity: Quantity) -> float:
        if not quantity.low <= value <= quantity.high:
            advice = f"{quantity.plausible} Is its unit right?"
            raise self.reader.error(self.at(key), f"is {quantity.shown(value)}", advice)
        return value

    def rows(self, key: str, width: int) -> list[list[float]]:
        """A constant that is a table of numbers, as it is written."""
        value, _ = self._read(key, None)
        rows = value if isinstance(value, list) else []
        if not rows or not all(
            isinstance(row, list) and len(row) == width and all(map(_is_number, row)) for row in rows
        ):
            raise self.reader.error(
                f"{self.at(key)}.value", "is no table", f"Write rows of {width} numbers, such as [[1, 2]]."
            )
        return rows

    def points(self, key: str, quantity: Quantity) -> Points:
        """(bytes, seconds), growing in bytes."""
        points = tuple((float(x), float(y)) for x, y in self.rows(key, 2))
        for x, y in points:
            if x <= 0:
                raise self.reader.error(self.at(key), f"has a size of {x:g}", "Sizes are positive.")
            self.plausible(key, y, quantity)
            if y <= 0:
                raise self.reader.error(
                    self.at(key), f"has {y:g} at {x:g}", "Values of a curve are positive."
                )
        if any(a[0] >= b[0] for a, b in pairwise(points)):
            raise self.reader.error(self.at(key), "doesn't grow", "Sort its points by size, each size once.")
        return points

    def _read(self, key: str, quantity: Quantity | None) -> tuple[Any, float]:
        """The value as written, and what its unit is in SI (per device). Notes the constant."""
        path, entry = self.at(key), self.table.get(key)
        plausible = "" if quantity is None else f" {quantity.plausible}"
        if entry is None:
            raise self.reader.error(path, "is missing", f"{_WRITE.format(key)}{plausible}")
        if not isinstance(entry, dict):
            raise self.reader.error(path, "has no source", _WRITE.format(key))
        part = _Section(self.reader, path, entry)
        part.only(("value", "unit", "per", "source", "fitted"))
        if "value" not in entry:
            raise self.reader.error(f"{path}.value", "is missing", "Write its number.")
        unit, source, scale = part.text("unit"), part.text("source"), 1.0
        if quantity is not None:
            if unit not in dict(quantity.units):
                allowed = f"Allowed: {', '.join(dict(quantity.units))}.{plausible}"
                raise self.reader.error(f"{path}.unit", f'is "{shown(unit)}"', allowed)
            scale = dict(quantity.units)[unit]
            if quantity.shared:
                per = part.text("per")
                if per not in ("device", "node"):
                    raise self.reader.error(f"{path}.per", f'is "{shown(per)}"', "Allowed: device, node.")
                scale /= self.reader.devices if per == "node" else 1
                unit = f"{unit} per {per}"
        fitted = part.text("fitted") if "fitted" in entry else None
        self.reader.constants.append(Constant(path, written(entry["value"]), unit, source, fitted))
        return entry["value"], scale


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def written(value: object) -> str:
    """A constant's value as a Constant shows it."""
    if isinstance(value, list):
        return json.dumps([[whole_if(each) for each in row] for row in value])
    return f"{value:g}" if _is_number(value) else str(value)


def whole_if(number: float) -> float:
    """An int where it is one."""
    return int(number) if number == int(number) and abs(number) < 1e15 else number


def _matmul(part: _Section) -> MatmulRate:
    numbers = part.numbers(MATMUL, "tiles")
    tiles = []
    for rows, columns, share in part.rows("tiles", 3):
        if not (1 <= rows <= 4096 and 1 <= columns <= 4096):
            told = f"has a tile of {rows:g} x {columns:g}"
            raise part.reader.error(part.at("tiles"), told, "Plausible: 1 to 4096 each way.")
        if not 0 < share <= 1:
            advice = "Plausible: above 0, to 1: no kernel beats the peak."
            raise part.reader.error(part.at("tiles"), f"has a share of {share:g}", advice)
        tiles.append(Tile(int(rows), int(columns), share))
    numbers["units"] = int(numbers["units"])
    return MatmulRate(tiles=tuple(tiles), **numbers)


def _kernel(part: _Section, memory_bytes_per_s: float, device: str) -> KernelRate:
    part.only((*(each.key for each in KERNEL), "points"))
    if "points" in part.table:
        return KernelRate(points=part.points("points", TIME))
    kernel = KernelRate(**part.numbers(KERNEL))
    if device == "cuda" and kernel.bytes_per_s > memory_bytes_per_s:
        most = KERNEL_RATE.shown(memory_bytes_per_s)
        advice = f"The memory's bandwidth is {most}: nothing that comes from it is faster."
        raise part.reader.error(part.at("rate"), f"is {KERNEL_RATE.shown(kernel.bytes_per_s)}", advice)
    return kernel


def _link(part: _Section) -> Link:
    kinds = (ANY, *TIMED)
    numbers = part.numbers(LINK, "reach", *kinds)
    bandwidth = numbers["bytes_per_s"]
    rates = []
    for kind in kinds:
        entries = part.table.get(kind)
        if entries is None:
            continue
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            advice = f"Write [[{part.at(kind)}]] with ranks, start and rate."
            raise part.reader.error(part.at(kind), "is no list of tables", advice)
        measured = [
            _collective(_Section(part.reader, f"{part.at(kind)}[{index}]", entry), bandwidth)
            for index, entry in enumerate(entries)
        ]
        by_size = tuple(sorted(measured, key=lambda rate: rate.ranks))
        rates.append((None if kind == ANY else CollectiveKind(kind), by_size))
    reach = tuple((float(x), float(y)) for x, y in part.rows("reach", 2)) if "reach" in part.table else ()
    if any(x <= 0 or not 0 < y <= 1 for x, y in reach):
        advice = "Write rows of message bytes and the share of bandwidth there."
        raise part.reader.error(part.at("reach"), "has a share outside 0 to 1", advice)
    return Link(rates=tuple(rates), reach=reach, **numbers)


def _collective(part: _Section, bandwidth: float) -> CollectiveRate:
    part.only(("ranks", *(each.key for each in COLLECTIVE), "points"))
    ranks = part.whole("ranks", 2, 1_000_000)
    if "points" in part.table:
        return CollectiveRate(ranks, 0.0, math.inf, part.points("points", TIME))
    rate = CollectiveRate(ranks, **part.numbers(COLLECTIVE, "ranks"))
    # a switch that reduces on the way can beat a ring's formula, and by no more than this
    if rate.bytes_per_s > 2 * bandwidth:
        advice = f"The link's bandwidth is {KERNEL_RATE.shown(bandwidth)} one way: at most twice that."
        raise part.reader.error(part.at("rate"), f"is {KERNEL_RATE.shown(rate.bytes_per_s)}", advice)
    return rate
