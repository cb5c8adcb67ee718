"""Makes the machine files that Shardwise ships (src/shardwise/machines) from published micro-benchmarks and
our own samples.

    python -m benchmarks.machine_files            writes them
    python -m benchmarks.machine_files --check    exit code 1 where a file differs from what this makes

Sources: benchmarks/data/hardware.csv (published micro-benchmarks, each row with its source),
benchmarks/data/h100-kernels.json (ours), data sheets, and, where a constant is fitted to whole runs, rows of
benchmarks/data/measurements.csv with TP 1. No constant is fitted to a row with TP > 1 but TENSOR_HIDDEN
(predict/costs.py). What is scaled from another machine says so. How far off predictions were comes from the
newest results file of benchmarks.published (benchmarks/alike.py): run this after that one.
"""

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.alike import MachineError, machine_errors
from benchmarks.attention_rates import Generation, generations
from benchmarks.published_jobs import read_rows
from benchmarks.published_results import newest_run
from shardwise.core.machine import MatmulRate, Tile
from shardwise.files.machine_file import machine_from_toml

HERE = Path(__file__).parent
MACHINES = HERE.parent / "src" / "shardwise" / "machines"
HARDWARE = HERE / "data" / "hardware.csv"
H100_KERNELS = HERE / "data" / "h100-kernels.json"
H100_STEPS = HERE / "data" / "h100-steps.json"
SHAPES = ((128, 256), (128, 128), (64, 128), (64, 64))

Product = tuple[int, int, int, int, float]  # batch, m, n, k, seconds


@dataclass(frozen=True, slots=True)
class Fit:
    """A matmul rate, and how far it is from what it was fitted to: median and 90th percentile of the relative
    error."""

    rate: MatmulRate
    products: int
    median_error: float
    p90_error: float

    def __str__(self) -> str:
        return (
            f"{self.products} matmuls, median error {self.median_error:.1%}, 90 % within {self.p90_error:.1%}"
        )


def rows(kind: str, **wanted: str) -> list[dict[str, str]]:
    """Rows of the published micro-benchmarks."""
    with HARDWARE.open(encoding="utf-8", newline="") as file:
        return [
            row
            for row in csv.DictReader(file)
            if row["kind"] == kind and all(row[key] == value for key, value in wanted.items())
        ]


def simumax(gpu: str, *, at_least_flop: float = 0.0) -> list[Product]:
    """Matmuls by shape that SimuMax published."""
    found = []
    for row in rows("gemm", gpu=gpu, op="matmul"):
        if "layout" not in row["shape_or_bytes"]:
            continue
        part = dict(entry.split("=") for entry in row["shape_or_bytes"].replace(" ", "").split(","))
        b, m, n, k = (int(part[key]) for key in "bmnk")
        flop = 2.0 * b * m * n * k
        if flop >= at_least_flop:
            found.append((b, m, n, k, flop / float(row["value"]) / 1e12))
    return found


def grouped(rate: MatmulRate, copies_per_s: float, copy_start_s: float) -> Fit:
    """The same rate with what a group of a grouped matmul costs beside its tiles and bytes: the microseconds
    (to a tenth) that bring the median absolute log ratio to its least, over SimuMax's grouped matmuls of
    Transformer Engine on a B200."""
    found = []
    for row in rows("gemm", gpu="B200-SXM", op="group_matmul"):
        part = dict(entry.split("=") for entry in row["shape_or_bytes"].replace(" ", "").split(","))
        groups, m, n, k = (int(part[key]) for key in ("ng", "M", "N", "K"))
        stage = part["stage"]
        product = {"fwd": (m, n, k), "bwd_grad_act": (m, k, n), "bwd_grad_w": (n, k, m)}[stage]
        # a weight's gradient is added to what is there
        weight_bytes = 2 if stage != "bwd_grad_w" else 8 if part["main_grad_dtype"] == "fp32" else 4
        n_bytes = groups * (2 * m * (n + k) + weight_bytes * n * k)
        apart_s = max(rate.time_s(groups, *product), copy_start_s + n_bytes / copies_per_s)
        found.append((groups, apart_s, 2.0 * groups * m * n * k / float(row["value"]) / 1e12))

    def error(group_us: float) -> float:
        return median(abs(math.log((apart + groups * group_us * 1e-6) / s)) for groups, apart, s in found)

    best = min((step / 10 for step in range(200)), key=error)
    errors = sorted(abs((apart + groups * best * 1e-6) / s - 1) for groups, apart, s in found)
    return Fit(replace(rate, group_s=best * 1e-6), len(found), median(errors), errors[int(len(errors) * 0.9)])


def azure(gpu: str, dtype: str) -> list[Product]:
    """Matmuls by shape of Azure's AI benchmarking guide."""
    found = []
    for row in rows("gemm", gpu=gpu, op="matmul", dtype=dtype):
        part = {key: int(value) for key, value in re.findall(r"([mnk])(\d+)", row["shape_or_bytes"])}
        if "Azure" in row["source"] and len(part) == 3:
            m, n, k = part["m"], part["n"], part["k"]
            found.append((1, m, n, k, 2.0 * m * n * k / float(row["value"]) / 1e12))
    return found


