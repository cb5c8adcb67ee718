"""Where a part of the layers runs again in the backward: the Program from few layers of each kind is the one
from all of them, item by item, with its memory; which layers they are; and what can't be put together so."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from shardwise.core.case import StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.layer_name import layer_index
from shardwise.core.mesh import Mesh
from shardwise.core.pipeline import Pipeline
from shardwise.core.plan import Family
from shardwise.core.prediction import Setup
from shardwise.core.program import Op, Phase, Program, memory_peak
from shardwise.models.gpt import GPTConfig
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.parallel.plans import load_any_plan
from shardwise.predict.check import check_setup
from shardwise.predict.machines import load_machine
from shardwise.trace.trace import trace
from shardwise.trace.two_kinds import blocks_of_two_kinds, but_for_which, of_two_kinds
from tests.matrix import thinned

LLAMA, GPT = Family.LLAMA, Family.GPT
Case = tuple[str, str, Family, str, int, dict[str, Any]]
# plan, mesh, family, recompute, of how many layers, other settings
CASES: list[Case] = [
    ("rowwise", "tp=2", LLAMA, "full", 4, {}),
    ("rowwise", "fsdp=2,tp=2", LLAMA, "full", 1, {}),
    ("rowwise", "fsdp=2,tp=2", LLAMA, "full", 6, {"accumulation": 2, "reshard_after_forward": False}),
    ("colwise", "tp=2", LLAMA, "selective-ops", 9, {}),
    ("rowwise@dtensor", "fsdp=2,tp=2", LLAMA, "selective-ops", 3, {"param_dtype": "bfloat16"}),
    ("rowwise", "dp=2,tp=2", GPT, "full", 5, {}),
    ("routed", "tp=2", LLAMA, "full", 2, {}),
]
TELLING = {
    ("fsdp=2,tp=2", 6),
    ("dp=2,tp=2", 5),
}  # of both engines test_equal_layers.py has layers of one kind


def spec_of(family: Family, layers: int) -> ModelSpec:
    config = (
        LlamaConfig(96, 48, layers, 4, 2, 64)
        if family is LLAMA
        else GPTConfig(96, 48, layers, 4, 64, 20, tied=True)
    )
    return ModelSpec("tiny", config, "")


@cache
def traced(
    plan: str, mesh: str, family: Family = LLAMA, layers: int = 10, rank: int = 0, **settings: Any
) -> Program:
    compress = settings.pop("compress", True)
    made = load_any_plan(plan, sequence_parallel=True, family=family)
    step = StepSettings(4, 16, **settings)
    return trace(
        spec_of(family, layers), made, Mesh.parse(mesh), step, device="cuda", rank=rank, compress=compress
    )


def running_again(program: Program) -> list[int]:
    """Numbers of the layers that do."""
    layers = {layer_index(op.module, "layers") for op in program.ops() if op.phase is Phase.RECOMPUTE}
    return sorted(layer for layer in layers if layer is not None)


def assert_same(short: Program, whole: Program) -> None:
    assert (short.compressed, whole.compressed) == (True, False)
    for index, (one, other) in enumerate(zip(short.items(), whole.items(), strict=False)):
        assert but_for_which(one) == but_for_which(other), f"item {index}"
    assert len(list(short.items())) == len(list(whole.items()))
    assert (short.holdings, short.resident) == (whole.holdings, whole.resident)
    assert short.settings == whole.settings
    assert memory_peak(short) == memory_peak(whole)


@pytest.mark.parametrize(
    ("plan", "mesh", "family", "recompute", "recomputed", "more"),
    thinned(CASES, lambda *case: (case[1], case[4]) in TELLING),
)
def test_few_layers_of_each_kind_give_the_program_of_all(
    plan: str, mesh: str, family: Family, recompute: str, recomputed: int, more: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"recompute": recompute, "recompute_layers": recomputed} | more
    short, whole = (traced(plan, mesh, family, compress=compress, **settings) for compress in (True, False))
    assert running_again(whole) == list(range(recomputed))
    assert_same(short, whole)


STAGES: list[tuple[str, str, int, int, int, dict[str, Any], list[int]]] = [
    ("unsharded", "pp=2", 12, 0, 5, {}, [0, 1, 2]),
    ("rowwise", "pp=2,fsdp=2,tp=2", 12, 5, 1, {}, [6]),
    ("unsharded", "pp=2", 20, 1, 9, {"chunks": 2}, [5, 6, 7, 15, 16, 17]),
]


@pytest.mark.parametrize(
    ("plan", "mesh", "layers", "rank", "recomputed", "more", "expected"),
    thinned(STAGES, lambda *case: case[0] == "unsharded" and not case[5]),
)
def test_a_stage_s_chunks_run_their_first_layers_again(
    plan: str, mesh: str, layers: int, rank: int, recomputed: int, more: dict[str, Any], expected: list[int]
) -> None:
    settings: dict[str, Any] = {"recompute": "full", "recompute_layers": recomputed, "accumulation": 2} | more
    short, whole = (
        traced(plan, mesh, layers=layers, rank=rank, compress=compress, **settings)
        for compress in (True, False)
    )
    assert running_again(whole) == expected
    assert_same(short, whole)


@pytest.mark.parametrize("recomputed", thinned((1, 2, 9), lambda recomputed: recomputed == 1))
def test_the_programs_of_none_and_of_all_give_that_of_any_number_of_layers(recomputed: int) -> None:
    plain = traced("rowwise", "fsdp=2,tp=2")
    again = traced("rowwise", "fsdp=2,tp=2", recompute="full")
    expected = traced("rowwise", "fsdp=2,tp=2", recompute="full", recompute_layers=recomputed)
    made = of_two_kinds(plain, again, recomputed, Pipeline(1))
    assert [*map(but_for_which, made.items())] == [*map(but_for_which, expected.items())]
    assert replace(made, blocks=()) == replace(expected, blocks=())


def test_stages_have_their_first_layers_of_the_kind_that_runs_again() -> None:
    plain = traced("rowwise", "fsdp=2,tp=2")
    again = traced("rowwise", "fsdp=2,tp=2", recompute="full")
    staged = of_two_kinds(plain, again, 5, Pipeline(2, layers=(4, 6)))
    assert running_again(staged) == [0, 1, 4, 5, 6]
    with pytest.raises(OptionError, match=r"--recompute-layers 11: tiny has 10 layers\. Use 1 to 10"):
        of_two_kinds(plain, again, 11, Pipeline(1))


def test_a_program_of_other_stages_is_refused_by_predict() -> None:
    plain, again = (traced("rowwise", "tp=2"), traced("rowwise", "tp=2", recompute="full"))
    machine, staged = load_machine("h100-sxm-80gb"), Setup(Mesh.parse("pp=2,tp=2"), 2)
    check_setup(of_two_kinds(plain, again, 4, Pipeline(2)), machine, staged)
    with pytest.raises(OptionError) as raised:
        check_setup(of_two_kinds(plain, again, 4, Pipeline(1)), machine, staged)
    assert str(raised.value) == (
        "--recompute-layers 4: the program was traced for stages that deal its layers otherwise, so that "
        "others run again. Trace it on this mesh."
    )


def test_all_layers_named_by_their_number_are_all_layers() -> None:
    by_number = traced("rowwise", "tp=2", recompute="full", recompute_layers=10)
    every = traced("rowwise", "tp=2", recompute="full")
    assert replace(by_number, settings=every.settings) == every


def test_what_the_small_trace_doesn_t_bear_out_is_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made = blocks_of_two_kinds

    def without_an_op(*given: Any) -> Sequence[Any]:
        first, *others = made(*given)
        at = next(index for index, item in enumerate(first.items) if isinstance(item, Op))
        return (replace(first, items=first.items[:at] + first.items[at + 1 :]), *others)

    monkeypatch.setattr("shardwise.trace.trace.blocks_of_two_kinds", without_an_op)
    messages: list[str] = []
    program = trace(
        spec_of(LLAMA, 6),
        builtin_plan("rowwise"),
        Mesh.parse("tp=2"),
        StepSettings(4, 16, recompute="full", recompute_layers=3),
        progress=messages.append,
    )
    assert not program.compressed
    why = "what a layer runs depends on whether the one beside it runs again"
    assert f"layers don't repeat: {why}" in messages


def test_more_layers_than_there_are_is_one_line() -> None:
    with pytest.raises(OptionError) as raised:
        traced("rowwise", "tp=2", recompute="full", recompute_layers=11)
    assert str(raised.value) == (
        "--recompute-layers 11: tiny has 10 layers. Use 1 to 10, or leave it out for all of them."
    )
    with pytest.raises(OptionError) as raised:
        StepSettings(recompute_layers=3)
    assert str(raised.value) == (
        "--recompute-layers 3: says how many layers --recompute is for. Add --recompute selective-ops or "
        "full, or leave it out."
    )
    with pytest.raises(OptionError, match=r"--recompute-layers is 0\. Use 1 or more\."):
        StepSettings(recompute="full", recompute_layers=0)
