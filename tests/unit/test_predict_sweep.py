"""What a sweep goes over, in which order it comes out, how it is shown; and processes that end with the
command."""

import importlib
import json
import os
import re
import signal
import time
from dataclasses import replace
from typing import Any

import psutil
import pytest
from rich.console import Console

from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import OptionError, PlanError, RunError
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import MemoryForecast, Setup, Term
from shardwise.core.sweep import Refusal, Sweep, SweepPoint
from shardwise.files.document import read_document, write_document
from shardwise.predict.machines import load_machine
from shardwise.predict.sweep import (
    all_meshes,
    best_first,
    meshes,
    over_nodes,
    shares_programs,
    why_no_tensor_ranks,
)
from shardwise.report.common.deliver import show
from shardwise.report.predict.sweep_html import sweep_html
from shardwise.verbs.sweep import _PRELOAD, SweepOptions, SweepTask, _wanted, _with_chunks, sweep
from shardwise.workers.processes import on_processes
from tests.unit.comparison_example import HOSTILE_MARKUP, HOSTILE_NAME
from tests.unit.prediction_example import MACHINE, MEMORY, TERMS, TOO_MUCH


def point(tokens: int, *, memory: MemoryForecast = MEMORY, plan: str = "rowwise") -> SweepPoint:
    return SweepPoint(
        plan, (("pp", 2), ("fsdp", 2), ("tp", 4)), 1, 4, tokens, 0.1, tuple(TERMS.items()), memory
    )


def sweep_of(*points: SweepPoint, refused: tuple[Refusal, ...] = (), model: str = "llama3-8b") -> Sweep:
    return Sweep(
        model, MACHINE, 16, StepSettings(0, 8192, dtype="bfloat16"), Setup(), best_first(points), refused, 3
    )


def hostile_sweep(text: str) -> Sweep:
    found = sweep_of(
        point(10, plan=text), point(20, plan=f"{text} 2"), refused=(Refusal(text, text, 3),), model=text
    )
    return replace(found, machine=replace(MACHINE, name=text, about=text))


