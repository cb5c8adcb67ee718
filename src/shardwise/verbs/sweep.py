"""sweep: plans on a number of devices -> Sweep: every mesh and micro-batch. Few Programs are traced, the
others derived."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import InputError, OptionError
from shardwise.core.machine import Machine
from shardwise.core.mesh import PREDICTED, SHARDS_AXIS, Mesh, Role, check_carried
from shardwise.core.pipeline import Schedule
from shardwise.core.prediction import Setup
from shardwise.core.program import Program
from shardwise.core.shown import shown
from shardwise.core.sweep import Refusal, Sweep, SweepPoint
from shardwise.predict.check import check_devices, check_setup
from shardwise.predict.contrast import facts_of
from shardwise.predict.family import LONG, SHORT, Family, NotAFamilyError
from shardwise.predict.predict import predict
from shardwise.predict.sweep import GIVEN, best_first, meshes, over_nodes, shares_programs
from shardwise.predict.traced import micro_batch
from shardwise.verbs.checks import check_recompute, check_seq, default_plan
from shardwise.verbs.predict import MACHINE, SEQ, PredictOptions
from shardwise.verbs.programs import set_up, trace_program
from shardwise.verbs.progress import Progress, silent
from shardwise.workers.processes import on_processes

MOST_DEVICES = 1_000_000
MOST_POINTS = 20_000
MICRO_BATCHES = (1, 2, 4, 8)
DOING = "tracing and predicting"
_PRELOAD = ("shardwise.verbs.preload",)
_KILLED = "a process of the sweep was killed: out of memory? Sweep over fewer plans at once."


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """devices: None for one node of the machine. micro_batches: sizes, in sequences of a data-parallel rank
    at a time."""

    devices: int | None = None
    micro_batches: tuple[int, ...] = MICRO_BATCHES


@dataclass(frozen=True, slots=True)
class SweepTask:
    """One plan, the case's, on meshes that share their Programs. sizes: of micro-batches."""

    case: Case
    sizes: tuple[int, ...]
    meshes: tuple[Mesh, ...]
    setup: Setup
    machine: Machine


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a task found. refused: (reason, points)."""

    plan: str
    points: tuple[SweepPoint, ...]
    refused: tuple[tuple[str, int], ...]
    traces: int


def sweep(
    case: Case,
    options: SweepOptions | None = None,
    run: PredictOptions | None = None,
    progress: Progress = silent,
    *,
    workers: int | None = None,
) -> Sweep:
    """The case's plans over all meshes. Of the case's own mesh axes cp and ep are kept; without a batch each
    point has the case's accumulation, or as many micro-batches as stages where that is 1. run: what predict
    assumes. Raises InputErrors of the model or a plan that hold for every mesh, OptionError, RunError."""
    from shardwise.models.source import find_model
    from shardwise.parallel.plans import load_plans
    from shardwise.predict.machines import load_machine

    options, machine = options or SweepOptions(), load_machine(case.machine or MACHINE)
    check_carried(case.mesh, "predict", PREDICTED)
    kept = prod(case.mesh.size_of(role) for role in GIVEN)
    setup = (run or PredictOptions()).setup(case.mesh if kept > 1 else None, case.step)
    if case.mesh.world_size > kept:
        raise OptionError(
            f"--mesh {case.mesh}: a sweep goes over all axes but cp and ep. Give these alone, or none."
        )
    settings = replace(case.step, seq=case.step.seq or SEQ)
    micro_batch(settings, case.mesh)
    devices = options.devices or machine.devices_per_node
    found = _meshes(devices, machine, case.mesh, by_stages=settings.recompute_layers is not None)
    source = find_model(case.model)
    check_recompute(case, source)
    check_seq(settings.seq, source)
    case = replace(case, step=settings, plans=case.plans or (default_plan(source),))
    load_plans(  # raises here what no process need be started for
        case.plans,
        sequence_parallel=case.sequence_parallel,
        family=source.family,
        context_attention=case.context_attention,
    )
    results = _run(_tasks(case, options, setup, machine, found), workers, progress)
    refused: Counter[tuple[str, str]] = Counter()
    for result in results:
        refused.update({(result.plan, reason): number for reason, number in result.refused})
    apart = over_nodes(devices, machine.devices_per_node, case.mesh)
    for plan, (reason, number) in product(dict.fromkeys(result.plan for result in results), apart.items()):
        refused[plan, reason] += number * len(options.micro_batches)
    return Sweep(
        case.model,
        facts_of(machine),
        devices,
        replace(settings, accumulation=1),
        setup,
        best_first([point for result in results for point in result.points]),
        tuple(Refusal(plan, reason, number) for (plan, reason), number in refused.items()),
        sum(result.traces for result in results),
    )


def _tasks(
    case: Case, options: SweepOptions, setup: Setup, machine: Machine, found: list[tuple[Mesh, ...]]
) -> list[SweepTask]:
    """Those that take longest first, so that no process ends long before the other. Raises OptionError for
    too many points."""
    count = sum(len(alike) for alike, _ in _with_chunks(found, case.step))
    count *= len(case.plans) * len(options.micro_batches)
    if count > MOST_POINTS:
        raise OptionError(
            f"--sweep: is over {count:,} points; at most {MOST_POINTS:,}. Give fewer plans or "
            "--micro-batches."
        )
    tasks = [
        SweepTask(
            replace(case, plans=(plan,), step=step),
            options.micro_batches,
            alike,
            replace(setup, chunks=step.chunks, schedule=Schedule(step.schedule) if step.schedule else None),
            machine,
        )
        for plan in case.plans
        for alike, step in _with_chunks(found, case.step)
    ]
    return sorted(tasks, key=lambda task: -len(task.meshes))


def _run(tasks: list[SweepTask], workers: int | None, progress: Progress) -> list[SweepResult]:
    """As they come."""
    results: list[SweepResult] = []
    progress(DOING, 0, len(tasks))
    workers = workers or min(len(tasks), os.cpu_count() or 1)
    for result in on_processes(run_task, tasks, workers, _KILLED, _PRELOAD, set_up):
        results.append(result)
        progress(DOING, len(results), len(tasks))
    return results


def _meshes(devices: int, machine: Machine, given: Mesh, *, by_stages: bool) -> list[tuple[Mesh, ...]]:
    """All meshes on so many devices, those together that share their Programs. by_stages: their Programs
    differ with the stages that layers are dealt to."""
    if not 1 <= devices <= MOST_DEVICES:
        raise OptionError(f"--devices {devices}: use 1 to {MOST_DEVICES:,}.")
    check_devices(machine, Mesh.of({Role.CUTS_TENSORS: devices}))
    kept = prod(given.size_of(role) for role in GIVEN)
    if devices % kept:
        raise OptionError(
            f"--devices {devices} can't be cut into the {kept} of --mesh {given}. Use a multiple of it."
        )
    kinds: dict[object, list[Mesh]] = {}
    for mesh in meshes(devices, machine.devices_per_node, given):
        kinds.setdefault((shares_programs(mesh), mesh.stages if by_stages else 1), []).append(mesh)
    return [tuple(alike) for alike in kinds.values()]


def _with_chunks(
    found: list[tuple[Mesh, ...]], step: StepSettings
) -> Iterator[tuple[tuple[Mesh, ...], StepSettings]]:
    """The meshes with the settings that they are predicted with. Of several chunks: stages hold so many, and,
    where no schedule is asked for, one each as well; what has no stages holds one."""
    one = replace(step, chunks=1, schedule=None if step.schedule == Schedule.INTERLEAVED else step.schedule)
    for alike in found:
        staged = tuple(mesh for mesh in alike if mesh.stages > 1)
        if step.chunks == 1:
            yield alike, step
            continue
        plain = alike if step.schedule is None else tuple(mesh for mesh in alike if mesh.stages == 1)
        if plain:
            yield plain, one
        if staged:
            yield staged, step


def run_task(task: SweepTask) -> SweepResult:
    """In a process of its own: traces what it must, and predicts every point."""
    wanted, refused = _wanted(task)
    programs = _Programs(task, tuple(sorted({size for _, size, _ in wanted})))
    points = []
    for mesh, size, count in wanted:
        setup = replace(task.setup, mesh=mesh, micro_batches=count)
        try:
            # what can't be is told by any size's program, before another one is traced
            check_setup(programs.any_of(size), task.machine, setup)
            program = programs.at(size)
        except InputError as error:
            refused[_of_all_sizes(str(error))] += 1
            continue
        found = predict(program, task.machine, setup)
        points.append(
            SweepPoint(
                programs.label,
                mesh.axes,
                size,
                count,
                found.tokens,
                found.step_s,
                found.terms,
                found.memory,
                setup.chunks,
            )
        )
    return SweepResult(programs.label, tuple(points), tuple(refused.items()), programs.traces)


def _wanted(task: SweepTask) -> tuple[list[tuple[Mesh, int, int]], Counter[str]]:
    """(mesh, size of a micro-batch, number of them), and why others aren't."""
    wanted, refused, step = [], Counter[str](), task.case.step
    is_mixed = step.param_dtype is not None or step.reduce_dtype is not None
    for mesh in task.meshes:
        for size in task.sizes:
            at_once = mesh.data_parallel * size
            if is_mixed and SHARDS_AXIS not in dict(mesh.axes):
                refused[
                    "--param-dtype and --reduce-dtype are FSDP's mixed precision, and the mesh has no fsdp "
                    "axis"
                ] += 1
            elif step.batch % at_once:
                refused[
                    f"--batch {step.batch} can't be cut into equal micro-batches of each data-parallel rank"
                ] += 1
            else:
                count = step.batch // at_once or _unasked(task.setup, mesh)
                if (why := _not_run(replace(task.setup, mesh=mesh), count)) is not None:
                    refused[why] += 1
                else:
                    wanted.append((mesh, size, count))
    return wanted, refused


