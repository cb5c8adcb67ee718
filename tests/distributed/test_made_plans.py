"""The plans that are made for models of a user's own, one for each ingredient and ten that mix them, are
right to the last gradient on 2 and 4 ranks, over two steps; and a fault in one is refused before anything
runs, or found and named. One launch per number of ranks. And their checkpoints, in a launch of four."""

import json
from functools import lru_cache

import pytest
import torch

from shardwise.core.errors import PlanError
from shardwise.core.made_plan import MadePlan
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verdict, Verification
from shardwise.launch import run_ranks
from shardwise.models.source import find_model
from shardwise.parallel.resolve import resolve
from shardwise.planner.make import Wish, make_plan
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify
from tests.distributed.made_faults import Fault, faults
from tests.distributed.made_plans_workers import small_one
from tests.distributed.mixed_modules import MIXES
from tests.distributed.own_modules_cases import CASES, TELLING
from tests.matrix import FULL, thinned

MODELS = {case.name: f"tests.distributed.own_modules_cases:case_{at}" for at, case in enumerate(CASES)} | {
    words: f"tests.distributed.mixed_modules:{name}" for name, words in MIXES.items()
}
SHARES = {
    # positions as a parameter of the model itself, which a slice takes by rows
    "positions as a parameter of the model": 0.82,
    MIXES["gpt2"]: 0.79,
}


@lru_cache
def made(name: str, tp: int) -> MadePlan:
    return make_plan(find_model(MODELS[name]), Wish(Mesh.parse(f"tp={tp}")))


@lru_cache
def planted(name: str) -> tuple[tuple[Fault, str], ...]:
    """(a fault in the plan for two ranks, why it is refused or nothing)"""
    model = find_model(MODELS[name]).build(dtype=torch.float64)
    found = []
    for fault in faults(made(name, 2).plan):
        why = ""
        try:
            resolve(model, fault.plan, tp=2)
        except PlanError as error:
            why = str(error)
        found.append((fault, why))
    return tuple(found)


def is_telling(tp: int, name: str) -> bool:
    """What a hand-written plan of test_own_modules.py proves in `make test` needs no made one there; of those
    that mix ingredients, every second one does."""
    return tp == 2 and name not in TELLING and name not in tuple(MIXES.values())[1::2]


def taken(name: str) -> list[Fault]:
    return [fault for fault, why in planted(name) if not why]


def is_mixed(name: str) -> bool:
    return name in MIXES.values()


def later(name: str) -> list[Fault]:
    """The faults that `make test-all` proves."""
    return taken(name)[is_mixed(name) :]


@lru_cache
def found(tp: int, *, telling: bool) -> dict[str, Verification]:
    """Of each made plan of the telling ones or the rest, and of the first fault in those that mix
    ingredients."""
    claims = []
    for name, model in MODELS.items():
        if is_telling(tp, name) is not telling:
            continue
        claims.append(Claim.of(model, made(name, tp).plan))
        if tp == 2 and is_mixed(name):
            claims.append(Claim.of(model, taken(name)[0].plan))
    return proved(claims, tp)


@lru_cache
def found_too() -> dict[str, Verification]:
    """Of the other faults."""
    return proved([Claim.of(MODELS[name], each.plan) for name in MODELS for each in later(name)], 2)


def proved(claims: list[Claim], tp: int) -> dict[str, Verification]:
    return {each.plan: each for each in verify(claims, mesh=Mesh.parse(f"tp={tp}"), timeout_s=300)}


@pytest.mark.parametrize(
    ("tp", "name"), thinned([(tp, name) for tp in (2, 4) for name in MODELS], is_telling)
)
def test_a_model_under_its_made_plan_trains_as_the_unsharded_one(tp: int, name: str) -> None:
    each = found(tp, telling=is_telling(tp, name))[made(name, tp).plan.name]
    assert each.verdict is Verdict.RIGHT, each
    assert each.proof is not None
    assert each.proof.steps == 2
    assert each.proof.worst_gradient_error < 1e-9
    assert each.proof.weights_error is not None
    assert each.proof.weights_error < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_nearly_all_of_it_is_cut_and_the_sequence_too(name: str) -> None:
    one = made(name, 2)
    assert one.sharded >= SHARES.get(name, 0.95)
    assert one.sharded < SHARES.get(name, 0.95) + 0.05
    assert one.sequence is not None


@pytest.mark.parametrize("name", thinned(MIXES.values(), lambda name: is_telling(2, name)))
def test_a_fault_in_a_made_plan_is_found_and_named(name: str) -> None:
    is_named(taken(name)[0], found(2, telling=is_telling(2, name)))


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_every_fault_in_a_made_plan_is_found_and_named(name: str) -> None:
    for fault in later(name):
        is_named(fault, found_too())


def is_named(fault: Fault, answers: dict[str, Verification]) -> None:
    each = answers[fault.plan.name]
    assert each.verdict in (Verdict.WRONG, Verdict.CRASHES), each
    is_crash = each.verdict is Verdict.CRASHES
    assert any(fault.is_told_by(finding.subject, is_crash=is_crash) for finding in each.findings), each


@pytest.mark.parametrize("name", MODELS)
def test_a_fault_that_needs_no_proof_is_refused_in_a_line_that_names_its_rule(name: str) -> None:
    refused = [(fault, why) for fault, why in planted(name) if why]
    assert refused
    for fault, why in refused:
        assert "\n" not in why
        names = [word.strip('",.:;') for word in why.split()]
        assert any(fault.is_told_by(each) for each in names) or fault.pattern in names, why


KEPT = ("hf:phi3", "hf:gpt2", MODELS[MIXES["named"]])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, bool]]]:
    pytest.importorskip("transformers")
    plans = {
        name: {tp: make_plan(small_one(name), Wish(Mesh.parse(f"tp={tp}"))).to_toml() for tp in (2, 4)}
        for name in KEPT
    }
    payload = json.dumps([str(tmp_path_factory.mktemp("checkpoints")), plans]).encode()
    entry = "tests.distributed.made_plans_workers:run"
    results = run_ranks(entry, payload, world_size=4, device_type="cpu", timeout_s=200)
    return [json.loads(result) for result in results]


@FULL
@pytest.mark.parametrize("name", KEPT)
def test_a_checkpoint_of_a_made_plan_is_the_models_own_at_any_tp_size(
    kept: list[dict[str, dict[str, bool]]], name: str
) -> None:
    for outcome in kept:
        assert len(outcome[name]) == 5
        assert [what for what, holds in outcome[name].items() if not holds] == []
