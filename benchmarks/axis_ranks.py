"""What the ranks of `python -m benchmarks.verify_mutants` run of the mutants on meshes: the plain script's
truth of each, and verify's proof, in one launch for each number of ranks; another where a mutant takes it
down."""

from collections.abc import Callable, Sequence
from functools import cache

import msgspec
import torch

from benchmarks.axis_mutants import BATCH, LOSS, MUTANTS, NORM, SEQ, VOCAB, AxisMutant
from benchmarks.axis_oracle import CPU, IGNORED, truth
from benchmarks.mutant_oracle import Truth
from benchmarks.mutants import CRASHES
from shardwise.core.errors import RunError
from shardwise.core.finding import Finding, FindingKind
from shardwise.core.shown import told
from shardwise.core.verification import Verification
from shardwise.launch import RankContext, run_ranks
from shardwise.models.specs import ModelSpec
from shardwise.parallel.any_plan import name_of
from shardwise.report.verify import rows
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.verify.expected import Unsharded, shake, unsharded
from shardwise.verify.proof import prove

TIMEOUT_S = 180.0


class Judged(msgspec.Struct, frozen=True):
    truth: Truth
    found: Verification


def judged(names: Sequence[str], on_answer: Callable[[Judged], None] = lambda _: None) -> dict[str, Judged]:
    """What the plain script and verify say of each mutant, by name."""
    found: dict[str, Judged] = {}
    by_size: dict[int, list[str]] = {}
    for name in names:
        by_size.setdefault(MUTANTS[name].mesh_noun.world_size, []).append(name)

    def take(event: bytes) -> None:
        answer = msgspec.msgpack.decode(event, type=Judged)
        found[answer.truth.name] = answer
        on_answer(answer)

    for world_size, own in by_size.items():
        while left := [name for name in own if name not in found]:
            try:
                run_ranks(
                    "benchmarks.axis_ranks:run",
                    msgspec.msgpack.encode(left),
                    world_size=world_size,
                    device_type="cpu",
                    timeout_s=TIMEOUT_S,
                    on_event=take,
                )
            except RunError as error:
                if type(error) is not RunError:
                    raise
                first = next(name for name in left if name not in found)
                mutant, said = MUTANTS[first], told(error, 300)
                known = Judged(Truth(first, True, "no step", "", said), _crashed(mutant, said))
                found[first] = known
                on_answer(known)
    return {name: found[name] for name in names}


def reasons(found: Verification) -> tuple[str, ...]:
    """What verify names: causes; LOSS and NORM; a module whose output is wrong."""
    named = []
    for finding in found.wrong:
        match finding.kind:
            case FindingKind.CRASHES:
                named.append(CRASHES)
            case FindingKind.LOSS_DIFFERS:
                named.append(LOSS)
            case FindingKind.WEIGHTS_DIFFER if finding.subject == NORM.replace("_", " "):
                named.append(NORM)
            case FindingKind.OUTPUT_DIFFERS:
                named.append(str(finding.cause))
            case _ if finding.cause is not None and finding.cause not in rows.PASSED_ON:
                named.append(str(finding.cause))
    return tuple(dict.fromkeys(named))


def is_said(where: str, found: Verification) -> bool:
    """Whether a finding names it."""
    return any(where in f"{finding.subject}: {finding.reason}" for finding in found.wrong)


def run(context: RankContext, payload: bytes) -> bytes:
    """Entry of every rank."""
    torch.set_default_dtype(torch.float64)
    for name in msgspec.msgpack.decode(payload, type=list[str]):
        context.note(name)
        mutant = MUTANTS[name]
        answer = Judged(truth(mutant), _proved(mutant))
        if context.rank == 0:
            context.report(msgspec.msgpack.encode(answer))
    return b""


def _proved(mutant: AxisMutant) -> Verification:
    mesh = device_mesh(mutant.mesh_noun, "cpu")
    expected = _expected(mutant.spec)
    known = Verification(mutant.model, name_of(mutant.plan), mutant.mesh_noun.tp)

    def whole() -> torch.nn.Module:
        return _whole(mutant.spec)

    try:
        with mutant.fault():
            model = build_model(
                mutant.spec, mutant.plan, mesh, dtype=torch.float64, device=CPU, seed=3,
                pipeline=mutant.pipeline, on_parameter=shake,
            )  # fmt: skip
            portion = Portion.on(mesh, mutant.accumulation)
            proof, findings = prove(model, expected, whole, portion)
    except Exception as error:
        return _crashed(mutant, told(error, 300))
    return Verification(known.model, known.plan, known.tp, proof=proof, findings=tuple(findings))


def _crashed(mutant: AxisMutant, said: str) -> Verification:
    crash = Finding(FindingKind.CRASHES, "model", said)
    return Verification(mutant.model, name_of(mutant.plan), mutant.mesh_noun.tp, findings=(crash,), note=said)


def _whole(spec: ModelSpec) -> torch.nn.Module:
    return build_model(spec, None, None, dtype=torch.float64, device=CPU, seed=3, on_parameter=shake)


@cache
def _expected(spec: ModelSpec) -> Unsharded:
    generator, batches = torch.Generator().manual_seed(5), []
    for _ in range(2):
        ids = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[0, SEQ // 3] = labels[BATCH - 2, 1:4] = IGNORED
        batches.append((ids[:, :-1].contiguous(), labels))
    return unsharded(_whole(spec), batches, parts=2)
