"""The museum (museum/README.md): each exhibit's metadata; the plain script's verdict on it, before and after;
and what verify says of some of them. Two launches of ranks."""

import re

import pytest

from benchmarks.museum import claims_of, judgement
from benchmarks.museum_ranks import Held, held
from museum import judge
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verification
from shardwise.verify.run import verify

EXHIBITS = {each.number: each for each in judge.exhibits()}
KEYS = {"number", "title", "sources", "symptom", "axis", "mesh", "kind", "wrong", "reason", "before", "after"}
# of each kind of reason that a model, and a step, can show
TELLING = (2, 3, 8, 14, 15, 19, 24)
TELLING_STEPS = (28, 29, 31, 33, 35, 38, 46, 49, 50, 51)


def test_every_exhibit_says_where_it_was_reported_and_what_is_wrong() -> None:
    assert len(EXHIBITS) >= 25
    for exhibit in EXHIBITS.values():
        assert set(exhibit.about) - {"batch"} == KEYS
        assert exhibit.about["kind"] in ("model", "step")
        assert exhibit.module.startswith(f"museum.exhibits.e{exhibit.number:02}_")
        public = [each for each in exhibit.about["sources"] if re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", each)]
        assert public or "No public report was found" in exhibit.about["symptom"]


def test_numbers_have_no_gaps() -> None:
    assert list(EXHIBITS) == list(range(1, len(EXHIBITS) + 1))


def test_every_axis_is_there() -> None:
    axes = {exhibit.about["axis"] for exhibit in EXHIBITS.values()}
    assert {"tp", "dp", "fsdp", "cp", "ep", "pp", "rng"} <= axes


@pytest.fixture(scope="module")
def found() -> dict[str, Verification]:
    claims = [claim for number in TELLING for claim in claims_of(EXHIBITS[number])]
    answers = verify(claims, mesh=Mesh.parse("tp=2"), timeout_s=60)
    return {answer.plan: answer for answer in answers}


@pytest.mark.parametrize("number", TELLING)
def test_a_fault_is_found_and_named_and_its_mended_twin_is_right(
    number: int, found: dict[str, Verification]
) -> None:
    answer = judgement(EXHIBITS[number], found[f"{number} before"], found[f"{number} after"])
    assert answer.is_found
    assert answer.is_named, answer.said
    assert answer.is_reason_right, answer.said
    assert not answer.said_of_after


@pytest.fixture(scope="module")
def held_steps() -> dict[tuple[int, str], Held]:
    return held([EXHIBITS[number] for number in TELLING_STEPS])


@pytest.mark.parametrize("number", TELLING_STEPS)
def test_a_fault_of_a_whole_step_is_found_and_named_and_its_mended_twin_is_right(
    number: int, held_steps: dict[tuple[int, str], Held]
) -> None:
    before, after = (held_steps[number, variant].verification for variant in ("before", "after"))
    answer = judgement(EXHIBITS[number], before, after)
    assert answer.is_found
    assert answer.is_named, answer.said
    assert answer.is_reason_right, answer.said
    assert not answer.said_of_after


@pytest.mark.full
def test_the_plain_script_finds_every_before_wrong_and_every_after_right() -> None:
    wanted = [(exhibit, variant) for exhibit in EXHIBITS.values() for variant in ("before", "after")]
    answers = judge.judged(wanted)
    assert [each.is_wrong for each in answers] == [variant == "before" for _, variant in wanted]
