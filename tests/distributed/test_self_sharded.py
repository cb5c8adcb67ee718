"""A model that shards itself may tell more than its DTensors do: how plain tensors lie, what is called after
the backward, its own clipping, and how ids become logits."""

from dataclasses import replace
from pathlib import Path

import pytest

from shardwise import SelfSharded
from shardwise.core.errors import ModelError
from shardwise.core.finding import Cause, FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.program import Collective, Phase
from shardwise.core.verification import Verdict, Verification
from shardwise.models.self_sharded import module_of
from shardwise.models.source import find_model
from shardwise.trace.trace import trace
from shardwise.verify.claim import Claim
from shardwise.verify.run import SETTINGS, verify
from tests.distributed.self_sharded_models import Model
from tests.distributed.test_any_model import compared
from tests.matrix import FULL

MODELS = "tests.distributed.self_sharded_models:"
RIGHT = ("right", "summed_by_hooks", "told_as_summands", "two_meshes")
WRONG = ("summed_by_nobody", "clipped_as_if_cut", "told_the_other_dim", "fails_after_the_backward")


@pytest.fixture(scope="module")
def found() -> dict[str, Verification]:
    claims = [Claim(MODELS + name, "own", name) for name in (*RIGHT, *WRONG)]
    return {each.plan: each for each in verify(claims, mesh=Mesh.parse("tp=2"))}


@pytest.fixture(scope="module")
def on_fsdp() -> Verification:
    (only,) = verify(
        [Claim(MODELS + "right_under_fsdp", "own", "right")],
        mesh=Mesh.parse("fsdp=2,tp=2"),
        settings=replace(SETTINGS, recompute="full"),
    )
    return only


@pytest.mark.parametrize("name", RIGHT)
def test_what_a_framework_does_beside_its_dtensors_is_done_in_its_place(
    found: dict[str, Verification], name: str
) -> None:
    each = found[name]
    assert each.verdict is Verdict.RIGHT, each
    assert each.proof is not None
    assert each.proof.steps == 2
    assert each.proof.worst_gradient_error < 1e-7
    assert each.proof.norm_error is not None
    assert each.proof.norm_error < 1e-12
    assert each.proof.parameters_compared == (4 if name == "two_meshes" else 12)


def test_gradients_that_fsdp_adds_over_its_replicas_are_added_once() -> None:
    (only,) = verify(
        [Claim(MODELS + "with_replicas", "own", "replicas")],
        mesh=Mesh.parse("dp=2,fsdp=2"),
        settings=replace(SETTINGS, batch=4),
    )
    assert only.verdict is Verdict.RIGHT, only
    assert only.proof is not None
    assert only.proof.worst_gradient_error < 1e-7


def test_what_nobody_sums_is_found_in_plain_parameters(found: dict[str, Verification]) -> None:
    each = found["summed_by_nobody"]
    assert {finding.subject for finding in each.wrong} == {"layers.0.norm.gain", "layers.1.norm.gain"}
    assert {finding.cause for finding in each.wrong} == {Cause.PARTS_NOT_SUMMED}


def test_clipping_of_its_own_that_counts_twice_is_found(found: dict[str, Verification]) -> None:
    (finding,) = found["clipped_as_if_cut"].wrong
    assert (finding.kind, finding.subject) == (FindingKind.WEIGHTS_DIFFER, "gradient norm")


def test_placements_that_a_parameter_has_not_are_refused(found: dict[str, Verification]) -> None:
    assert found["told_the_other_dim"].note == (
        f'model "{MODELS}told_the_other_dim": layers.0.up.weight is [8, 16] on a rank; as S(1) of [15, 16] '
        "over mesh tp=2 it would be [15, 8]. Tell the placements that it has."
    )


def test_a_fault_in_what_is_called_after_the_backward_is_told_as_such(found: dict[str, Verification]) -> None:
    each = found["fails_after_the_backward"]
    assert each.note == "what is called after the backward raised ValueError: no bucket for gain."


@FULL
def test_fsdp_cuts_plain_parameters_further(on_fsdp: Verification) -> None:
    assert on_fsdp.verdict is Verdict.RIGHT, on_fsdp


def test_compare_and_explain_run_what_is_called_after_the_backward(tmp_path: Path) -> None:
    measured = compared(tmp_path, "own", model=MODELS + "right").measurements[0]
    assert measured.agreement is not None
    assert measured.agreement.agrees
    program = trace(find_model(MODELS + "right"), TheirPlan.OWN, Mesh.parse("tp=2"), SETTINGS)
    calls = [item for item in program.items() if isinstance(item, Collective)]
    assert sum(each.phase is Phase.REDUCE for each in calls) == 2
    assert {each.name: each.local_shape for each in program.holdings}["layers.0.up.weight"] == (8, 16)


def test_names_that_the_model_has_not_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r'"words.weights", which is no parameter. Did you mean "words.weight"\?'
    ):
        module_of(SelfSharded(Model(), placements={"words.weights": ()}), "mine")