def ours(dtype: str) -> list[Product]:
    samples = json.loads(H100_KERNELS.read_text(encoding="utf-8"))["samples"]
    return [
        (*each["shape"], each["seconds"])
        for each in samples
        if each["name"].startswith("aten::mm") and each["dtype"] == dtype
    ]


def fitted(
    products: Sequence[Product],
    peak_flops: float,
    units: int,
    start: Sequence[float] = (4e-6, 100, 0.7, 0.7, 0.6, 0.6),
) -> Fit:
    """Start, extra k and the tiles' shares that bring the median absolute log ratio to its least: a pattern
    search, each constant in turn."""

    def rate(values: Sequence[float]) -> MatmulRate:
        tiles = tuple(Tile(*shape, share) for shape, share in zip(SHAPES, values[2:], strict=True))
        return MatmulRate(peak_flops, units, tiles, values[0], values[1])

    def loss(values: Sequence[float]) -> float:
        if min(values) < 0 or not all(0.02 <= share <= 1 for share in values[2:]):
            return math.inf
        made = rate(values)
        return sum(
            abs(math.log(made.time_s(b, m, n, k) / seconds)) for b, m, n, k, seconds in products
        ) / len(products)

    best, values, steps = loss(start), list(start), [0.5] * len(start)
    while max(steps) > 0.005:
        for index in range(len(values)):
            for sign in (1, -1):
                tried = list(values)
                tried[index] *= 1 + sign * steps[index]
                new = loss(tried)
                if new < best:
                    best, values = new, tried
                    break
            else:
                steps[index] /= 2
    made = rate([float(f"{value:.3g}") for value in values])
    errors = sorted(abs(made.time_s(b, m, n, k) / seconds - 1) for b, m, n, k, seconds in products)
    return Fit(made, len(products), median(errors), errors[int(len(errors) * 0.9)])


def scaled(rate: MatmulRate, factor: float, peak_flops: float | None = None) -> MatmulRate:
    """The same shares of a peak times a factor (at most the peak)."""
    tiles = tuple(replace(tile, share=float(f"{min(1.0, tile.share * factor):.3g}")) for tile in rate.tiles)
    return replace(rate, tiles=tiles, peak_flops=peak_flops or rate.peak_flops)


def level(products: Sequence[Product], rate: MatmulRate, *, at_least_flop: float) -> float:
    """How much faster than `rate` the large ones of these ran: the median."""
    return median(
        rate.time_s(b, m, n, k) / s for b, m, n, k, s in products if 2.0 * b * m * n * k >= at_least_flop
    )


def kernel_shares() -> dict[str, float]:
    """Of the H100's memory bandwidth, what each kernel reached at its three largest sizes, both dtypes
    (median)."""
    by_name: dict[str, list[tuple[float, float]]] = {}
    for each in json.loads(H100_KERNELS.read_text(encoding="utf-8"))["samples"]:
        if each["what"] not in ("matmul", "attention"):
            size = each["read_bytes"] + each["write_bytes"]
            by_name.setdefault(each["name"], []).append((size, size / each["seconds"]))
    shares = {}
    for name, found in by_name.items():
        rates = [rate for size, rate in found if size > 1.5e8]  # beyond the L2 cache
        if rates:
            shares[name] = median(rates) / 3.35e12
    steps = json.loads(H100_STEPS.read_text(encoding="utf-8"))
    seen = [
        each
        for each in steps["lookups"]
        if each["name"] == "index_select aligned" and each["hit"] == "any" and each["elements"] > 1e8
    ]
    widths = {"torch.float32": 4, "torch.bfloat16": 2}
    shares["look-ups"] = (
        median(2 * widths[each["dtype"]] * each["elements"] / each["seconds"] for each in seen) / 3.35e12
    )
    softmax = steps["safe_softmax"]
    shares["aten::_safe_softmax"] = 2 * 4 * math.prod(softmax["shape"]) / softmax["seconds"] / 3.35e12
    return shares


def old_look_ups() -> float:
    """Elements per second of indexSelectLargeIndex, which PyTorch ran on GPUs before it had a vectorized
    gather (2.7)."""
    (row,) = rows("look-up", gpu="H100-SXM-80GB", op="indexSelectLargeIndex")
    ids, width = (int(number) for number in re.findall(r"=(\d+)", row["shape_or_bytes"]))
    return ids * width / (float(row["value"]) / 1e6)


