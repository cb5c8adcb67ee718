"""predict(): a traced micro-batch's Program and a Machine -> how long a step takes, term by term, and what it
holds.

A Program of one micro-batch stands for all of them; its gradient reduction, clipping and optimizer run once.
A pipeline's stage runs the items of its layers, the first stage also what comes before them, the last what
comes after.
"""

from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from shardwise.core.machine import Machine, local_ranks
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import Prediction, Setup, Term
from shardwise.core.program import Phase, Program
from shardwise.predict.memory import forecast
from shardwise.predict.pipeline import StageTimes, layers_of_stages, pipeline_s
from shardwise.predict.streams import run
from shardwise.predict.work import AFTER, BEFORE, TERMS, Work, further_shards, mesh_of, work_of

SLOWED_BESIDE = 0.189
"""How much longer compute takes while collectives run beside it: mean over A100, H100 and MI250. Source:
arXiv 2507.03114 (most: 40 %)."""

FORWARDS = (Phase.FORWARD, Phase.LOSS)
BACKWARDS = (Phase.BACKWARD, Phase.RECOMPUTE)
ONCE = (Phase.REDUCE, Phase.CLIP, Phase.OPTIMIZER)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage's times for a micro-batch, and how they add up: seconds by term, of the device alone."""

    times: StageTimes
    terms: dict[Term, float]
    work: Work


def predict(program: Program, machine: Machine, setup: Setup) -> Prediction:
    """Of a setup that check_setup lets pass."""
    work = work_of(program, machine, setup)
    work = without(work, setup.without)
    together = machine.device == "cpu"
    stages = stages_of(work, program, setup, together=together)
    passes_s = pipeline_s(
        [stage.times for stage in stages],
        setup.micro_batches,
        transfer_s(program, machine, setup),
        setup.chunks,
    )
    once_s = _once(step_end_of(work, setup, further_shards(program, setup)), together)
    busiest = max(range(len(stages)), key=lambda index: stages[index].times.total_s)
    terms = dict.fromkeys(Term, 0.0)
    for term, seconds in stages[busiest].terms.items():
        terms[term] += seconds * setup.micro_batches
    for term, seconds in once_s.items():
        terms[term] += seconds
    terms[Term.BUBBLE] += passes_s - setup.micro_batches * stages[busiest].times.total_s
    hidden = _hidden(once_s, stages[busiest], setup)
    terms[Term.DATA] -= hidden
    terms.update(dict.fromkeys(setup.without, 0.0))
    step_s = sum(terms.values())
    mesh = mesh_of(program, setup)
    sequences = (
        program.settings.batch // Mesh(program.axes).data_parallel * mesh.data_parallel * setup.micro_batches
    )
    return Prediction(
        program.model,
        program.plan,
        machine.name,
        mesh.axes,
        setup,
        sequences * program.settings.seq * mesh.context,
        step_s,
        tuple(terms.items()),
        forecast(program, machine, setup),
        tuple(f"{name} has no known cost on {machine.device}: counted by its bytes" for name in work.unknown),
    )


def without(work: Work, terms: tuple[Term, ...]) -> Work:
    """The same with the items of some terms costing nothing."""
    if not terms:
        return work
    off = np.isin(work.term, [TERMS.index(term) for term in terms])
    device = np.where(off, 0.0, work.device_s)
    host = np.zeros_like(work.host_s) if Term.LAUNCH in terms else work.host_s
    return replace(work, device_s=device, host_s=host)


def stages_of(work: Work, program: Program, setup: Setup, *, together: bool) -> list[Stage]:
    """Every stage of the pipeline; one where there is none."""
    n_layers = program.layers[1] if program.layers is not None else 0
    parts = layers_of_stages(n_layers, setup.stages)
    found: dict[tuple[int, bool, bool], Stage] = {}
    stages = []
    for index, (first, count) in enumerate(parts):
        # stages of equal layers that hold neither end are equal
        key = (count, index == 0, index == setup.stages - 1)
        if key not in found or not program.compressed:
            found[key] = _stage(work, first, count, setup, index, together)
        stages.append(found[key])
    return stages


