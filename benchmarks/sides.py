"""What the benchmarks whose sides run on ranks share: starting those, whether all sides train the same model,
a side of all ranks' times, and the command."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from benchmarks import results
from benchmarks.results import Result, Side
from shardwise.core.errors import RunError
from shardwise.launch import run_ranks
from shardwise.text.stream import TokenStream

TIMEOUT_S = 300.0
LOSS_TOLERANCE = 1e-4

_Report = TypeVar("_Report")
_Settings = TypeVar("_Settings")


def launch(
    worker: str,
    settings: Any,
    report: type[_Report],
    ranks: int,
    *,
    stream: TokenStream | None = None,
    threads: int = 1,
) -> list[_Report]:
    """What each rank reports; worker("package.module:function") unpacks what it is given."""
    payload = msgspec.json.encode(settings) + b"\n" + (stream.to_bytes() if stream is not None else b"")
    replies = run_ranks(
        worker, payload, world_size=ranks, device_type="cpu", timeout_s=TIMEOUT_S, threads_per_rank=threads
    )
    return [msgspec.json.decode(reply, type=report) for reply in replies]


def unpacked(payload: bytes, settings: type[_Settings]) -> tuple[_Settings, bytes]:
    """(settings, the stream's bytes) that launch() gave a rank."""
    head, _, stream = payload.partition(b"\n")
    return msgspec.json.decode(head, type=settings), stream


def agreed(first_losses: Mapping[str, float]) -> str:
    """That the first step's losses of all sides are those of one model; RunError where they aren't."""
    spread = max(first_losses.values()) - min(first_losses.values())
    if not spread <= LOSS_TOLERANCE:
        shown = ", ".join(f"{name} {loss:.6f}" for name, loss in first_losses.items())
        raise RunError(
            f"the first step's losses differ by {spread:.1e}, where {LOSS_TOLERANCE:.0e} is allowed: {shown}."
        )
    return f"The first step's losses of all sides agreed to {spread:.0e} (allowed: {LOSS_TOLERANCE:.0e})."


def joined(
    name: str, about: str, rank_times_s: Sequence[Sequence[float]], losses: Sequence[float], tokens: int
) -> Side:
    """All ranks' times of one side. losses: one rank's, of all steps. tokens: of the global batch."""
    side = Side(name, about, tuple(tuple(times_s) for times_s in rank_times_s), {}, tuple(losses))
    return replace(side, facts={"tokens_per_s": tokens / side.median_s})


def command(
    module: str, doc: str | None, defaults: Any, options: Sequence[str], measure: Callable[..., Result]
) -> None:
    """`python -m benchmarks.MODULE`: options are fields of the settings; it prints, and writes a results
    file."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=(doc or "").partition("\n\n")[0]
    )
    for name in options:
        default = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--dry", action="store_true", help="print, and write no results file")
    arguments = vars(parser.parse_args())
    is_dry = arguments.pop("dry")
    result = measure(type(defaults)(**arguments))
    results.show(result)
    print(*result.checks, sep="\n")
    if not is_dry:
        print(f"written: {result.write()}")