def printed(sweep: Sweep, top: int = 20, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        show(sweep, "terminal", console, top)
    return captured.get()


def test_meshes_use_every_device_and_keep_tp_inside_a_node() -> None:
    for devices in (1, 8, 24, 512):
        found = meshes(devices, 8)
        assert all(mesh.world_size == devices for mesh in found)
        assert all(8 % mesh.tp == 0 for mesh in found)
        assert len(set(found)) == len(found)
    shared = meshes(32, 8, Mesh.parse("cp=2,ep=2"))
    kinds = {shares_programs(mesh)[0] for mesh in shared}
    assert kinds == {("fsdp", "ep"), ("dp", "ep"), ("dp", "fsdp", "ep")}
    assert {(mesh.context, mesh.size("ep"), mesh.world_size) for mesh in shared} == {(2, 2, 32)}
    assert {mesh.axes for mesh in meshes(8, 8) if mesh.stages == 1} == {
        (("fsdp", 8), ("tp", 1)), (("dp", 8), ("tp", 1)), (("fsdp", 4), ("tp", 2)), (("dp", 4), ("tp", 2)),
        (("fsdp", 2), ("tp", 4)), (("dp", 2), ("tp", 4)), (("tp", 8),),
        (("dp", 2), ("fsdp", 2), ("tp", 2)), (("dp", 2), ("fsdp", 4), ("tp", 1)),
        (("dp", 4), ("fsdp", 2), ("tp", 1)),
    }  # fmt: skip


def test_any_tp_goes_inside_one_node_and_those_that_would_lie_on_two_are_counted_with_their_reason() -> None:
    assert {mesh.tp for mesh in meshes(6, 8)} == {1, 2, 3, 6}
    assert over_nodes(6, 8) == {}
    assert {mesh.tp for mesh in meshes(24, 8)} == {1, 2, 4, 8}
    larger = [mesh for mesh in all_meshes(24) if mesh.tp > 8]
    assert over_nodes(24, 8) == {
        "tp is more than the 8 devices of a node": len(larger),
        "tp doesn't divide the 8 devices of a node: a group would lie on two": len(all_meshes(24))
        - len(meshes(24, 8))
        - len(larger),
    }
    assert {mesh.tp for mesh in larger} == {12, 24}
    assert why_no_tensor_ranks(5, 5, 8) is None
    assert why_no_tensor_ranks(5, 10, 8) is not None


def test_a_sweep_in_mixed_precision_leaves_out_meshes_without_fsdp() -> None:
    case = Case.of(model="m", mesh="tp=1", plans="p", seq=8, param_dtype="bfloat16", reduce_dtype="float32")
    task = SweepTask(case, (1, 2), meshes(4, 8), Setup(), load_machine("h100-sxm-80gb"))
    wanted, refused = _wanted(task)
    assert {shares_programs(mesh)[0] for mesh, _, _ in wanted} == {("fsdp",), ("dp", "fsdp")}
    ((reason, count),) = refused.items()
    assert "the mesh has no fsdp axis" in reason
    assert count + len(wanted) == 2 * len(task.meshes)


def test_a_sweep_leaves_out_what_a_pipeline_s_schedule_does_not_run() -> None:
    alike = meshes(4, 8)
    task = SweepTask(
        Case.of(model="m", mesh="tp=1", plans="p", seq=8, batch=2),
        (1,),
        alike,
        Setup(),
        load_machine("h100-sxm-80gb"),
    )
    wanted, refused = _wanted(task)
    assert {mesh.stages for mesh, _, count in wanted if count < mesh.stages} == set()
    assert refused[
        "--schedule 1f1b wants at least as many micro-batches as stages; another --batch or --micro-batches "
        "has them"
    ]
    unasked, none = _wanted(replace(task, case=Case.of(model="m", mesh="tp=1", plans="p", seq=8)))
    assert not none
    assert [count for mesh, _, count in unasked] == [mesh.stages for mesh, _, _ in unasked]


def test_with_chunks_pipelines_are_interleaved_and_1f1b_and_what_has_no_stages_is_there() -> None:
    alike = meshes(4, 8)
    staged = tuple(mesh for mesh in alike if mesh.stages > 1)
    others = tuple(mesh for mesh in alike if mesh.stages == 1)

    def swept(**changes: Any) -> list[tuple[tuple[Mesh, ...], int]]:
        step = StepSettings(8, 8, **changes)
        return [(some, each.chunks) for some, each in _with_chunks([alike], step)]

    assert swept() == [(alike, 1)]
    assert swept(schedule="gpipe") == [(alike, 1)]
    assert swept(chunks=2) == [(alike, 1), (staged, 2)]
    assert swept(chunks=2, schedule="interleaved") == [(others, 1), (staged, 2)]


def test_a_sweep_says_which_pipelines_run() -> None:
    two = replace(point(20), chunks=2)
    shown = " ".join(printed(sweep_of(point(10), two), width=200).split())
    assert "pp=2,fsdp=2,tp=4, 2 chunks" in shown
    assert "Pipelines run 1f1b or interleaved with 2 chunks a stage; layers are dealt evenly." in shown


def test_what_fits_comes_first_and_then_what_is_faster() -> None:
    slow, fast, unfit = point(10), point(20), point(1000, memory=TOO_MUCH)
    assert best_first([unfit, slow, fast]) == (fast, slow, unfit)


def test_the_table_has_the_best_and_says_what_it_leaves_out() -> None:
    sweep = sweep_of(
        *(point(100 + number) for number in range(30)),
        point(999, memory=TOO_MUCH),
        refused=(Refusal("rowwise", "no", 7),),
    )
    shown = printed(sweep, top=3)
    assert "Best of 31, of which 30 fit: pp=2,fsdp=2,tp=4, 1 x 4: 80.6 tokens/s per device" in " ".join(
        shown.split()
    )
    assert len(re.findall("^pp=2,fsdp=2,tp=4  ", shown, flags=re.MULTILINE)) == 3
    assert re.search("^28 more$", shown, flags=re.MULTILINE)
    assert "--top shows more rows" in " ".join(shown.split())
    assert "7 left out under rowwise: no" in shown
    assert "15 % tp sends" in shown
    assert re.search(r" no +15 % tp", printed(sweep, top=31))


def test_a_sweep_in_which_nothing_fits_says_so() -> None:
    assert "None of 1 ways to use 16 devices fits in their memory." in " ".join(
        printed(sweep_of(point(9, memory=TOO_MUCH))).split()
    )
    assert "Nothing could be predicted." in printed(sweep_of(refused=(Refusal("rowwise", "no", 7),)))


def test_json_round_trips() -> None:
    sweep = sweep_of(point(1), point(2), refused=(Refusal("rowwise", "no", 7),))
    assert read_document(write_document(sweep), Sweep) == sweep
    assert json.loads(write_document(sweep))["points"][0]["terms"][0] == ["matmul", TERMS[Term.MATMUL]]


@pytest.mark.parametrize("text", [HOSTILE_NAME, HOSTILE_MARKUP, "\x1b]0;gone\x07"])
def test_hostile_names_stay_text(text: str) -> None:
    assert "\x07" not in printed(hostile_sweep(text))
    page = sweep_html(hostile_sweep(text))
    assert page.count("<script") == 1
    assert "<img" not in page


def test_a_plan_that_nobody_knows_is_refused_before_a_process_starts() -> None:
    told: list[object] = []
    case = Case("llama3-debug", Mesh.parse("tp=1"), plans=("rowwise", "rowise"), step=StepSettings(0, 32))
    with pytest.raises(PlanError, match='Did you mean "rowwise"'):
        sweep(case, SweepOptions(2), progress=lambda *said: told.append(said))
    assert told == []


def test_what_a_sweep_s_processes_import_beforehand_is_there() -> None:
    """multiprocessing would pass over what isn't, and each process import it anew."""
    for name in _PRELOAD:
        importlib.import_module(name)


KILLED = "a process was killed. Try fewer."


def square(number: int) -> int:
    if number < 0:
        raise OptionError(f"{number} is negative")
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_tasks_on_processes_come_back_and_the_processes_end() -> None:
    assert sorted(on_processes(square, range(7), 2, KILLED)) == [0, 1, 4, 9, 16, 25, 36]
    assert not left_over()


def test_an_error_of_a_task_is_the_command_s_and_the_processes_end() -> None:
    with pytest.raises(OptionError, match="-1 is negative"):
        list(on_processes(square, [1, -1, 2], 2, KILLED))
    assert not left_over()


def test_a_process_that_is_killed_is_said_and_the_others_end() -> None:
    with pytest.raises(RunError, match="a process was killed"):
        list(on_processes(square, [1, 13, 2], 2, KILLED))
    assert not left_over()


def test_who_stops_early_leaves_no_process() -> None:
    results = on_processes(square, range(9), 2, KILLED)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert not left_over()


def left_over() -> list[psutil.Process]:
    """Spawned processes of this one that live on."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        found = [each for each in psutil.Process().children() if "spawn_main" in " ".join(each.cmdline())]
        if not found:
            return []
        time.sleep(0.1)
    return found
