"""Two verbs, one answer: what compare's check says of a plan is what verify says of it, on every mesh and
through the step that is timed. One launch for each number of ranks asks all of it."""

from dataclasses import replace
from functools import lru_cache

import msgspec
import pytest

from shardwise.core.case import StepSettings
from shardwise.core.finding import Cause, Finding
from shardwise.core.mesh import Mesh
from shardwise.core.plan import Plan, Rule, Style, StyleName
from shardwise.core.verification import Agreement, Verification
from shardwise.launch import run_ranks
from shardwise.measure.record import RankReport
from shardwise.parallel.builtin import builtin_plan
from shardwise.text.stream import load_tokens
from shardwise.verbs.compare_ranks import CompareJob, pack
from shardwise.verify.claim import Claim
from shardwise.verify.examine import Answer, Job
from tests.distributed.one_proof_workers import Asked, Everything
from tests.matrix import FULL

MODEL = "llama3-debug?n_layers=2,hidden=96,n_heads=12,n_kv_heads=4,vocab_size=512"
NORMS = ("layers.*.attention_norm", "layers.*.ffn_norm", "norm")


def with_norms(plan: Plan, name: str, style: StyleName) -> Plan:
    rules = (Rule(rule.pattern, Style(style)) if rule.pattern in NORMS else rule for rule in plan.rules)
    return replace(plan, name=name, rules=tuple(rules))


FAULTY = (
    with_norms(builtin_plan("rowwise"), "norms-not-summed", StyleName.REPLICATE),
    with_norms(builtin_plan("colwise", sequence_parallel=False), "norms-summed", StyleName.SEQUENCE_PARALLEL),
)


RIGHT_AND_FAULTY = (builtin_plan("rowwise"), *FAULTY)
WHOLE = (builtin_plan("rowwise", sequence_parallel=False),)
ON_TP = StepSettings(batch=1, seq=32)
ACCUMULATED = StepSettings(batch=4, seq=32, accumulation=2)
RECOMPUTED = StepSettings(batch=2, seq=32, recompute="full")
# in make test-all: FSDP's step is another one, beside what tp alone has
REST = "data-parallel ranks and micro-batches"
# what compare is asked on so many ranks, by a name
ASKED = {
    2: {
        "tp": ("tp=2", ON_TP, RIGHT_AND_FAULTY, False),
        "tp, summed twice": ("tp=2", StepSettings(batch=2, seq=32), WHOLE, True),
    },
    4: {
        REST: ("dp=2,tp=2", ACCUMULATED, RIGHT_AND_FAULTY, False),
        "fsdp and recompute": ("fsdp=2,tp=2", RECOMPUTED, RIGHT_AND_FAULTY, False),
        "fsdp, summed twice": ("fsdp=2,tp=2", StepSettings(batch=2, seq=32), WHOLE, True),
    },
}


@lru_cache
def answers(
    world_size: int, *, telling: bool
) -> tuple[dict[str, tuple[Agreement, ...]], tuple[Verification, ...]]:
    """What compare's ranks say of each plan, by what they are asked; and on two ranks what verify says of the
    faulty plans."""
    stream = load_tokens(vocab_size=512, random_ids=True)
    names = [name for name in ASKED[world_size] if (name == REST) is not telling]
    asked = tuple(
        Asked(pack(job(mesh, settings, plans), stream), summed_twice)
        for mesh, settings, plans, summed_twice in (ASKED[world_size][name] for name in names)
    )
    claims = tuple(Claim(MODEL, plan.to_toml(), plan.name, twin=False) for plan in FAULTY)
    to_verify = msgspec.json.encode(Job(claims, 0, Mesh.parse("tp=2"), StepSettings(2, 32)))
    said: list[bytes] = []
    (of_first, *_) = run_ranks(
        "tests.distributed.one_proof_workers:each",
        msgspec.msgpack.encode(Everything(asked, to_verify if world_size == 2 else b"")),
        world_size=world_size,
        device_type="cpu",
        timeout_s=120,
        on_event=said.append,
    )
    reports = [
        msgspec.msgpack.decode(report, type=RankReport)
        for report in msgspec.msgpack.decode(of_first, type=list[bytes])
    ]
    verified = (msgspec.msgpack.decode(event, type=Answer) for event in said[: len(claims)])
    return (
        {name: report.agreements for name, report in zip(names, reports, strict=True)},
        tuple(answer.verification for answer in verified) if world_size == 2 else (),
    )


def agreements(world_size: int, *, telling: bool = True) -> dict[str, tuple[Agreement, ...]]:
    return answers(world_size, telling=telling)[0]


def job(mesh: str, settings: StepSettings, plans: tuple[Plan, ...]) -> CompareJob:
    return CompareJob(
        model=MODEL,
        mesh=mesh,
        plans=tuple(plan.to_toml() for plan in plans),
        labels=tuple(plan.name for plan in plans),
        settings=settings,
        rounds=1,
        warmup=0,
        module=None,
        module_only=False,
        check=True,
        check_layers=2,
        repeat_first=False,
    )


def told(findings: tuple[Finding, ...]) -> list[tuple[object, ...]]:
    """Where a mesh has several axes the reason says along which; tp is the one that is meant here."""
    return [
        (
            finding.kind,
            finding.subject,
            finding.cause,
            finding.reason.replace(" along tp", "").removesuffix(" over tp"),
            finding.advice,
            finding.rule,
        )
        for finding in findings
    ]


@pytest.mark.parametrize("number", range(len(FAULTY)), ids=[plan.name for plan in FAULTY])
def test_compare_and_verify_find_the_same_in_a_faulty_plan(number: int) -> None:
    compared = agreements(2)["tp"][1 + number]
    assert told(compared.findings) == told(answers(2, telling=True)[1][number].wrong)
    cause = (Cause.PARTS_NOT_SUMMED, Cause.SUMMED_TOO_OFTEN)[number]
    assert {finding.cause for finding in compared.findings} == {cause}


@pytest.mark.parametrize("name", [pytest.param(REST, marks=FULL), "fsdp and recompute"])
def test_the_causes_are_the_same_through_every_step_that_is_timed(name: str) -> None:
    right, *wrong = agreements(4, telling=name != REST)[name]
    assert right.agrees
    for one, other in zip(agreements(2)["tp"][1:], wrong, strict=True):
        assert told(one.findings) == told(other.findings)


def test_a_fault_in_weights_that_tp_and_fsdp_both_cut_is_told_as_on_tp_alone() -> None:
    (alone,), (cut_twice,) = agreements(2)["tp, summed twice"], agreements(4)["fsdp, summed twice"]
    assert told(alone.findings) == told(cut_twice.findings)
    by_subject = {finding.subject: finding for finding in cut_twice.findings}
    assert by_subject["layers.1.feed_forward.w2.weight"].cause is Cause.SUMMED_TOO_OFTEN
    assert by_subject["layers.1.feed_forward.w2.weight"].ratio == pytest.approx(2)
    assert by_subject["tok_embeddings.weight"].cause is Cause.FOLLOWS
