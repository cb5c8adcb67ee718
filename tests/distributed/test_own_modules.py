"""The native engine on modules of a user's own, whatever their classes: right plans are right to the last
gradient on 2 and 4 ranks, over two steps, and each planted fault is found; one launch per number of ranks.
And their checkpoints, FSDP2 above them, recomputed layers and dropout, in a launch of four for the telling
cases and one for the rest."""

import json
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest

from shardwise.core.finding import Finding, FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verdict, Verification
from shardwise.launch import run_ranks
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify
from tests.distributed.own_modules_cases import CASES, TELLING, TELLING_FAULTS, Case
from tests.distributed.own_modules_workers import KEPT_IN_PIECES, OVER_OTHERS
from tests.distributed.own_modules_workers import TELLING as TELLING_ON_FOUR
from tests.matrix import thinned

MODELS = "tests.distributed.own_modules_cases:case_"


@lru_cache
def found(tp: int, *, telling: bool) -> dict[str, Verification]:
    claims = []
    for index, case in enumerate(CASES):
        for with_fault in (False, True) if tp == 2 else (False,):
            if (case.name in (TELLING_FAULTS if with_fault else TELLING)) is not telling:
                continue
            plan = case.plan(with_fault=with_fault)
            claims.append(Claim(f"{MODELS}{index}", plan.to_toml(), plan.name))
    answers = verify(claims, mesh=Mesh.parse(f"tp={tp}"), timeout_s=300)
    return {answer.plan: answer for answer in answers}


@pytest.mark.parametrize(
    ("tp", "case"),
    thinned(
        [(tp, case) for tp in (2, 4) for case in CASES], lambda tp, case: tp == 2 and case.name in TELLING
    ),
    ids=lambda value: value.name if isinstance(value, Case) else f"tp={value}",
)
def test_a_model_with_modules_of_ones_own_trains_as_the_unsharded_one(tp: int, case: Case) -> None:
    each = found(tp, telling=case.name in TELLING)[case.name]
    assert each.verdict is Verdict.RIGHT, each
    assert each.proof is not None
    assert each.proof.steps == 2
    assert each.proof.worst_gradient_error < 1e-9
    assert each.proof.weights_error is not None
    assert each.proof.weights_error < 1e-9


@pytest.mark.parametrize(
    "case", thinned(CASES, lambda case: case.name in TELLING_FAULTS), ids=lambda case: case.name
)
def test_a_fault_that_the_engine_takes_is_found(case: Case) -> None:
    each = found(2, telling=case.name in TELLING_FAULTS)[case.plan(with_fault=True).name]
    assert each.verdict is Verdict.WRONG
    if not case.found_in:
        assert any(finding.kind is FindingKind.OUTPUT_DIFFERS for finding in each.findings)
        return
    assert all(_is_of(finding, case.found_in) for finding in each.findings)
    assert all(any(_is_of(finding, (name,)) for finding in each.findings) for name in case.found_in)


def _is_of(finding: Finding, names: tuple[str, ...]) -> bool:
    return finding.subject.endswith(names)


# in `make test` those whose weights lie in one, are transposed, or norm with 1 + weight
OF_TRANSFORMERS, OTHERS_OF_TRANSFORMERS = ("phi3", "gpt2", "gemma3_text"), ("llama", "qwen3")


@lru_cache
def of_transformers(names: tuple[str, ...]) -> dict[str, Verification]:
    claims = []
    for name in names:
        text = (Path(__file__).parent / "plans" / f"hf-{name}.toml").read_text()
        claims.append(Claim(f"hf:{name}", text, name))
    return {answer.plan: answer for answer in verify(claims, mesh=Mesh.parse("tp=2"), timeout_s=200)}


@pytest.mark.parametrize(
    "name", thinned((*OF_TRANSFORMERS, *OTHERS_OF_TRANSFORMERS), lambda name: name in OF_TRANSFORMERS)
)
def test_a_hugging_face_model_has_sequence_parallelism_behind_its_glue(name: str) -> None:
    pytest.importorskip("transformers")
    each = of_transformers(OF_TRANSFORMERS if name in OF_TRANSFORMERS else OTHERS_OF_TRANSFORMERS)[name]
    assert each.verdict is Verdict.RIGHT, each
    assert each.sharded is not None
    assert each.sharded.inner_share > 0.99


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], list[dict[str, Any]]]:
    """What four ranks answer of the telling cases, or of the rest."""

    @cache
    def answers(telling: bool) -> list[dict[str, Any]]:
        folder = str(tmp_path_factory.mktemp("checkpoints"))
        entry, payload = "tests.distributed.own_modules_workers:run", json.dumps([telling, folder])
        results = run_ranks(entry, payload.encode(), world_size=4, device_type="cpu", timeout_s=200)
        return [json.loads(result) for result in results]

    return answers


def tells(name: str) -> bool:
    return name in TELLING_ON_FOUR


@pytest.mark.parametrize("name", thinned(KEPT_IN_PIECES, tells))
def test_a_checkpoint_of_weights_in_pieces_is_the_models_own_at_any_tp_size(
    four: Callable[[bool], list[dict[str, Any]]], name: str
) -> None:
    for outcome in four(tells(name)):
        assert len(outcome[f"checkpoint {name}"]) == 10
        assert [what for what, holds in outcome[f"checkpoint {name}"].items() if not holds] == []
        assert outcome[f"filled {name}"]


@pytest.mark.parametrize("name", thinned(OVER_OTHERS, tells))
@pytest.mark.parametrize("what", ["fsdp", "recompute"])
def test_modules_of_ones_own_train_right_under_fsdp_and_with_recomputed_layers(
    four: Callable[[bool], list[dict[str, Any]]], name: str, what: str
) -> None:
    assert max(outcome[f"{what} {name}"] for outcome in four(tells(name))) < 1e-9


def test_ranks_that_are_seeded_differently_drop_alike(four: Callable[[bool], list[dict[str, Any]]]) -> None:
    for outcome in four(True):
        assert outcome["dropout"] == dict.fromkeys(("alike", "anew", "alone", "none in evaluation"), True)
