"""Machine: hardware as predict needs it: how fast one device multiplies, moves and launches, and its links.
Standard library only.

Everything is SI and of one device: bytes, seconds, FLOP/s, bytes/s. `machine_file.py` reads and writes it as
TOML, where each constant has its unit and its source.

    matmul     waves x tile's time + start: the tiles of [m, n] are dealt to `units` that work side by side,
               and the last wave counts whole (NVIDIA, Matrix Multiplication Background User's Guide, "Tile
               and wave quantization"); never less than the bytes take
    kernel     start + bytes / rate, or a measured curve, log-log between its points
    attention  FLOPs / rate, where the rate grows with the sequence: rate x S / (S + half_sequence)
    collective start + wire bytes / rate for a group of n ranks on one link, or a measured curve
    spread     standard deviations of when ranks arrive at a collective (predict/waiting.py)

What this file does not know: what runs when. predict/ does.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

from shardwise.core.collective import CollectiveKind

Points = tuple[tuple[float, float], ...]
"""(size, seconds), both growing."""

DEFAULT = "default"
FRESH = "fresh memory"
"""The kernel that stands for memory which the allocator takes anew from the system: what it costs beside the
op, by the tensor's bytes."""


def on_curve(points: Points, x: float) -> float:
    """Seconds at size x: log-log between two points; the first point's time below it, the last one's rate
    (per x) beyond it."""
    sizes = [size for size, _ in points]
    if x <= sizes[0]:
        return points[0][1]
    if x >= sizes[-1]:
        return points[-1][1] * x / sizes[-1]
    right = bisect_right(sizes, x)
    (x0, t0), (x1, t1) = points[right - 1], points[right]
    share = math.log(x / x0) / math.log(x1 / x0)
    return math.exp(math.log(t0) + share * math.log(t1 / t0))


@dataclass(frozen=True, slots=True)
class Tile:
    """One way to cut a matmul's output: rows x columns, and the share of its unit's peak that it reaches."""

    rows: int
    columns: int
    share: float


@dataclass(frozen=True, slots=True)
class MatmulRate:
    """Matmuls of one dtype. peak_flops: per second, by the data sheet. units: that work side by side (SMs).
    extra_k: what a tile costs besides its k, in k. start_s: once per call. group_s: per group of a grouped
    matmul, beside its tiles. unaligned: what is left of its rate where a matrix's rows begin at odd
    places."""

    peak_flops: float
    units: int
    tiles: tuple[Tile, ...]
    start_s: float
    extra_k: float = 0.0
    group_s: float = 0.0
    unaligned: float = 1.0

    def time_s(self, batch: int, m: int, n: int, k: int) -> float:
        """[batch, m, k] x [batch, k, n]; the library is taken to choose its best tile."""
        per_unit = self.peak_flops / self.units
        best = math.inf
        for tile in self.tiles:
            tiles = batch * math.ceil(m / tile.rows) * math.ceil(n / tile.columns)
            waves = math.ceil(tiles / self.units)
            best = min(
                best, waves * 2 * tile.rows * tile.columns * (k + self.extra_k) / (per_unit * tile.share)
            )
        return best + self.start_s


@dataclass(frozen=True, slots=True)
class AttentionRate:
    """A fused attention kernel of one dtype at long sequences: FLOP/s, counted as core/program.py does (half
    where causal)."""

    forward_flops: float
    backward_flops: float
    half_sequence: float
    start_s: float

    def time_s(self, flops: float, sequence: int, *, backward: bool) -> float:
        rate = self.backward_flops if backward else self.forward_flops
        return flops / rate * (1 + self.half_sequence / max(1, sequence)) + self.start_s


@dataclass(frozen=True, slots=True)
class KernelRate:
    """An op, or a kind of ops, that memory bounds. elements_per_s: where it counts elements instead
    (look-ups); points: a measured curve."""

    start_s: float = 0.0
    bytes_per_s: float = math.inf
    elements_per_s: float = math.inf
    points: Points = ()

    def time_s(self, n_bytes: float, elements: float = 0.0) -> float:
        if self.points:
            return on_curve(self.points, max(n_bytes, 1.0))
        return self.start_s + max(n_bytes / self.bytes_per_s, elements / self.elements_per_s)