KERNELS = {
    # in a machine file: as it was timed
    "elementwise": "aten::add",
    "copy": "aten::cat",
    "aten::clone": "aten::copy_ transposed",  # a Program's clones make strided tensors contiguous
    "aten::_to_copy": "aten::copy_ to float32",
    "norm": "aten::_fused_rms_norm",
    "aten::_fused_rms_norm_backward": "aten::_fused_rms_norm_backward",
    "aten::native_layer_norm": "aten::native_layer_norm",
    "aten::native_layer_norm_backward": "aten::native_layer_norm_backward",
    "softmax": "aten::_softmax",
    "aten::_softmax_backward_data": "aten::_softmax_backward_data",
    "reduction": "aten::sum last dim",
    "index": "aten::index_copy_",
    "fill": "aten::zero_",
    "optimizer": "aten::_fused_adamw_ 4 tensors",
    "embedding": "look-ups",
    "aten::_safe_softmax": "aten::_safe_softmax",
    "aten::_foreach_norm": "aten::_foreach_norm",
    "aten::_foreach_mul_": "aten::_foreach_mul_",
}
START_US = 2.2


@dataclass(frozen=True, slots=True)
class Text:
    """A machine file's text as it grows."""

    lines: list[str]

    def add(self, line: str = "") -> None:
        self.lines.append(line)

    def constant(
        self,
        key: str,
        value: object,
        unit: str,
        source: str,
        *,
        per: str | None = None,
        fitted: str | None = None,
    ) -> None:
        parts = [f"value = {value}", f"unit = {json.dumps(unit)}"]
        parts += [f"per = {json.dumps(per)}"] if per else []
        parts += [f"source = {json.dumps(source)}"]
        parts += [f"fitted = {json.dumps(fitted)}"] if fitted else []
        self.add(f"{key} = {{ {', '.join(parts)} }}")


@dataclass(frozen=True, slots=True)
class Collectives:
    """Rates of one kind in a file: (ranks, start in us, GB/s), or points."""

    kind: str
    rates: tuple[tuple[int, float, float], ...] = ()
    points: tuple[tuple[int, tuple[tuple[float, float], ...]], ...] = ()
    source: str = ""


