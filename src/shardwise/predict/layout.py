"""Layout: a step laid out on its devices: each stage's passes of a micro-batch, what they take, and the
step's end.

A Program of one micro-batch stands for all of them; its gradient reduction, clipping and optimizer run once.
A pipeline's stage runs the items of its layers, the first stage also what comes before them, the last what
comes after.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardwise.core.collective import CollectiveKind
from shardwise.core.machine import Machine, local_ranks
from shardwise.core.mesh import Mesh, Role, role_of
from shardwise.core.op_names import FSDP_COPY_IN, FSDP_COPY_OUT
from shardwise.core.pipeline import Span, even_counts
from shardwise.core.prediction import Setup, Term
from shardwise.core.program import BACKWARDS, FORWARDS, ONCE, Collective, Op, Program
from shardwise.predict.buckets import beside_backward
from shardwise.predict.groups import further_shards, groups_of, mesh_of, optimizer_shards
from shardwise.predict.pipeline import PartTimes
from shardwise.predict.streams import run
from shardwise.predict.waiting import Apart, Waiting, waiting_of
from shardwise.predict.work import AFTER, BEFORE, Work, boundary_bytes, joined, layers_of, work_of

SLOWED_BESIDE = 0.189
"""How much longer compute takes while collectives run beside it: mean over A100, H100 and MI250. Source:
arXiv 2507.03114 (most: 40 %)."""


_WAYS = ("forward_s", "backward_s")


@dataclass(frozen=True, slots=True)
class Stage:
    """The work of a stage, or of one of its parts, on a micro-batch, what it takes, and how that adds up:
    seconds by term, of the device alone, the mean over micro-batches. forward: the first one's. backward: the
    last one's. rest: a forward and a backward of each of the others. apart: how far its ranks have come apart
    after the step's last micro-batch (predict/waiting.py)."""

    forward: Work
    backward: Work
    rest: tuple[Work, Work]
    times: PartTimes
    terms: dict[Term, float]
    apart: Apart


@dataclass(frozen=True, slots=True)
class Layout:
    """work: all of the Program's. stages: of the pipeline; one where there is none. parts: what each part
    takes. last: the busiest stage's backward of the last micro-batch, where gradients are summed beside it
    (buckets.py); else as all others. end: what runs once a step, of a stage's share of the parameters.
    transfer_s: one activation to the next stage."""

    program: Program
    machine: Machine
    setup: Setup
    work: Work
    stages: tuple[Stage, ...]
    parts: tuple[PartTimes, ...]
    last: Work
    end: Work
    transfer_s: float

    @property
    def mesh(self) -> Mesh:
        return mesh_of(self.program, self.setup)

    @property
    def busiest(self) -> Stage:
        return _busiest(self.stages)

    @property
    def runs(self) -> tuple[tuple[Work, int], ...]:
        """All that the busiest stage runs in a step, each with how often."""
        further = self.setup.micro_batches - 1
        rest = self.busiest.rest
        return (self.busiest.forward, 1), *((each, further) for each in rest), (self.last, 1), (self.end, 1)

    @property
    def punctual(self) -> bool:
        """Whether all ranks come to their collectives at once."""
        works = (self.busiest.forward, self.last, self.end)
        return not any(work.waits_s.any() for work in works)


def lay_out(program: Program, machine: Machine, setup: Setup) -> Layout:
    """Of a setup that check_setup lets pass."""
    work = work_of(program, machine, setup).without(setup.without)
    transfer_s = _transfer_s(program, machine, setup)
    sizes = {axis: group.size for axis, group in groups_of(program, setup).items()}
    waiting = waiting_of(machine, setup, sizes)
    end = _end(work, setup, optimizer_shards(program, setup) * further_shards(program, setup))
    parts = _parts(work, program, setup, end, waiting)
    pipeline = setup.pipeline()
    stages = tuple(
        _together([parts[part] for part in pipeline.parts_of(stage)]) for stage in range(setup.stages)
    )
    times = tuple(part.times for part in parts)
    busiest = _busiest(stages)
    last = busiest.backward
    if setup.overlap_data:
        last, end = beside_backward(last, end, program, machine, setup)
    if waiting is not None:
        last, end = waiting.at_end(last, end, busiest.apart)
    return Layout(program, machine, setup, work, stages, times, last, end, transfer_s)


def _busiest(stages: Sequence[Stage]) -> Stage:
    return max(stages, key=lambda stage: stage.times.total_s)


