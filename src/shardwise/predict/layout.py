"""Layout: a step laid out on its devices: each stage's passes of a micro-batch, what they take, and the
step's end.

A Program of one micro-batch stands for all of them; its gradient reduction, clipping and optimizer run once.
A pipeline's stage runs the items of its layers, the first stage also what comes before them, the last what
comes after.
"""

from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from shardwise.core.collective import CollectiveKind
from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.machine import Machine, local_ranks
from shardwise.core.mesh import Mesh, Role, role_of
from shardwise.core.prediction import Setup, Term
from shardwise.core.program import BACKWARDS, FORWARDS, ONCE, Collective, Program
from shardwise.predict.groups import further_shards, mesh_of, optimizer_shards
from shardwise.predict.pipeline import StageTimes, layers_of_stages
from shardwise.predict.streams import run
from shardwise.predict.work import AFTER, BEFORE, Work, layers_of, work_of

SLOWED_BESIDE = 0.189
"""How much longer compute takes while collectives run beside it: mean over A100, H100 and MI250. Source:
arXiv 2507.03114 (most: 40 %)."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage's work on a micro-batch, what it takes, and how that adds up: seconds by term, of the device
    alone."""

    forward: Work
    backward: Work
    times: StageTimes
    terms: dict[Term, float]


@dataclass(frozen=True, slots=True)
class Layout:
    """work: all of the Program's. stages: of the pipeline; one where there is none. end: what runs once a
    step, of a stage's share of the parameters. transfer_s: one activation to the next stage."""

    program: Program
    machine: Machine
    setup: Setup
    work: Work
    stages: tuple[Stage, ...]
    end: Work
    transfer_s: float

    @property
    def mesh(self) -> Mesh:
        return mesh_of(self.program, self.setup)

    @property
    def times(self) -> list[StageTimes]:
        return [stage.times for stage in self.stages]

    @property
    def busiest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.times.total_s)


def lay_out(program: Program, machine: Machine, setup: Setup) -> Layout:
    """Of a setup that check_setup lets pass."""
    work = work_of(program, machine, setup).without(setup.without)
    transfer_s = _transfer_s(program, machine, setup)
    end = _end(work, setup, optimizer_shards(program, setup) * further_shards(program, setup))
    return Layout(program, machine, setup, work, _stages(work, program, setup), end, transfer_s)


def _stages(work: Work, program: Program, setup: Setup) -> tuple[Stage, ...]:
    once = program.settings.reduce_once and setup.micro_batches > 1
    alike: dict[tuple[int, bool, bool], Stage] = {}
    stages = []
    for index, (first, count) in enumerate(layers_of_stages(layers_of(program)[1], setup.stages)):
        # stages of equal layers that hold neither end are equal
        key = (count, index == 0, index == setup.stages - 1)
        if key not in alike or not program.compressed:
            alike[key] = _stage(work, first, count, setup, index, once=once)
        stages.append(alike[key])
    return tuple(stages)


def _stage(work: Work, first: int, count: int, setup: Setup, index: int, *, once: bool) -> Stage:
    """once: FSDP sums gradients in the last micro-batch's backward only."""
    layers = (work.layer >= first) & (work.layer < first + count)
    if index == 0:
        layers |= work.layer == BEFORE
    if index == setup.stages - 1:
        layers |= work.layer == AFTER
    forward, backward = (work.where(layers & work.in_phases(*phases)) for phases in (FORWARDS, BACKWARDS))
    terms = dict.fromkeys(Term, 0.0)
    times = [_add_pass(terms, part, setup) for part in (forward, backward)]
    if once:
        before, kept = backward.where(~_reduces_shards(backward)), dict.fromkeys(Term, 0.0)
        early = [_add_pass(kept, part, setup) for part in (forward, before)]
        share = 1 / setup.micro_batches  # of the last one, which reduces; what stands for all is their mean
        terms = {term: share * terms[term] + (1 - share) * kept[term] for term in Term}
        times = [share * last + (1 - share) * other for last, other in zip(times, early, strict=True)]
    return Stage(forward, backward, StageTimes(*times), terms)


def _reduces_shards(work: Work) -> NDArray[np.bool_]:
    """FSDP's sums of gradients."""
    items = [work.item(at) for at in range(len(work))]
    return np.array(
        [
            isinstance(item, Collective)
            and item.call.kind is CollectiveKind.REDUCE_SCATTER
            and role_of(item.call.axis) is Role.SHARDS_PARAMETERS
            for item in items
        ],
        np.bool_,
    )


def _add_pass(terms: dict[Term, float], part: Work, setup: Setup) -> float:
    """Adds the items' own seconds by term; the difference to the pass's length is waiting for launches.
    Returns its length, with what communication beside it adds."""
    # the host runs ahead of the device over micro-batches: what it falls behind in the second time is what
    # each further
    # one waits
    twice = run(part.repeated(2))
    length_s = float(twice.end_s[: len(part)].max(initial=0.0))
    if setup.micro_batches > 1 or setup.stages > 1:
        length_s = twice.length_s - length_s
    sums = part.by_term()
    spare = length_s - sum(seconds for term, seconds in sums.items() if term is not Term.DATA)
    data = min(sums[Term.DATA], max(spare, 0.0))
    slowed = SLOWED_BESIDE * (sums[Term.DATA] - data)
    for term, seconds in (sums | {Term.DATA: data}).items():
        terms[term] += seconds
    terms[Term.LAUNCH] += spare - data
    terms[Term.SLOWED] += slowed
    return length_s + slowed


def _end(work: Work, setup: Setup, shards: float) -> Work:
    """shards: into how many parts a traced rank's parameters are cut there."""
    once = work.where(work.in_phases(*ONCE))
    share = 1.0 / (setup.stages * shards)
    device_s = np.where(once.axis == 0, once.device_s * share, once.device_s / setup.stages)
    return replace(once, device_s=device_s)


def _transfer_s(program: Program, machine: Machine, setup: Setup) -> float:
    """What a rank of a stage sends to its peer in the next one."""
    if setup.stages == 1:
        return 0.0
    n_bytes = _boundary_bytes(program)
    mesh = mesh_of(program, setup)
    stride = mesh.world_size // mesh.stages  # stages are the outermost axis
    inside = local_ranks(stride, setup.stages, machine.devices_per_node) > 1
    link = machine.within if inside else machine.between or machine.within
    return link.start_s + n_bytes / (link.bytes_per_s * link.share_at(n_bytes))


def _boundary_bytes(program: Program) -> int:
    """Of the activation between two layers, as one rank holds it: the first layer's first input of three dims
    or more, as no shard of FSDP's has."""
    prefix = f"{layers_of(program)[0]}.0"
    for op in program.ops():
        if op.module.startswith(prefix) and op.inputs and len(op.inputs[0].shape) > 2:
            spec = op.inputs[0]
            return prod(spec.shape) * DTYPE_BYTES.get(spec.dtype, 2)
    return 0
