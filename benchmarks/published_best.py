"""What others published as their best configuration, of searches on real machines, beside what `shardwise
search` picks there: both as predicted, by the same machine file and the same assumptions.

    python -m benchmarks.published_best            all; writes benchmarks/results/DATE-published-best.json
    python -m benchmarks.published_best 405B       those whose name has this in it; the others stay as the
                                                   newest file has them

Theirs is the best that is left when their degrees and their micro-batch are fixed: so what isn't published
(recompute, styles, chunks) is no handicap. Where their trainer shards the optimizer's state alone (ZeRO-1),
beside whole parameters, or runs collectives beside compute, theirs is predicted with that (as
benchmarks/published.py predicts such rows); ours is PyTorch's FSDP, eager. No GPU, no proof.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.published_best_results import WHAT, Pick, Row, Run, reason
from benchmarks.results import newest, now
from shardwise.core.case import Case
from shardwise.core.errors import ShardwiseError
from shardwise.core.search import Search
from shardwise.report.search import rows
from shardwise.verbs.search import SearchOptions, search

SECONDS = 120.0
COMMAND = "python -m benchmarks.published_best"
NANOTRON = (
    "huggingface/nanotron, docs/benchmark_summary.svg (2411b022), sequences of 4,096 as its playbook says"
)
DGXC = "NVIDIA/dgxc-benchmarking 25.04 (Megatron, bf16), NVIDIA's own recipes"
TITAN = "pytorch/torchtitan, benchmarks/ (bf16, 500 W)"
NANO_8B = "llama3-8b?n_kv_heads=32,vocab_size=131072"
NANO_80B = "llama3-70b?n_kv_heads=64,vocab_size=131072"


@dataclass(frozen=True, slots=True)
class Published:
    """fix: their degrees and micro-batch; free: what of our space is left out for time's sake. shards: ranks
    that share their optimizer's state, where parameters are whole; overlaps: their collectives of tp run
    beside matmuls."""

    name: str
    source: str
    measured: str
    model: str
    devices: int
    batch: int
    seq: int
    fix: tuple[str, ...]
    free: tuple[str, ...] = ("cp=1",)
    shards: int = 1
    overlaps: bool = False
    machine: str = "h100-sxm-80gb"


PUBLISHED = (
    Published("Llama 3 70B, 64 H100", DGXC, "14.66 s", "llama3-70b", 64, 128, 8192,
              ("tp=4", "pp=4", "cp=2", "fsdp=1", "micro-batch=1"), ("cp=1,2",), 4, True),
    Published("nanotron 8.9B, 8 H100", NANOTRON, "45.2 % MFU", NANO_8B, 8, 256, 4096,
              ("tp=1", "pp=4", "cp=1", "fsdp=1", "micro-batch=1"), shards=2),
    Published("nanotron 8.9B, 16 H100", NANOTRON, "43.9 % MFU", NANO_8B, 16, 256, 4096,
              ("tp=4", "pp=1", "cp=1", "fsdp=1", "micro-batch=4"), shards=4, overlaps=True),
    Published("nanotron 8.9B, 64 H100", NANOTRON, "39.5 % MFU", NANO_8B, 64, 256, 4096,
              ("tp=1", "pp=2", "cp=1", "fsdp=1", "micro-batch=1"), shards=32),
    Published("Llama 3.1 405B, 128 H100", TITAN, "18.79 s", "llama3.1-405b", 128, 32, 8192,
              ("tp=8", "pp=1", "cp=1", "dp=1", "micro-batch=2"), machine="h100-sxm-96gb-500w"),
    Published("nanotron 80B, 64 H100", NANOTRON, "30.7 % MFU", NANO_80B, 64, 256, 4096,
              ("tp=4", "pp=16", "cp=1", "fsdp=1", "micro-batch=1"), overlaps=True),
    Published("Llama 3 8B, 8 H100", DGXC, "12.27 s", "llama3-8b", 8, 128, 8192,
              ("tp=1", "pp=1", "cp=2", "fsdp=1", "micro-batch=1"), ("cp=1,2",), 8),
    Published("Llama 3.1 405B, 512 H100", DGXC, "19.78 s", "llama3.1-405b", 512, 256, 8192,
              ("tp=8", "pp=8", "cp=2", "fsdp=1", "micro-batch=1"), ("cp=1,2",), 8, True),
    Published("nanotron 8.9B, 512 H100", NANOTRON, "18.7 % MFU", NANO_8B, 512, 256, 4096,
              ("tp=4", "pp=1", "cp=1", "fsdp=1", "micro-batch=2"), overlaps=True),
)  # fmt: skip


def main(arguments: Sequence[str] = ()) -> int:
    """Runs the searches; returns the exit code."""
    started, asked = now(), arguments[0].lower() if arguments else ""
    chosen = [each for each in PUBLISHED if asked in each.name.lower()]
    found = _kept() if asked else {}
    for each in chosen:
        found[each.name] = compared(each)
        compared_rows = tuple(found[one.name] for one in PUBLISHED if one.name in found)
        run = Run(COMMAND, started.isoformat(timespec="seconds"), SECONDS, compared_rows)
        # what was found stays, should the rest be stopped
        print(f"{each.name}: wrote {run.write()}", flush=True)
        print("\n".join(reason(found[each.name])))
    return 0


def _kept() -> dict[str, Row]:
    """Those of the newest file, by name."""
    try:
        return {row.name: row for row in newest(Run, WHAT).rows}
    except FileNotFoundError:
        return {}


def compared(published: Published) -> Row:
    ours = _pick(_search(published, published.free))
    theirs, why_not = None, "nothing was found in time"
    try:
        theirs = _pick(_search(published, published.fix, is_theirs=True))
    except ShardwiseError as error:
        why_not = str(error)
    named = [each for each in published.fix if not each.endswith("=1") or each.startswith(("tp", "micro"))]
    return Row(
        published.name,
        published.source,
        ", ".join(named),
        published.measured,
        command(published),
        ours,
        theirs,
        why_not,
    )


def command(published: Published) -> str:
    """What a user types for our pick."""
    words = ["shardwise", "search", "--model", published.model, "--machine", published.machine]
    words += ["--devices", str(published.devices), "--batch", str(published.batch)]
    words += ["--seq", str(published.seq), "--dtype", "bfloat16", "--precision", "master"]
    for each in published.free:
        words += ["--fix", each]
    return shlex.join([*words, "--seconds", f"{SECONDS:g}", "--no-verify"])


def _search(published: Published, fix: Sequence[str], *, is_theirs: bool = False) -> Search:
    case = Case.of(
        model=published.model,
        mesh="tp=1",
        machine=published.machine,
        batch=published.batch,
        seq=published.seq,
        dtype="bfloat16",
    )
    options = SearchOptions(
        precision="master",
        optimizer_shards=published.shards if is_theirs else 1,
        overlap_data=is_theirs and published.shards > 1,
        overlap_tensor=is_theirs and published.overlaps,
        devices=published.devices,
        fix=tuple(fix),
        seconds=SECONDS,
        top=1,
        verify=False,
    )
    return search(case, options)


def _pick(found: Search) -> Pick | None:
    if not found.found:
        return None
    best = found.found[0]
    return Pick(
        f"{best.candidate.short_mesh}, {rows.step_text(best.candidate)}",
        best.step_s,
        best.memory.device_bytes,
        tuple((term.value, seconds) for term, seconds in best.terms if seconds),
        found.gap,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