def balanced_counts(
    program: Program,
    machine: Machine,
    setup: Setup,
    dealt: Callable[[tuple[int, ...]], Program] | None = None,
) -> tuple[int, ...]:
    """Layers of each part with which the busiest stage is least busy; of equals the most even. What comes
    before the layers and after them counts for as much as it takes. dealt: the Program where layers are dealt
    so; None: the same, whatever they are. Raises OptionError for too few layers."""
    pipeline = setup.pipeline()
    work = work_of(program, machine, setup).without(setup.without)
    n_layers = layers_of(program)[1]
    pipeline.spans(n_layers, program.model)
    layer_s = _part(work, Span(0, n_layers), program, setup, ends=(False, False)).times.total_s / n_layers
    ends_s = [
        _part(work, Span(0, 0), program, setup, ends=ends).times.total_s
        for ends in ((True, False), (False, True))
    ]
    counts = [1] * pipeline.parts
    busy = [layer_s * pipeline.chunks] * pipeline.stages
    busy[0] += ends_s[0]
    busy[-1] += ends_s[1]
    middle = (pipeline.parts - 1) / 2
    for _ in range(n_layers - pipeline.parts):
        # to the stage that is least busy, of its parts the shortest, of equals the one in the middle
        part = min(
            range(pipeline.parts),
            key=lambda part: (round(busy[pipeline.stage_of(part)], 9), counts[part], abs(part - middle)),
        )
        counts[part] += 1
        busy[pipeline.stage_of(part)] += layer_s
    # waiting for launches doesn't add up layer by layer
    choices = (tuple(counts), even_counts(n_layers, pipeline.parts))
    return min(
        choices,
        key=lambda layers: (
            lay_out(
                dealt(layers) if dealt is not None else program, machine, replace(setup, layers=layers)
            ).busiest.times.total_s
        ),
    )


def _parts(work: Work, program: Program, setup: Setup, end: Work, waiting: Waiting | None) -> list[Stage]:
    alike: dict[tuple[int, bool, bool], Stage] = {}
    parts: list[Stage] = []
    spans = setup.pipeline().spans(layers_of(program)[1]) if setup.stages > 1 else (None,)
    for index, span in enumerate(spans):
        # parts of equal layers that hold neither end are equal
        key = (span.count if span is not None else 0, index == 0, index == len(spans) - 1)
        if key not in alike or not program.compressed:
            alike[key] = _part(work, span, program, setup, ends=key[1:], late=(end, waiting))
        parts.append(alike[key])
    return parts


def _together(parts: Sequence[Stage]) -> Stage:
    """All that a stage works on a micro-batch."""
    if len(parts) == 1:
        return parts[0]
    terms = {term: sum(part.terms[term] for part in parts) for term in Term}
    forward_s, backward_s = (sum(getattr(part.times, way) for part in parts) for way in _WAYS)
    forward = joined([part.forward for part in parts])
    backward = joined([part.backward for part in reversed(parts)])
    rest = joined([part.rest[0] for part in parts]), joined([part.rest[1] for part in reversed(parts)])
    apart = {name: sum(part.apart[name] for part in parts) for name in parts[0].apart}
    return Stage(forward, backward, rest, PartTimes(forward_s, backward_s), terms, apart)


def _part(
    work: Work,
    span: Span | None,
    program: Program,
    setup: Setup,
    ends: tuple[bool, bool],
    late: tuple[Work, Waiting | None] | None = None,
) -> Stage:
    """span: of layers; None: of all of them. ends: whether it has what comes before them, and after them.
    late: the step's end, and how ranks wait."""
    layers = work.layer >= 0
    if span is not None:
        layers &= (work.layer >= span.first) & (work.layer < span.stop)
    for holds, place in zip(ends, (BEFORE, AFTER), strict=True):
        if holds:
            layers |= work.layer == place
    passes = tuple(work.where(layers & work.in_phases(*phases)) for phases in (FORWARDS, BACKWARDS))
    apart: Apart = {}
    if late is not None and (waiting := late[1]) is not None:
        passes, apart = waiting.in_step(passes, late[0], setup.micro_batches)
    terms, times, rest = dict.fromkeys(Term, 0.0), [], []
    for each, of_one in zip(passes, _of_one_micro_batch(passes, program, setup), strict=True):
        share = 1 / setup.micro_batches if of_one.any() else 1.0
        rest.append(each.where(~of_one) if of_one.any() else each)
        own, others = dict.fromkeys(Term, 0.0), dict.fromkeys(Term, 0.0)
        length_s = share * _add_pass(own, each, setup)
        if share < 1:  # what stands for all is their mean
            length_s += (1 - share) * _add_pass(others, rest[-1], setup)
        times.append(length_s)
        terms = {term: terms[term] + share * own[term] + (1 - share) * others[term] for term in Term}
    forward, backward = passes
    return Stage(forward, backward, (rest[0], rest[1]), PartTimes(*times), terms, apart)


