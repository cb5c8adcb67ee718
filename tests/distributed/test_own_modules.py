"""The native engine on modules of a user's own, whatever their classes: right plans are right to the last
gradient on 2 and 4 ranks, over two steps, and each planted fault is found; one launch per number of ranks."""

from functools import lru_cache

import pytest

from shardwise.core.finding import Finding, FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verdict, Verification
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify
from tests.distributed.own_modules import CASES, Case
from tests.matrix import thinned

MODELS = "tests.distributed.own_modules:case_"


@lru_cache
def found(tp: int) -> dict[str, Verification]:
    claims = []
    for index, case in enumerate(CASES):
        for with_fault in (False, True) if tp == 2 else (False,):
            plan = case.plan(with_fault=with_fault)
            claims.append(Claim(f"{MODELS}{index}", plan.to_toml(), plan.name))
    answers = verify(claims, mesh=Mesh.parse(f"tp={tp}"), timeout_s=300)
    return {answer.plan: answer for answer in answers}


@pytest.mark.parametrize(
    ("tp", "case"),
    thinned([(tp, case) for tp in (2, 4) for case in CASES], lambda tp, _: tp == 2),
    ids=lambda value: value.name if isinstance(value, Case) else f"tp={value}",
)
def test_a_model_with_modules_of_ones_own_trains_as_the_unsharded_one(tp: int, case: Case) -> None:
    each = found(tp)[case.name]
    assert each.verdict is Verdict.RIGHT, each
    assert each.proof is not None
    assert each.proof.steps == 2
    assert each.proof.worst_gradient_error < 1e-9
    assert each.proof.weights_error is not None
    assert each.proof.weights_error < 1e-9


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_that_the_engine_takes_is_found(case: Case) -> None:
    each = found(2)[case.plan(with_fault=True).name]
    assert each.verdict is Verdict.WRONG
    if not case.found_in:
        assert any(finding.kind is FindingKind.OUTPUT_DIFFERS for finding in each.findings)
        return
    assert all(_is_of(finding, case.found_in) for finding in each.findings)
    assert all(any(_is_of(finding, (name,)) for finding in each.findings) for name in case.found_in)


def _is_of(finding: Finding, names: tuple[str, ...]) -> bool:
    return finding.subject.endswith(names)