def passes_of(
    work: Work, first: int, count: int, setup: Setup, index: int
) -> tuple[NDArray[np.bool_], Work, Work]:
    """Which rows stage `index` with `count` layers runs, its forward of a micro-batch, and its backward."""
    layers = (work.layer >= first) & (work.layer < first + count)
    if index == 0:
        layers |= work.layer == BEFORE
    if index == setup.stages - 1:
        layers |= work.layer == AFTER
    forward, backward = (work.where(layers & work.in_phases(*phases)) for phases in (FORWARDS, BACKWARDS))
    return layers, forward, backward


def _stage(work: Work, first: int, count: int, setup: Setup, index: int, together: bool) -> Stage:
    layers, *passes = passes_of(work, first, count, setup, index)
    times, terms = [], dict.fromkeys(Term, 0.0)
    for part in passes:
        # the host runs ahead of the device over micro-batches: what it falls behind in the second time is
        # what each further one waits
        twice = run(part.repeated(2), together=together)
        length = (
            twice.length_s - float(twice.end_s[: len(part)].max(initial=0.0))
            if setup.micro_batches > 1 or setup.stages > 1
            else twice.end_s[: len(part)].max(initial=0.0)
        )
        times.append(float(length) + _add_terms(terms, part, float(length), together))
    return Stage(StageTimes(*times), terms, work.where(layers))


def _add_terms(terms: dict[Term, float], part: Work, length_s: float, together: bool) -> float:
    """The items' own seconds by term; the difference to the length is waiting for launches. Returns what
    communication beside it adds to it."""
    own = part.device_s + (part.host_s if together else 0.0)
    sums = {term: float(own[part.term == index].sum()) for index, term in enumerate(TERMS)}
    busy = sum(seconds for term, seconds in sums.items() if term is not Term.DATA)
    spare = length_s - busy
    data = min(sums[Term.DATA], max(spare, 0.0))
    slowed = SLOWED_BESIDE * (sums[Term.DATA] - data)
    for term, seconds in sums.items():
        terms[term] += seconds if term is not Term.DATA else data
    terms[Term.LAUNCH] += spare - data
    terms[Term.SLOWED] += slowed
    return slowed


def step_end_of(work: Work, setup: Setup, shards: float) -> Work:
    """What runs once a step, of a stage's share of the parameters. shards: see further_shards."""
    once = work.where(work.in_phases(*ONCE))
    share = 1.0 / (setup.stages * setup.optimizer_shards * shards)
    return replace(
        once, device_s=np.where(once.axis == 0, once.device_s * share, once.device_s / setup.stages)
    )


def _once(scaled: Work, together: bool) -> dict[Term, float]:
    length = run(scaled, together=together).length_s
    sums = {
        term: float((scaled.device_s + (scaled.host_s if together else 0.0))[scaled.term == index].sum())
        for index, term in enumerate(TERMS)
    }
    sums[Term.LAUNCH] += length - sum(sums.values())
    return sums


def _hidden(once_s: dict[Term, float], stage: Stage, setup: Setup) -> float:
    """Of the gradients' reduction, what the last micro-batch's backward hides."""
    return min(once_s[Term.DATA], stage.times.backward_s) if setup.overlap_data else 0.0


def transfer_s(program: Program, machine: Machine, setup: Setup) -> float:
    """One activation to the next stage: what a rank of this stage sends to its peer there."""
    if setup.stages == 1:
        return 0.0
    n_bytes = boundary_bytes(program)
    stride = prod(size for _, size in program.axes)  # stages are the outermost axis
    link = (
        machine.within
        if local_ranks(stride, setup.stages, machine.devices_per_node) > 1
        else machine.between or machine.within
    )
    return link.start_s + n_bytes / (link.bytes_per_s * link.share_at(n_bytes))


def boundary_bytes(program: Program) -> int:
    """Of the activation between two layers, as one rank holds it: the first layer's first input of three dims
    or more, as no shard of FSDP's has."""
    if program.layers is None:
        return 0
    prefix = f"{program.layers[0]}.0"
    for op in program.ops():
        if op.module.startswith(prefix) and op.inputs and len(op.inputs[0].shape) > 2:
            spec = op.inputs[0]
            return prod(spec.shape) * {"float32": 4, "float64": 8}.get(spec.dtype, 2)
    return 0
