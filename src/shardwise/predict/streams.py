"""When each item of a row of work runs: the host issues in order, the device's compute stream and its
communication streams follow.

    compute stream   starts an item when the one before it ended, the host has issued it, and what it needs
                     has arrived
    tp collectives   take part in the compute stream's order: what follows needs their result
    data axes' own   run beside it on a stream of their own: FSDP's, and buckets of replicas' gradients
                     (buckets.py). An all-gather of a layer's parameters begins with the compute of the layer
                     that runs before it, and the layer's compute waits for its end; a reduce-scatter or
                     all-reduce (of gradients) begins when what comes before it has been computed, and nothing
                     waits for it but the optimizer (PyTorch FSDP2's prefetching)

Between data collectives, ends follow from a running maximum: end[i] = S[i] + max over j <= i of (issued[j] -
S[j-1]), S being the sum of durations. No loop over items.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardwise.core.collective import CollectiveKind
from shardwise.core.mesh import Role, role_of
from shardwise.core.program import BACKWARDS, IN_LAYERS, Collective, Phase
from shardwise.predict.work import PHASES, Seconds, Work

_OF_SHARDS = (CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER)


@dataclass(frozen=True, slots=True)
class Run:
    """Starts and ends of each item, seconds from the moment at which the host begins; in a collective the
    waiting for other ranks comes first. issued_s: when the host had issued it."""

    start_s: Seconds
    end_s: Seconds
    issued_s: Seconds

    @property
    def length_s(self) -> float:
        return float(self.end_s.max(initial=0.0))


def run(work: Work) -> Run:
    """Runs the work once."""
    if work.together:
        ends = np.cumsum(work.waits_s + work.device_s + work.host_s)
        starts = ends - work.device_s - work.waits_s
        return Run(starts, ends, starts)
    issued, takes_s = np.cumsum(work.host_s), work.waits_s + work.device_s
    start, end = np.zeros(len(work)), np.zeros(len(work))
    beside = np.flatnonzero(beside_layers(work))
    in_backward = work.in_phases(*BACKWARDS)
    free = comm_free = layer_start = 0.0
    first = 0
    arrives: dict[int, float] = {}  # when a layer's parameters are there
    for at in [*beside, len(work)]:
        if at > first:
            part = slice(first, at)
            waits_for = arrives.pop(int(work.layer[first]), 0.0)
            begun, ended = _in_order(takes_s[part], issued[part], max(free, waits_for))
            start[part], end[part] = begun, ended
            layer_start, free = float(begun[0]), float(ended[-1])
        if at < len(work):
            gathers = is_gather(work, at)
            ready = layer_start if gathers and not in_backward[at] else free
            start[at] = max(comm_free, float(issued[at]), ready)
            end[at] = comm_free = start[at] + float(takes_s[at])
            if gathers:
                arrives[needed_by(work, at)] = comm_free
        first = at + 1
    final = work.in_phases(Phase.CLIP, Phase.OPTIMIZER)
    if final.any() and comm_free > 0:  # the optimizer needs all gradients
        late = max(0.0, comm_free - float(start[final].min()))
        start[final] += late
        end[final] += late
    return Run(start, end, issued)


def _in_order(durations: Seconds, issued: NDArray[np.float64], free_s: float) -> tuple[Seconds, Seconds]:
    total = np.cumsum(durations)
    before = total - durations
    ends = total + np.maximum(np.maximum.accumulate(issued - before), free_s)
    return ends - durations, ends


def sums_of_replicas(work: Work) -> NDArray[np.int64]:
    """Rows in which replicas sum gradients beside the backward."""
    replicas = np.array([role_of(name) is Role.REPLICATES for name in ("", *work.axes)])[work.axis]
    return np.flatnonzero(replicas & work.in_phases(*BACKWARDS) & (work.device_s > 0))


def beside_layers(work: Work) -> NDArray[np.bool_]:
    """Collectives over data-parallel axes that belong to layers: FSDP's gathers and sums in forward and
    backward, and buckets of whole replicas' gradients in the backward. What the step itself adds up over
    those ranks, such as its labels, is in the compute stream's order."""
    shards = np.array([role_of(name) is Role.SHARDS_PARAMETERS for name in ("", *work.axes)])[work.axis]
    of_shards = np.array(
        [isinstance(each, Collective) and each.call.kind in _OF_SHARDS for each in work.items]
    )
    beside: NDArray[np.bool_] = shards & work.in_phases(*IN_LAYERS) & (work.device_s > 0)
    beside &= of_shards[work.template] if len(work) else beside
    beside[sums_of_replicas(work)] = True
    return beside


def needed_by(work: Work, at: int) -> int:
    """The layer whose parameters an all-gather brings: in a backward a layer fetches those of the layer that
    comes after it."""
    if PHASES[int(work.phase[at])] not in BACKWARDS:
        return int(work.layer[at])
    others = np.flatnonzero(work.layer[at:] != work.layer[at])
    return int(work.layer[at + others[0]]) if len(others) else int(work.layer[at])


def is_gather(work: Work, at: int) -> bool:
    item = work.item(at)
    return isinstance(item, Collective) and item.call.kind is CollectiveKind.ALL_GATHER