# MiB that the library of matmuls keeps for each handle, by GPU
_EARLIER, _LATER = (8.125, "4096 KiB twice and 16 KiB eight times"), (32, "32 MiB from Hopper on")
WORKSPACES = {
    "a100": _EARLIER,
    "h100": _LATER,
    "h200": _LATER,
    "b200": _LATER,
    "gb200": _LATER,
    "mi300x": (128, "128 MiB on gfx94"),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What goes into one machine file. matmuls: dtype -> (rate, source, fitted)."""

    name: str
    about: str
    devices_per_node: int
    capacity_gb: float
    bandwidth: tuple[float, str]  # GB/s
    reached: tuple[float, str]  # share of bandwidth that a large copy reaches
    power: tuple[float, str]
    matmuls: dict[str, tuple[MatmulRate, str, str | None]]
    attention: tuple[float, float, float, str, str | None]  # forward, backward TFLOP/s, half sequence
    launch: tuple[tuple[float, ...], str, str | None]  # us, as LAUNCH; source; fitted
    within: tuple[float, str]  # GB/s one way
    collectives: tuple[Collectives, ...]
    between: tuple[float, str] | None
    reach: tuple[tuple[tuple[float, float], ...], str] | None = None
    look_ups: tuple[float, str] | None = None  # elements per second, where they bound look-ups
    is_board: bool = False  # a node's devices are joined pair by pair
    generations: tuple[Generation, ...] = ()  # of attention kernels that PyTorch doesn't choose today
    groups: str | None = None  # to what a grouped matmul's cost per group was fitted


def errors() -> dict[str, tuple[MachineError, str]]:
    """By machine: how far off its predictions were, and the file that says so."""
    run = newest_run()
    name = f"benchmarks/results/{run.day}-{run.what}.json"
    return {machine: (error, name) for machine, error in machine_errors(run, read_rows()).items()}


def text_of(recipe: Recipe, shares: dict[str, float], measured: dict[str, tuple[MachineError, str]]) -> str:
    """The file. Rates of kernels are the H100's shares of its bandwidth, times how this machine's copies
    compare. measured: as errors() gives them."""
    out = Text([])
    out.add(f"# {recipe.about}")
    out.add("# Made by benchmarks/machine_files.py from benchmarks/data; don't edit by hand.")
    out.add(f"name = {json.dumps(recipe.name)}")
    out.add('device = "cuda"')
    out.add(f"about = {json.dumps(recipe.about)}")
    out.add(f"devices_per_node = {recipe.devices_per_node}")
    out.add()
    out.add("[memory]")
    out.constant("capacity", f"{recipe.capacity_gb:g}", "GB", recipe.bandwidth[1], per="device")
    out.constant("bandwidth", f"{recipe.bandwidth[0]:g}", "GB/s", recipe.bandwidth[1], per="device")
    out.constant(
        "context",
        2.75,
        "GiB",
        "middle of what is seen: CUDA context 0.5 to 2 GiB, NCCL 1 to 2 GiB",
        per="device",
    )
    workspace, said = WORKSPACES[recipe.name.partition("-")[0]]
    source = "PyTorch's aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize"
    out.constant("workspace", f"{workspace:g}", "MiB", f"{source}: {said}", per="device")
    out.add("[power]")
    out.constant("cap", f"{recipe.power[0]:g}", "W", recipe.power[1], per="device")
    if recipe.name in measured:
        out.add()
        out.add("[predictions]")
        error, results = measured[recipe.name]
        out.constant("error", f"{error.share:.3f}", "1", f"{error}: {results}")
    for dtype, (rate, source, fit) in recipe.matmuls.items():
        out.add()
        out.add(f"[matmul.{dtype}]")
        out.constant("peak", f"{rate.peak_flops / 1e12:g}", "TFLOP/s", "data sheet, dense", per="device")
        out.constant("units", rate.units, "1", "data sheet: streaming multiprocessors or compute units")
        tiles = [[tile.rows, tile.columns, tile.share] for tile in rate.tiles]
        out.constant("tiles", json.dumps(tiles), "rows, columns, share of peak", source, fitted=fit)
        out.constant("start", f"{rate.start_s * 1e6:.3g}", "us", source, fitted=fit)
        out.constant("extra_k", f"{rate.extra_k:.3g}", "1", source, fitted=fit)
        if rate.group_s:
            source = "SimuMax's grouped matmuls of Transformer Engine on a B200 (hardware.csv)"
            if not recipe.name.startswith("b200"):
                source += "; none was published of this device"
            out.constant("group", f"{rate.group_s * 1e6:.3g}", "us", source, fitted=recipe.groups)
        if rate.unaligned < 1:
            source = "vTrain's A100: the head of a vocabulary of 50257, which isn't padded there at TP 1"
            if not recipe.name.startswith("a100"):
                source += "; none was published of this device"
            out.constant("unaligned", f"{rate.unaligned:g}", "1", source, fitted=UNALIGNED_FIT)
    forward, backward, half, source, fit = recipe.attention
    out.add()
    out.add("[attention.bfloat16]")
    out.constant("forward", f"{forward:.4g}", "TFLOP/s", source, fitted=fit)
    out.constant("backward", f"{backward:.4g}", "TFLOP/s", source, fitted=fit)
    out.constant("half_sequence", f"{half:g}", "tokens", source, fitted=fit)
    out.constant("start", 5, "us", "two kernel launches")
    for generation in recipe.generations:
        out.add()
        out.add(f"[attention.{json.dumps(f'bfloat16 {generation.name}')}]")
        out.constant("forward", f"{generation.forward:.4g}", "TFLOP/s", generation.source)
        out.constant("backward", f"{generation.backward:.4g}", "TFLOP/s", generation.source)
        out.constant("half_sequence", f"{generation.half_sequence:g}", "tokens", generation.source)
        out.constant("start", 5, "us", "two kernel launches")
    factor = recipe.reached[0] / shares["aten::cat"]
    for key, timed in (("default", "aten::add"), *KERNELS.items()):
        share = min(1.0, shares[timed] * factor)
        own = recipe.name.startswith("h100-sxm-80gb")
        source = f"{timed}: {shares[timed]:.3f} of an H100's bandwidth, benchmarks/data/{H100_KERNELS.name}"
        if not own:
            source += f"; times {factor:.3f}, by large copies: {recipe.reached[1]}"
        out.add()
        out.add(f"[kernels.{json.dumps(key)}]")
        out.constant("start", START_US, "us", f"smallest kernels of benchmarks/data/{H100_KERNELS.name}")
        out.constant("rate", f"{share * recipe.bandwidth[0]:.4g}", "GB/s", source)
        if key == "embedding" and recipe.look_ups is not None:
            out.constant("elements", f"{recipe.look_ups[0] / 1e9:.4g}", "Gelement/s", recipe.look_ups[1])
    out.add()
    out.add("[launch]")
    for key, value in zip(LAUNCH, recipe.launch[0], strict=False):
        out.constant(key, f"{value:g}", "us", recipe.launch[1], fitted=recipe.launch[2])
    out.add()
    out.add("[links.within]")
    out.constant("bandwidth", f"{recipe.within[0]:g}", "GB/s", recipe.within[1], per="device")
    if recipe.is_board:
        out.constant("direct", recipe.devices_per_node, "1", BOARD_SOURCE)
    for each in recipe.collectives:
        for ranks, start_us, rate_gb in each.rates:
            out.add(f"[[links.within.{each.kind}]]")
            out.add(f"ranks = {ranks}")
            out.constant("start", f"{start_us:g}", "us", each.source)
            out.constant("rate", f"{rate_gb:g}", "GB/s", each.source)
        for ranks, points in each.points:
            out.add(f"[[links.within.{each.kind}]]")
            out.add(f"ranks = {ranks}")
            listed = "[" + ", ".join(f"[{x:.0f}, {s:.4g}]" for x, s in points) + "]"
            out.constant("points", listed, "bytes sent, s", each.source)
    if recipe.between is not None:
        out.add()
        out.add("[links.between]")
        out.constant("bandwidth", f"{recipe.between[0]:g}", "GB/s", recipe.between[1], per="device")
        if recipe.reach is not None:
            listed = "[" + ", ".join(f"[{x:.0f}, {share:.3g}]" for x, share in recipe.reach[0]) + "]"
            out.constant("reach", listed, "bytes, share of bandwidth", recipe.reach[1])
    return "\n".join(out.lines) + "\n"


def all_reduce_points(
    gpu: str, ranks: int, software: str = ""
) -> tuple[int, tuple[tuple[float, float], ...]]:
    """(bytes that a rank sends, seconds) of an all-reduce within a node, made to grow."""
    found = {}
    for row in rows("collective", gpu=gpu, op="all_reduce", n_gpus=str(ranks), nodes="1", metric="busbw"):
        size = float(row["shape_or_bytes"])
        sent = 2 * (ranks - 1) / ranks * size
        if software in row["source"] and size >= 4096 and float(row["value"]) > 0:
            found[sent] = sent / (float(row["value"]) * 1e9)
    points, most = [], 0.0
    for sent, seconds in sorted(found.items()):
        most = max(most, seconds)
        points.append((sent, most))
    return ranks, tuple(points)


def reach(gpu: str, nodes: int, node_gb_per_s: float) -> tuple[tuple[float, float], ...]:
    """(bytes of the whole tensor, share of the nodes' NICs) of an all-reduce over nodes, from a size where it
    isn't latency alone."""
    shares, most = [], 0.0
    for row in rows("collective", gpu=gpu, op="all_reduce", nodes=str(nodes), metric="busbw"):
        share = float(row["value"]) / node_gb_per_s
        if float(row["shape_or_bytes"]) >= 2**18:
            most = max(most, min(1.0, share))
            shares.append((float(row["shape_or_bytes"]), most))
    return tuple(sorted(shares))


def h100_attention() -> tuple[float, float, float]:
    """Forward and backward TFLOP/s of long sequences, and half_sequence, from the cuDNN kernels of our own
    steps (causal, head dim 128)."""
    found: dict[str, list[tuple[int, float]]] = {"forward": [], "backward": []}
    for step in json.loads(H100_STEPS.read_text(encoding="utf-8"))["profiled"]:
        heads = {"llama3-8b": 32, "llama3-70b": 64}.get(step["model"])
        if heads is None or step["dtype"] != "bfloat16":
            continue
        scores = step["batch"] * heads / step["tp"] * step["seq"] ** 2 * 128 * step["layers"]
        for name, matmuls in (("forward", 2), ("backward", 5)):
            times = 2 if name == "forward" and step["recompute"] else 1
            found[name].append((step["seq"], times * matmuls * scores / step["attention_s"][name]))
    rates = {}
    for name, each in found.items():
        at_8k, at_4k = (median(rate for seq, rate in each if seq == size) for size in (8192, 4096))
        half = max(0.0, (at_8k / at_4k - 1) / (1 / 4096 - at_8k / at_4k / 8192))
        rates[name] = (at_8k * (1 + half / 8192), half)
    half = (rates["forward"][1] + rates["backward"][1]) / 2
    at = {name: rate / (1 + own / 8192) * (1 + half / 8192) for name, (rate, own) in rates.items()}
    return at["forward"] / 1e12, at["backward"] / 1e12, round(half)


def recipes() -> list[Recipe]:
    """Every machine that ships."""
    h100_bf16 = fitted(ours("bfloat16"), 989.4e12, 132)
    h100_fp32 = fitted(ours("float32"), 66.9e12, 132)
    pcie = fitted(simumax("A100-PCIe-80GB"), 312e12, 108)
    b200 = fitted(simumax("B200-SXM", at_least_flop=3e11), 2250e12, 148)
    b200 = replace(
        b200, rate=replace(b200.rate, start_s=h100_bf16.rate.start_s)
    )  # matmuls this large don't tell
    own = f"our own: benchmarks/data/{H100_KERNELS.name}"
    guide = "Azure AI benchmarking guide (hardware.csv)"
    fp8 = azure("H100-SXM-80GB", "fp8")
    fp8_level = level(fp8, scaled(h100_bf16.rate, 1.0, 1979e12), at_least_flop=1e11)
    h100_fp8 = scaled(h100_bf16.rate, fp8_level, 1979e12)
    fp8_fit = f"{len(fp8)} matmuls of the {guide}: the bf16 tiles times {fp8_level:.3f}"
    a100_level = level(azure("A100-SXM-80GB", "fp16"), pcie.rate, at_least_flop=1e11)
    a100 = replace(scaled(pcie.rate, a100_level), start_s=h100_bf16.rate.start_s)
    a100_fit = f"A100 PCIe, {pcie}; times {a100_level:.3f}, by the fp16 matmuls of the {guide}"
    attention = h100_attention()
    steps = f"cuDNN kernels of our own steps, benchmarks/data/{H100_STEPS.name}"
    issued = json.loads(H100_STEPS.read_text(encoding="utf-8"))["launch_us"]
    issue = (
        tuple(issued[key] for key in LAUNCH),
        f"{issued['what']}: benchmarks/data/{H100_STEPS.name}",
        None,
    )
    copies = {
        gpu: float(rows("hbm", gpu=gpu, op="copy")[0]["value"])
        for gpu in ("A100-SXM-80GB", "H100-SXM-80GB", "H200-SXM-141GB")
    }
    nvlink4 = (
        Collectives(
            "any",
            ((2, 8, 268), (4, 17, 325), (8, 30, 345)),
            (),
            "AutoParallel's NCCL model of an H100 NVSwitch (hardware.csv)",
        ),
        Collectives(
            "all_reduce",
            ((2, 10, 324), (4, 17, 354)),
            (all_reduce_points("H100-SXM-80GB", 8, "dgxc"),),
            "AutoParallel's model at 2 and 4 ranks; nccl-tests of dgxc-benchmarking at 8 (hardware.csv)",
        ),
    )
    infiniband = (
        reach("B200-SXM", 4, 400.0),
        "all-reduce over 4 nodes of 8 with 400 Gb/s a GPU (EFA), hardware.csv; taken for InfiniBand too",
    )
    a100_reach = (
        reach("A100 (4 nodes, see page)", 4, 100.0),
        "all-reduce over 4 nodes with 8 A100 each, as shares of 100 GB/s a node (hardware.csv)",
    )
    nvlink3 = tuple(all_reduce_points("A100-SXM (vTrain cluster)", ranks) for ranks in (2, 3, 4, 5, 6, 7, 8))
    a100_links = (
        Collectives(
            "any",
            (),
            nvlink3,
            "NCCL all-reduce tables of vTrain's A100 nodes (hardware.csv); other kinds by what they send",
        ),
    )
    figures = rows("attention", gpu="H100-SXM-80GB")
    power = 500 / 700
    capped = f"scaled from the H100 of 700 W by its power, times {power:.3f}"
    h100 = Recipe(
        "h100-sxm-80gb",
        "NVIDIA H100 SXM5 80 GB (HBM3), 700 W, NVLink 4 among 8, 400 Gb/s a GPU between nodes",
        8,
        80,
        (3350, "NVIDIA H100 data sheet"),
        (kernel_shares()["aten::cat"], "own"),
        (700, "NVIDIA H100 data sheet"),
        {
            "bfloat16": (h100_bf16.rate, own, str(h100_bf16)),
            "float32": (h100_fp32.rate, f"{own}; without TF32, as PyTorch's default", str(h100_fp32)),
            "float8": (h100_fp8, guide, fp8_fit),
        },
        (*attention, steps, "backward and forward at 4096 and 8192 tokens"),
        issue,
        (450, "NVIDIA H100 data sheet: 900 GB/s both ways"),
        nvlink4,
        (50, "DGX H100: one 400 Gb/s NIC a GPU"),
        infiniband,
        generations=generations(figures, "H100"),
    )
    before_gather = replace(
        h100,
        name="h100-sxm-80gb-torch2.6",
        about="the H100 with PyTorch before 2.7, which looked rows up element by element",
        look_ups=(
            old_look_ups(),
            "indexSelectLargeIndex in TraceLens's example trace of Qwen on an H100 (hardware.csv)",
        ),
    )
    capped_h100 = replace(
        h100,
        name="h100-sxm-96gb-500w",
        about="NVIDIA H100 SXM5 96 GB (HBM2e, 2.4 TB/s) capped at 500 W, as in torchtitan's tables; NVLink 4 "
        "among 8, 400 Gb/s a GPU",
        capacity_gb=96,
        bandwidth=(2400, "torchtitan, docs: Grand Teton H100, 2.4 TB/s HBM2e"),
        reached=(h100.reached[0], "the H100's share"),
        power=(500, "torchtitan's tables"),
        matmuls={dtype: (scaled(rate, power), capped, None) for dtype, (rate, _, _) in h100.matmuls.items()},
        attention=(attention[0] * power, attention[1] * power, attention[2], capped, None),
    )
    h200 = replace(
        h100,
        name="h200-sxm-141gb",
        about="NVIDIA H200 SXM 141 GB (HBM3e), 700 W, NVLink 4 among 8, 400 Gb/s a GPU between nodes",
        capacity_gb=141,
        bandwidth=(4800, "NVIDIA H200 data sheet"),
        reached=(copies["H200-SXM-141GB"] * 1000 / 4800, guide),
        power=(700, "NVIDIA H200 data sheet"),
        matmuls={
            dtype: (rate, f"as the H100's: {source}", fit)
            for dtype, (rate, source, fit) in h100.matmuls.items()
        },
        collectives=(
            nvlink4[0],
            replace(
                nvlink4[1],
                points=(all_reduce_points("H200-SXM-141GB", 8, "stas00"),),
                source="AutoParallel's model of an H100 at 2 and 4 ranks; torch 2.9.1, NCCL 2.27.7 at 8 "
                "(hardware.csv)",
            ),
        ),
    )
    h200_board = replace(
        h200,
        name="h200-sxm-141gb-x4",
        about="NVIDIA H200 SXM 141 GB (HBM3e), 700 W, four on a board, joined pair by pair, 400 Gb/s a GPU "
        "between nodes",
        devices_per_node=4,
        is_board=True,
    )
    a100_attention = float(rows("attention", gpu="A100-SXM-80GB", op="Flash Attention 2.0")[0]["value"])
    bwd_share = attention[1] / attention[0]
    a100_80 = Recipe(
        "a100-sxm-80gb",
        "NVIDIA A100 SXM4 80 GB, 400 W, NVLink 3 among 8, 200 Gb/s a GPU between nodes (DGX A100)",
        8,
        80,
        (2039, "NVIDIA A100 data sheet"),
        (copies["A100-SXM-80GB"] * 1000 / 2039, guide),
        (400, "NVIDIA A100 data sheet"),
        {
            "bfloat16": (a100, "SimuMax and Azure (hardware.csv)", a100_fit),
            "float32": (scaled(h100_fp32.rate, 1.0, 19.5e12), "the H100's shares", None),
        },
        (
            a100_attention,
            a100_attention * bwd_share,
            attention[2],
            f"forward: Flash Attention 2 in the {guide}; backward by the H100's ratio",
            None,
        ),
        issue,
        (300, "NVIDIA A100 data sheet: 600 GB/s both ways"),
        a100_links,
        (25, "DGX A100: one 200 Gb/s NIC a GPU"),
        a100_reach,
        generations=generations(figures, "A100"),
    )
    a100_80 = replace(
        a100_80,
        matmuls={
            **a100_80.matmuls,
            "float32": (replace(a100_80.matmuls["float32"][0], units=108), "the H100's shares", None),
        },
    )
    a100_40 = replace(
        a100_80,
        name="a100-sxm-40gb",
        about="NVIDIA A100 SXM4 40 GB, 400 W, NVLink 3 among 8, 200 Gb/s a GPU between nodes",
        capacity_gb=40,
        bandwidth=(1555, "NVIDIA A100 data sheet"),
        reached=(a100_80.reached[0], "the share of the 80 GB part"),
    )
    vtrain = replace(
        a100_80,
        name="a100-sxm-80gb-vtrain",
        about="the A100 cluster of vTrain's measurements: 800 Gb/s a node, a host that issues Megatron's ops "
        "slowly",
        between=(12.5, "vTrain's configuration: 800 Gb/s a node of 8"),
        launch=(
            (*VTRAIN_HOST_US, round(VTRAIN_HOST_US[0] * issued["collective"] / issued["forward"], 1)),
            "per op of the traced GPT, which issues fewer than Megatron does; a collective by its ratio to a "
            "forward's op on the calibrated H100's host",
            "the launch-bound rows of vtrain-single with TP 1 (hidden 1024, one stage, two replicas, one and "
            "two sequences a micro-batch), to three microseconds: mean absolute error 0.9%",
        ),
    )
    b200_matmul = (
        b200.rate,
        "SimuMax's B200 (hardware.csv): matmuls of at least 0.3 TFLOP, which run long enough to meet the "
        "power cap",
        str(b200),
    )
    best = {
        (row["gpu"], row["dtype"]): float(row["value"])
        for row in rows("gemm", op="matmul (best shape found)")
    }
    fp8_b200 = best["B200-SXM", "fp8"] / best["B200-SXM", "bf16"] / 2
    b200_fp8 = scaled(b200.rate, fp8_b200, 4500e12)
    fp8_source = f"the bf16 shares times {fp8_b200:.3f}: best shapes found in fp8 and bf16 (hardware.csv)"
    sdp = rows("attention", gpu="B200-SXM", op="sdp_fwd"), rows("attention", gpu="B200-SXM", op="sdp_bwd")
    sdp_rates = [
        median(sorted((float(row["value"]) / 2 for row in each), reverse=True)[: len(each) // 2])
        for each in sdp
    ]
    default_b200 = float(rows("hbm-fit", gpu="B200-SXM", op="default")[0]["value"])
    nvlink5 = (
        Collectives(
            "any",
            ((2, 18, 606), (4, 20, 606), (8, 32, 606)),
            (),
            "SimuMax's fit of a B200 node: 0.673 of 900 GB/s, 23 us and 9 us (hardware.csv)",
        ),
        Collectives(
            "all_reduce",
            ((2, 22, 668), (4, 22, 668)),
            (all_reduce_points("B200-SXM", 8, "stas00"),),
            "SimuMax's fit at 2 and 4 ranks: 0.742 of 900 GB/s; torch 2.9.1, NCCL 2.27.7 at 8 (hardware.csv)",
        ),
    )
    b200_machine = Recipe(
        "b200-sxm",
        "NVIDIA B200 SXM 180 GB, 1000 W, NVLink 5 among 8, 400 Gb/s a GPU between nodes",
        8,
        180,
        (8000, "NVIDIA B200 data sheet"),
        (default_b200, "SimuMax's fit of a B200's kernels"),
        (1000, "NVIDIA B200 data sheet"),
        {
            "bfloat16": b200_matmul,
            "float8": (b200_fp8, fp8_source, None),
            "float32": (scaled(replace(h100_fp32.rate, units=148), 1.0, 80e12), "the H100's shares", None),
        },
        (
            sdp_rates[0],
            sdp_rates[1],
            attention[2],
            "SimuMax's B200 attention (hardware.csv), halved for the causal mask: median of the faster half",
            None,
        ),
        issue,
        (900, "NVIDIA B200 data sheet: 1800 GB/s both ways"),
        nvlink5,
        (50, "400 Gb/s a GPU"),
        infiniband,
    )
    more = 1200 / 1000
    by_power = f"the B200's, times {more:.1f} by its power (1200 W against 1000 W)"
    gb200 = replace(
        b200_machine,
        name="gb200-nvl72",
        about="NVIDIA GB200 NVL72: 186 GB a GPU, 1200 W, NVLink 5 among 72, 400 Gb/s a GPU between racks",
        capacity_gb=186,
        devices_per_node=72,
        power=(1200, "NVIDIA GB200 data sheet"),
        matmuls={
            dtype: (scaled(rate, more), by_power, None)
            for dtype, (rate, _, _) in b200_machine.matmuls.items()
        },
        attention=(sdp_rates[0] * more, sdp_rates[1] * more, attention[2], by_power, None),
    )
    mi_level = best["MI300X", "bf16"] / best["H100-SXM", "bf16"] * 989.4 / 1307.4
    mi300x = replace(
        h100,
        name="mi300x",
        generations=(),
        about="AMD Instinct MI300X 192 GB, 750 W, Infinity Fabric among 8, 400 Gb/s a GPU between nodes: "
        "little is published, take it as a sketch",
        capacity_gb=192,
        bandwidth=(5300, "AMD MI300X data sheet"),
        reached=(0.81, "the low end of what large copies reach on GPUs"),
        power=(750, "AMD MI300X data sheet"),
        matmuls={
            "bfloat16": (
                replace(scaled(h100_bf16.rate, mi_level, 1307.4e12), units=304),
                f"the H100's tiles times {mi_level:.3f}: best shapes found (hardware.csv)",
                None,
            ),
            "float32": (replace(scaled(h100_fp32.rate, 1.0, 163.4e12), units=304), "the H100's shares", None),
        },
        attention=(
            attention[0] * mi_level * 1307.4 / 989.4,
            attention[1] * mi_level * 1307.4 / 989.4,
            attention[2],
            "the H100's, by the ratio of matmuls",
            None,
        ),
        within=(448, "AMD MI300X data sheet: 7 links of 64 GB/s one way"),
        collectives=(
            Collectives(
                "any",
                ((8, 30, 448 * 0.8),),
                (),
                "80 % of the link, as rings reach on NVLink; not measured here",
            ),
        ),
    )
    made = (
        h100,
        before_gather,
        capped_h100,
        h200,
        h200_board,
        a100_80,
        a100_40,
        vtrain,
        b200_machine,
        gb200,
        mi300x,
    )
    groups = grouped(b200.rate, default_b200 * b200_machine.bandwidth[0] * 1e9, START_US * 1e-6)
    return [with_groups(recipe, groups) for recipe in made]


def _in_half(rate: MatmulRate, groups: Fit) -> MatmulRate:
    return replace(rate, group_s=groups.rate.group_s, unaligned=UNALIGNED)


def with_groups(recipe: Recipe, groups: Fit) -> Recipe:
    """A recipe whose half-precision matmuls have what a group costs, and what rows at odd places leave."""
    matmuls = {
        dtype: (_in_half(rate, groups) if dtype != "float32" else rate, source, fitted_to)
        for dtype, (rate, source, fitted_to) in recipe.matmuls.items()
    }
    return replace(recipe, matmuls=matmuls, groups=f"{groups}".replace("matmuls", "grouped matmuls"))


BOARD_SOURCE = (
    "HGX boards of four have no NVSwitch: each pair is joined by a third of the links (NVIDIA, "
    "Introducing NVIDIA HGX H100)"
)
LAUNCH = ("forward", "backward", "collective", "dtensor_forward", "dtensor_backward")
VTRAIN_HOST_US = (67.0, 24.0)
"""Forward, backward. One sequence a micro-batch tells their sum, two tell them apart: then the backward waits
for the device and the forward still for the host. What issuing a collective takes no row with TP 1 tells."""

UNALIGNED = 0.3
UNALIGNED_FIT = (
    "rows of vtrain-single with TP 1 (hidden 1024, one stage, two replicas, 4 and 8 sequences a micro-batch),"
    " to a twentieth: what a step takes beside its layers (twice that of 12 layers less that of 24)"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Makes the machine files that ship, from published micro-benchmarks and our own samples."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where a file differs"
    )
    check = parser.parse_args().check
    shares, measured, differing = kernel_shares(), errors(), 0
    MACHINES.mkdir(exist_ok=True)
    for recipe in recipes():
        path, text = MACHINES / f"{recipe.name}.toml", text_of(recipe, shares, measured)
        machine_from_toml(text, path.name)
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            print(
                f"{path.name} differs from what its sources give. Run python -m benchmarks.machine_files.",
                file=sys.stderr,
            )
            differing += 1
        elif not check:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.name}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
