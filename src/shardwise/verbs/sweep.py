"""`shardwise predict --sweep`: every mesh, number of stages and micro-batch on a number of devices. Few Programs are traced, the others derived."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shardwise.core.case import StepSettings
from shardwise.core.errors import InputError, OptionError
from shardwise.core.machine import Machine
from shardwise.core.mesh import SHARDS_AXIS, Mesh, Role
from shardwise.core.prediction import Setup
from shardwise.core.program import Program
from shardwise.core.shown import shown
from shardwise.core.sweep import Refusal, Sweep, SweepPoint
from shardwise.launch.workers import on_processes
from shardwise.predict.check import check_devices, check_setup
from shardwise.predict.contrast import facts_of
from shardwise.predict.family import LONG, SHORT, Family, NotAFamilyError
from shardwise.predict.predict import predict
from shardwise.predict.sweep import best_first, meshes, shares_programs
from shardwise.verbs.programs import MicroBatch, trace_program

MOST_DEVICES = 1_000_000
MOST_POINTS = 20_000
MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class SweepTask:
    """One plan on meshes that share their Programs.

    batch: of the whole step, or None where each point has `setup.micro_batches`. micro_batches: sizes.
    """

    model: str
    plan: str
    sequence_parallel: bool
    micro_batch: MicroBatch
    micro_batches: tuple[int, ...]
    batch: int | None
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
    asked: SweepTask,
    plans: Sequence[str],
    devices: int,
    progress: Callable[[int, int, str], None],
    *,
    workers: int | None = None,
) -> Sweep:
    """asked: without plan and meshes. Raises InputErrors of the model or a plan that hold for every mesh, OptionError,
    RunError."""
    if not 1 <= devices <= MOST_DEVICES:
        raise OptionError(f"--devices {devices}: use 1 to {MOST_DEVICES:,}.")
    machine, context = asked.machine, asked.setup.context
    if asked.setup.mesh is not None and asked.setup.mesh.world_size > context:
        raise OptionError(
            f"--mesh {asked.setup.mesh}: a sweep goes over all axes but cp. Give cp alone, or leave it out."
        )
    check_devices(machine, Mesh.of({Role.CUTS_TENSORS: devices}))
    if devices % context:
        raise OptionError(f"--devices {devices} can't be cut into cp={context}. Use a multiple of it.")
    all_meshes = meshes(devices, machine.devices_per_node, context)
    count = len(all_meshes) * len(plans) * len(asked.micro_batches)
    if count > MOST_POINTS:
        raise OptionError(
            f"--sweep: is over {count:,} points; at most {MOST_POINTS:,}. Give fewer plans or --micro-batches."
        )
    kinds: dict[object, list[Mesh]] = {}
    for mesh in all_meshes:
        kinds.setdefault(shares_programs(mesh), []).append(mesh)
    tasks = [replace(asked, plan=plan, meshes=tuple(alike)) for plan in plans for alike in kinds.values()]
    # those that take longest first, so that no process ends long before the other
    tasks.sort(key=lambda task: -len(task.meshes))
    points: list[SweepPoint] = []
    refused: Counter[tuple[str, str]] = Counter()
    traces = 0
    progress(0, len(tasks), "tracing and predicting")
    for done, result in enumerate(
        on_processes(run_task, tasks, workers or min(len(tasks), os.cpu_count() or 1)), 1
    ):
        points += result.points
        refused.update({(result.plan, reason): number for reason, number in result.refused})
        traces += result.traces
        progress(done, len(tasks), "tracing and predicting")
    settings = StepSettings(
        asked.batch or 0,
        asked.micro_batch.seq * context,
        dtype=asked.micro_batch.dtype,
        param_dtype=asked.micro_batch.param_dtype,
        reduce_dtype=asked.micro_batch.reduce_dtype,
        recompute=asked.micro_batch.recompute,
    )
    refusals = tuple(Refusal(plan, reason, number) for (plan, reason), number in refused.items())
    return Sweep(
        asked.model, facts_of(machine), devices, settings, asked.setup, best_first(points), refusals, traces
    )


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
                programs.label, mesh.axes, size, count, found.tokens, found.step_s, found.terms, found.memory
            )
        )
    return SweepResult(programs.label, tuple(points), tuple(refused.items()), programs.traces)


def _wanted(task: SweepTask) -> tuple[list[tuple[Mesh, int, int]], Counter[str]]:
    """(mesh, size of a micro-batch, number of them), and why others aren't."""
    found, refused = [], Counter[str]()
    is_mixed = task.micro_batch.param_dtype is not None or task.micro_batch.reduce_dtype is not None
    for mesh in task.meshes:
        for size in task.micro_batches:
            if is_mixed and SHARDS_AXIS not in dict(mesh.axes):
                refused[
                    "--param-dtype and --reduce-dtype are FSDP's mixed precision, and the mesh has no fsdp axis"
                ] += 1
            elif task.batch is None:
                found.append((mesh, size, task.setup.micro_batches))
            elif task.batch % (mesh.data_parallel * size):
                refused[
                    f"--batch {task.batch} can't be cut into equal micro-batches of each data-parallel rank"
                ] += 1
            else:
                found.append((mesh, size, task.batch // (mesh.data_parallel * size)))
    return found, refused


def _of_all_sizes(reason: str) -> str:
    """The tracer's own words, without what differs from point to point."""
    return shown(reason, 200)


class _Programs:
    """The Programs of a task's micro-batches: few are traced. Raises ModelError and PlanError for names that mean nothing."""

    def __init__(self, task: SweepTask, sizes: tuple[int, ...]) -> None:
        from shardwise.models.source import find_model
        from shardwise.parallel.plans import load_any_plan

        self.task = task
        self._source = find_model(task.model)
        self._plan = load_any_plan(
            task.plan, sequence_parallel=task.sequence_parallel, family=self._source.family
        )
        self.traces = 0
        self.label = task.plan
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
        task = self.task
        self.traces += 1
        micro_batch = replace(task.micro_batch, batch=size)
        return trace_program(
            self._source, self._plan, task.meshes[0], micro_batch, task.machine.device, lambda _: None
        )
