"""Micro-batches under FSDP: gradients reduced in each or once, parameters kept or gathered again; in the
Program, and in what predict makes of one micro-batch's."""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh
from shardwise.core.op_names import FSDP_COPY_IN, FSDP_COPY_OUT
from shardwise.core.plan import TheirPlan
from shardwise.core.prediction import Setup, Term
from shardwise.core.program import Collective, Phase, Program, memory_peak
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.predict.layout import lay_out
from shardwise.predict.machines import load_machine
from shardwise.predict.memory import forecast
from shardwise.predict.predict import predict
from shardwise.trace.trace import trace
from shardwise.verbs.checks import check_fsdp
from tests.matrix import FULL, thinned

LAYERS, TIMES = 3, 3
SMALL = ModelSpec("small", LlamaConfig(300, 64, LAYERS, 4, 2, 160), "")
MESH = Mesh.parse("dp=2,fsdp=2,tp=2")
WAYS = [(True, False), (False, False), (True, True), (False, True)]


@cache
def traced(accumulation: int, reshard: bool, once: bool, mesh: Mesh = MESH) -> Program:
    """A micro-batch is two sequences on each data-parallel rank."""
    settings = StepSettings(
        2 * mesh.data_parallel * accumulation,
        64,
        accumulation=accumulation,
        reshard_after_forward=reshard,
        reduce_once=once,
    )
    plan = builtin_plan("rowwise") if mesh.tp > 1 else TheirPlan.UNSHARDED
    return trace(SMALL, plan, mesh, settings, device="cuda")


def counts(program: Program) -> Counter[tuple[str, str]]:
    return Counter(
        (str(each.call.kind), str(each.phase)) for each in program.collectives() if each.call.axis == "fsdp"
    )


@pytest.mark.parametrize(("reshard", "once"), thinned(WAYS, lambda reshard, once: reshard is not once))
def test_layers_are_gathered_again_for_the_backward_only_where_they_were_freed(
    reshard: bool, once: bool
) -> None:
    found = counts(traced(TIMES, reshard, once))
    units = LAYERS + 1
    assert found["all_gather", str(Phase.FORWARD)] == TIMES * units
    assert found["all_gather", str(Phase.BACKWARD)] == (TIMES * LAYERS if reshard else 0)
    assert found["reduce_scatter", str(Phase.BACKWARD)] == (1 if once else TIMES) * units


@pytest.mark.parametrize("schedule", [pytest.param("gpipe", marks=FULL), "1f1b"])
@pytest.mark.parametrize("stage", [0, 1])
def test_over_a_pipeline_parameters_that_are_kept_are_gathered_once_a_step(stage: int, schedule: str) -> None:
    mesh, units = Mesh.parse("pp=2,fsdp=2"), (3, 2)[stage]  # layers, and what lies outside
    for reshard in (True, False):
        settings = StepSettings(
            4 * TIMES, 64, accumulation=TIMES, reshard_after_forward=reshard, schedule=schedule, stages="2,1"
        )
        found = counts(trace(SMALL, TheirPlan.UNSHARDED, mesh, settings, device="cuda", rank=2 * stage))
        gathers = found["all_gather", str(Phase.FORWARD)] + found["all_gather", str(Phase.BACKWARD)]
        assert gathers > TIMES * units if reshard else gathers == units
        assert found["reduce_scatter", str(Phase.BACKWARD)] == TIMES * units


@pytest.mark.parametrize("reshard", [True, False])
def test_predict_counts_them_once_too(reshard: bool) -> None:
    one = traced(1, reshard, False, Mesh.parse("fsdp=2"))
    laid = lay_out(one, load_machine("h100-sxm-80gb"), Setup(Mesh.parse("pp=3,fsdp=2"), 8))
    found: Counter[str] = Counter()
    for work, times in laid.runs:
        for item in map(work.item, range(len(work))):
            found[str(item.call.kind) if isinstance(item, Collective) else item.name] += times
    # of the first stage, which is the busiest: its layer's, again where it was freed, and the table's
    assert found[FSDP_COPY_OUT] == (8 * (2 + 1) if reshard else 2)
    if not reshard:
        assert found["all_gather"] == found[FSDP_COPY_IN] == 2
    assert found["reduce_scatter"] == 8 * 2


@pytest.mark.parametrize(
    ("mesh", "reshard", "once"),
    thinned(
        [(mesh, *way) for mesh in (str(MESH), "fsdp=2") for way in WAYS],
        # each way in which the two differ on one mesh or the other
        lambda mesh, reshard, once: (reshard is not once) if mesh == str(MESH) else (reshard and once),
    ),
)
def test_the_memory_of_many_micro_batches_is_forecast_from_one(mesh: str, reshard: bool, once: bool) -> None:
    one, whole = (traced(times, reshard, once, Mesh.parse(mesh)) for times in (1, TIMES))
    machine = replace(load_machine("h100-sxm-80gb"), workspace_bytes=0.0)
    found = forecast(one, machine, Setup(None, TIMES)).active_bytes
    assert found == pytest.approx(memory_peak(whole).n_bytes, rel=0.03)


def test_gradients_that_are_reduced_once_cost_less_time_and_more_memory() -> None:
    each, once = (
        predict(traced(1, True, once), load_machine("h100-sxm-80gb"), Setup(None, 8))
        for once in (False, True)
    )
    assert dict(once.terms)[Term.DATA] < dict(each.terms)[Term.DATA]
    assert once.memory.active_bytes > each.memory.active_bytes
    alone = [
        lay_out(traced(1, True, once), load_machine("h100-sxm-80gb"), Setup()).parts for once in (False, True)
    ]
    assert alone[0] == alone[1]  # of one micro-batch, the last is the first


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"reduce_once": True},
            "--reduce-once: is what FSDP does, and mesh dp=2,tp=1 has no fsdp ranks. Add fsdp=2 or more, or "
            "leave it out.",
        ),
        (
            {"reshard_after_forward": False},
            "--no-reshard-after-forward: is what FSDP does, and mesh dp=2,tp=1 has no fsdp ranks. "
            "Add fsdp=2 or more, or leave it out.",
        ),
    ],
)
def test_what_fsdp_alone_does_is_refused_without_it(keys: dict[str, bool], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_fsdp(Case.of(model="llama3-debug", mesh="dp=2", batch=2, **keys))
    assert str(caught.value) == message