def _of_one_micro_batch(passes: Sequence[Work], program: Program, setup: Setup) -> list[NDArray[np.bool_]]:
    """The rows of a forward and of a backward that one micro-batch alone runs, the first and the last: over a
    pipeline FSDP gathers once what it keeps after the forward (step/pipeline.py), and it may sum gradients
    once."""
    settings, several = program.settings, setup.micro_batches > 1
    forward, backward = passes
    gathered, summed = np.zeros(len(forward), np.bool_), np.zeros(len(backward), np.bool_)
    if several and setup.stages > 1 and not settings.reshard_after_forward:
        gathered = _gathers_shards(forward)
    if several and settings.reduce_once:
        summed = _exchanges_shards(backward, CollectiveKind.REDUCE_SCATTER)
    return [gathered, summed]


def _gathers_shards(work: Work) -> NDArray[np.bool_]:
    """FSDP's gathers of parameters, and the copies before them and after."""
    copies = [isinstance(each, Op) and each.name in (FSDP_COPY_IN, FSDP_COPY_OUT) for each in work.items]
    return _exchanges_shards(work, CollectiveKind.ALL_GATHER) | np.array(copies, np.bool_)[work.template]


def _exchanges_shards(work: Work, kind: CollectiveKind) -> NDArray[np.bool_]:
    """FSDP's collectives of this kind."""
    chosen = [
        isinstance(item, Collective)
        and item.call.kind is kind
        and role_of(item.call.axis) is Role.SHARDS_PARAMETERS
        for item in work.items
    ]
    return np.array(chosen, np.bool_)[work.template]


def _add_pass(terms: dict[Term, float], part: Work, setup: Setup) -> float:
    """Adds the items' own seconds by term; the difference to the pass's length is waiting for launches, and
    what late ranks add to that waiting for them. Returns its length, with what communication beside it
    adds."""
    length_s = _pass_s(part.punctual, setup)
    late_s = _pass_s(part, setup) - length_s if part.waits_s.any() else 0.0
    sums = part.by_term()
    spare = length_s - sum(seconds for term, seconds in sums.items() if term is not Term.DATA)
    data = min(sums[Term.DATA], max(spare, 0.0))
    slowed = SLOWED_BESIDE * (sums[Term.DATA] - data + float(part.hidden_s.sum()))
    for term, seconds in (sums | {Term.DATA: data}).items():
        terms[term] += seconds
    terms[Term.LAUNCH] += spare - data
    terms[Term.SLOWED] += slowed
    terms[Term.WAITING] += late_s
    return length_s + slowed + late_s


def _pass_s(part: Work, setup: Setup) -> float:
    """How long the device has a pass of a micro-batch."""
    if setup.waits_for_device:  # the host begins each with nothing in flight
        return run(part).length_s
    # the host runs ahead of the device over micro-batches: what it falls behind in the second time is what
    # each further one waits
    twice = run(part.repeated(2))
    length_s = float(twice.end_s[: len(part)].max(initial=0.0))
    if setup.micro_batches > 1 or setup.stages > 1:
        length_s = twice.length_s - length_s
    return length_s


def _end(work: Work, setup: Setup, shards: float) -> Work:
    """shards: into how many parts a traced rank's parameters are cut there."""
    once = work.where(work.in_phases(*ONCE))
    share = 1.0 / (setup.stages * shards)
    device_s = np.where(once.axis == 0, once.device_s * share, once.device_s)  # collectives: end_share()
    return replace(once, device_s=device_s)


def _transfer_s(program: Program, machine: Machine, setup: Setup) -> float:
    """What a rank of a stage sends to its peer in the next one."""
    if setup.stages == 1:
        return 0.0
    n_bytes = boundary_bytes(program)
    mesh = mesh_of(program, setup)
    stride = mesh.world_size // mesh.stages  # stages are the outermost axis
    inside = local_ranks(stride, setup.stages, machine.devices_per_node) > 1
    link = machine.within if inside else machine.between or machine.within
    return link.start_s + n_bytes / (link.bytes_per_s * link.share_at(n_bytes) * link.usable(2))