@dataclass(frozen=True, slots=True)
class CollectiveRate:
    """One kind of collective over `ranks`: by bytes that a rank sends (core/collective.py's formula)."""

    ranks: int
    start_s: float
    bytes_per_s: float
    points: Points = ()

    def time_s(self, wire_bytes: float) -> float:
        if self.points:
            return on_curve(self.points, max(wire_bytes, 1.0))
        return self.start_s + wire_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Link:
    """What joins devices. bytes_per_s: of one device, one way, by the data sheet. rates: by kind of
    collective, growing in ranks; those of `None` serve every kind that has none of its own. reach: (message
    bytes, share of bytes_per_s), where it depends on the size. direct: so many devices are joined pair by
    pair, without a switch between them, and rates are of a switch."""

    bytes_per_s: float
    rates: tuple[tuple[CollectiveKind | None, tuple[CollectiveRate, ...]], ...] = ()
    reach: Points = ()
    start_s: float = 0.0
    start_per_hop_s: float = 0.0
    direct: float = 0.0

    def usable(self, ranks: int) -> float:
        """The share of a device's links that lead to a group's ranks: all of them through a switch; joined
        pair by pair, those to the others of the group (a ring of all devices runs over all links)."""
        return 1.0 if ranks >= self.direct else max(ranks - 1, 1) / (self.direct - 1)

    @property
    def is_known(self) -> bool:
        return self.bytes_per_s > 0

    def rate(self, kind: CollectiveKind, ranks: int) -> CollectiveRate | None:
        """That of the measured group nearest in size (by ratio); None where nothing was measured."""
        known = dict(self.rates)
        rates = known.get(kind, known.get(None, ()))
        return min(rates, key=lambda rate: abs(math.log(rate.ranks / ranks)), default=None)

    def share_at(self, n_bytes: float) -> float:
        """Of bytes_per_s, for messages of this size."""
        if not self.reach:
            return 1.0
        return min(1.0, _between(self.reach, n_bytes))


UNKNOWN_LINK = Link(0.0)
"""Of a machine with one device, where no link was measured."""


def _between(points: Points, x: float) -> float:
    """Like on_curve, flat at both ends."""
    return on_curve(points, min(x, points[-1][0]))


@dataclass(frozen=True, slots=True)
class Launch:
    """What the host takes to issue one op: while it runs the model's Python (forward), inside autograd
    (backward), and a collective. dtensor_*: the same where DTensor dispatches the ops. None where nobody
    measured that: it then counts as nothing, or as that of plain ops."""

    forward_s: float | None = None
    backward_s: float | None = None
    collective_s: float | None = None
    dtensor_forward_s: float | None = None
    dtensor_backward_s: float | None = None

    @property
    def unknown(self) -> tuple[str, ...]:
        """What nobody measured of plain ops, and so counts as nothing, as a machine file calls it."""
        told = (("forward", self.forward_s), ("backward", self.backward_s), ("collective", self.collective_s))
        return tuple(f"launch.{name}" for name, seconds in told if seconds is None)

    def of_dtensor(self) -> "Launch":
        """Where DTensor dispatches: its own times, else the same."""
        forward_s, backward_s = self.dtensor_forward_s, self.dtensor_backward_s
        return replace(
            self,
            forward_s=self.forward_s if forward_s is None else forward_s,
            backward_s=self.backward_s if backward_s is None else backward_s,
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """How far apart equal ranks arrive at a collective, as standard deviations. work_s: of one second's work;
    deviations of parts that follow one another add up as variances do, so that of w seconds is work_s x
    sqrt(w). collective_s: whatever the work before it was. A device that is always slower than the others is
    not in them."""

    work_s: float = 0.0
    collective_s: float = 0.0

    def variance(self, seconds: float, collectives: int = 1) -> float:
        """In seconds squared, after so many seconds of work, and so many collectives issued."""
        return self.work_s**2 * seconds + self.collective_s**2 * collectives


@dataclass(frozen=True, slots=True)
class Constant:
    """One line of a machine file: its path, value and unit as written, and where it comes from. fitted: to
    what, where it was fitted."""

    path: str
    value: str
    unit: str
    source: str
    fitted: str | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """Equal devices, `devices_per_node` of them joined by `within`, nodes joined by `between` (None: one node
    only). workspace_bytes: that its matmul library keeps for each handle, beside tensors and in the
    allocator. error: of predictions on it, as a share: of how two plans compare, predicted against measured;
    spread: of its ranks. None where nobody measured that."""

    name: str
    device: str
    about: str
    devices_per_node: int
    memory_bytes: float
    memory_bytes_per_s: float
    context_bytes: float
    power_w: float | None
    matmuls: tuple[tuple[str, MatmulRate], ...]
    attentions: tuple[tuple[str, AttentionRate], ...]
    kernels: tuple[tuple[str, KernelRate], ...]
    launch: Launch
    within: Link
    between: Link | None
    constants: tuple[Constant, ...] = ()
    error: float | None = None
    spread: Spread | None = None
    workspace_bytes: float = 0.0

    def matmul(self, dtype: str) -> MatmulRate | None:
        return dict(self.matmuls).get(dtype)

    def attention(self, dtype: str, kernel: str | None = None) -> AttentionRate | None:
        """Of this kernel ("bfloat16 flash-2" in a file), or of the one that PyTorch chooses."""
        known = dict(self.attentions)
        return known.get(f"{dtype} {kernel}", known.get(dtype))

    def kernel(self, *names: str) -> KernelRate:
        """The first of these names that the machine has a rate for, else its default."""
        known = dict(self.kernels)
        return next((known[name] for name in names if name in known), known[DEFAULT])


def local_ranks(stride: int, size: int, devices_per_node: int) -> int:
    """How many ranks of a group lie on one node: its ranks are `stride` apart, and nodes are filled in
    order."""
    return max(1, min(size, devices_per_node // stride))