def _unasked(setup: Setup, mesh: Mesh) -> int:
    """Micro-batches where no batch says how many."""
    return setup.micro_batches if setup.micro_batches > 1 else mesh.stages


def _not_run(setup: Setup, micro_batches: int) -> str | None:
    """Why its schedule doesn't run so many, for all numbers alike."""
    pipeline = setup.pipeline()
    if pipeline.stages == 1 or pipeline.runs(micro_batches):
        return None
    return (
        f"--schedule {pipeline.schedule} wants {pipeline.wants}; another --batch or --micro-batches has them"
    )


def _of_all_sizes(reason: str) -> str:
    """The tracer's own words, without what differs from point to point."""
    return shown(reason, 200)


class _Programs:
    """The Programs of a task's micro-batches: few are traced. Raises ModelError and PlanError for names that
    mean nothing."""

    def __init__(self, task: SweepTask, sizes: tuple[int, ...]) -> None:
        from shardwise.models.source import find_model
        from shardwise.parallel.plans import load_any_plan

        self.task = task
        (name,) = task.case.plans
        self._source = find_model(task.case.model)
        self._plan = load_any_plan(
            name,
            sequence_parallel=task.case.sequence_parallel,
            family=self._source.family,
            context_attention=task.case.context_attention,
        )
        self.traces = 0
        self.label = name
        self._found: dict[int, Program] = {}
        self._family: Family | None = None
        self._failed: InputError | None = None
        # a family takes two traces
        self._derives = sum(size >= SHORT for size in sizes) > LONG - SHORT + 1

    def at(self, size: int) -> Program:
        """Raises what the tracer raises, each time."""
        if self._failed is not None:
            raise self._failed
        if size not in self._found:
            try:
                self._found[size] = (
                    self._derived(size) if size >= SHORT and self._derives else self._traced(size)
                )
            except InputError as error:
                self._failed = error
                raise
            self.label = self._found[size].plan
        return self._found[size]

    def any_of(self, size: int) -> Program:
        """One that is there already, else that of `size`."""
        return next(iter(self._found.values())) if self._found else self.at(size)

    def _derived(self, size: int) -> Program:
        try:
            if self._family is None:
                self._family = Family(self._traced(SHORT), self._traced(LONG))
            return self._family.at(size)
        except NotAFamilyError:
            self._derives = False
            return self._traced(size)

    def _traced(self, size: int) -> Program:
        task, mesh = self.task, self.task.meshes[0]
        self.traces += 1
        part = replace(micro_batch(task.case.step, mesh), batch=size)
        return trace_program(
            self._source, self._plan, mesh, part, task.case.text, task.machine.device, silent
        )
