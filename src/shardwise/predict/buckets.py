"""Gradients of whole replicas summed beside the last micro-batch's backward, in buckets.

A Program sums them after the backward, in one flattened collective for each set of axes and dtype. Where
they are taken to be summed beside it (Setup.overlap_data), that collective is cut into buckets, which fill in
the order in which the backward makes gradients: what follows the layers, the layers from the last one, what
precedes them. A bucket goes when the layer that fills it has run backward; the optimizer waits for the last.

    DDP        the first bucket of 1 MiB, then 25 MiB (torch.nn.parallel.DistributedDataParallel:
               bucket_cap_mb; torch.distributed: _DEFAULT_FIRST_BUCKET_BYTES)
    Megatron   max(40 M, 1 M x ranks) gradients (megatron/core/distributed: DistributedDataParallelConfig,
               bucket_size), taken where it keeps master weights (Precision.MASTER)

Buckets cost what collectives of their size cost; what they take from the compute beside them is predict.py's
to say. FSDP's collectives need none of this: its buckets are in the trace. On a CPU nothing runs beside.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.layer_name import layer_index
from shardwise.core.machine import Machine
from shardwise.core.prediction import Precision, Setup, Term
from shardwise.core.program import Collective, Phase, Program
from shardwise.predict.costs import collective_cost
from shardwise.predict.groups import end_share, groups_of
from shardwise.predict.work import AFTER, BEFORE, PHASES, TERMS, Work, joined, layers_of

FIRST_DDP_BYTES = 2.0**20
DDP_BYTES = 25 * 2.0**20
MEGATRON_GRADIENTS = 40e6
MEGATRON_GRADIENTS_A_RANK = 1e6

_MOST_BUCKETS = 4096


@dataclass(frozen=True, slots=True)
class _Filled:
    """A bucket: its share of its collective's gradients, and the last layer that adds to it."""

    share: float
    layer: int


def beside_backward(
    backward: Work, end: Work, program: Program, machine: Machine, setup: Setup
) -> tuple[Work, Work]:
    """A stage's last backward with the buckets in it, and the step's end without what they sum."""
    sums = [row for row in np.flatnonzero(end.axis > 0) if _sums_gradients(end.item(int(row)))]
    if not sums or end.together:
        return backward, end
    made = _made_by_layer(backward, program)
    rows, places = [], []
    for row in sums:
        item = end.item(int(row))
        assert isinstance(item, Collective)
        group = groups_of(program, setup)[item.call.axis]
        own = end.where(np.arange(len(end)) == row)
        share = end_share(item, program, setup)
        for bucket in _buckets(made, item, share, group.size, setup):
            cost = collective_cost(item, machine, setup, group, bucket.share * share)
            rows.append(_row(own, cost.device_s, cost.host_s, bucket.layer, setup))
            places.append(_place(backward, bucket.layer))
    together = joined([backward, *rows])
    order = np.argsort(np.array([*range(len(backward)), *places], np.float64), kind="stable")
    kept = np.ones(len(end), np.bool_)
    kept[sums] = False
    return together.reordered(order), end.where(kept)


def bucket_bytes(setup: Setup, dtype: str, ranks: int) -> tuple[float, float]:
    """Of the first bucket, and of those that follow."""
    if setup.bucket_mib is not None:
        return setup.bucket_mib * 2.0**20, setup.bucket_mib * 2.0**20
    if setup.precision is Precision.MASTER:
        n_bytes = max(MEGATRON_GRADIENTS, MEGATRON_GRADIENTS_A_RANK * ranks) * DTYPE_BYTES.get(dtype, 4)
        return n_bytes, n_bytes
    return FIRST_DDP_BYTES, DDP_BYTES


def _sums_gradients(item: object) -> bool:
    return isinstance(item, Collective) and item.phase is Phase.REDUCE and item.is_many


def _made_by_layer(backward: Work, program: Program) -> list[tuple[int, float]]:
    """(layer, its share of the stage's gradients), in the order in which the backward makes them."""
    here = set(map(int, np.unique(backward.layer)))
    prefix, _ = layers_of(program)
    made: dict[int, float] = dict.fromkeys(here, 0.0)
    seen_layers = False
    for holding in program.holdings:
        index = layer_index(holding.module, prefix)
        seen_layers |= index is not None
        place = index if index is not None else AFTER if seen_layers else BEFORE
        if place in made:
            made[place] += holding.gradient_bytes
    total = sum(made.values()) or 1.0
    order = sorted(made, key=lambda layer: ({AFTER: 0, BEFORE: 2}.get(layer, 1), -layer))
    return [(layer, made[layer] / total) for layer in order]


def _buckets(
    made: list[tuple[int, float]], item: Collective, share: float, ranks: int, setup: Setup
) -> list[_Filled]:
    n_bytes = item.call.payload_bytes * share
    first, others = bucket_bytes(setup, item.call.dtype, ranks)
    others = max(others, n_bytes / _MOST_BUCKETS)
    ends, at = [], min(first, n_bytes)
    while at < n_bytes:
        ends.append(at / n_bytes)
        at += others
    ends.append(1.0)
    filled = list(accumulate(part for _, part in made))
    found, begun = [], 0.0
    for stop in ends:
        place = next((index for index, full in enumerate(filled) if full >= stop - 1e-9), len(made) - 1)
        found.append(_Filled(stop - begun, made[place][0]))
        begun = stop
    return found


def _place(backward: Work, layer: int) -> float:
    """Just behind the layer's last row."""
    return float(np.flatnonzero(backward.layer == layer)[-1]) + 0.5


def _row(own: Work, device_s: float, host_s: float, layer: int, setup: Setup) -> Work:
    off = Term.DATA in setup.without
    changed = {
        "device_s": 0.0 if off else device_s,
        "host_s": 0.0 if Term.LAUNCH in setup.without else host_s,
        "phase": PHASES.index(Phase.BACKWARD),
        "term": TERMS.index(Term.DATA),
        "layer": layer,
    }
    return own.with_values(changed)
