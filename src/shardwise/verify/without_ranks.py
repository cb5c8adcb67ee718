"""What is known of plans without starting a rank: the static checks by themselves, and what they add where a
proof has no reason of its own.

The model is taken as it was named, whatever its size and tp: its parameters are counted on the meta device,
and its step is traced on fake tensors; its small twin's, where its own can't be.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from shardwise.core.case import StepSettings
from shardwise.core.errors import ModelError, ShardwiseError
from shardwise.core.finding import Finding, FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.core.sharded import Sharded
from shardwise.core.shown import shown
from shardwise.core.verification import Verdict, Verification
from shardwise.models.source import ModelSource, find_model
from shardwise.parallel.any_plan import apply_any
from shardwise.parallel.resolve import tied_parameters
from shardwise.parallel.self_sharded import build_sharded
from shardwise.trace.fakes import fake_world
from shardwise.verify.claim import TWIN, Claim, no_plan
from shardwise.verify.foresight import foresee
from shardwise.verify.reasons import is_unexplained, with_suspicions
from shardwise.verify.static import of_model, untied


def check(
    claims: Sequence[Claim],
    *,
    mesh: Mesh,
    settings: StepSettings,
    on_answer: Callable[[Verification], None] = lambda _: None,
) -> tuple[Verification, ...]:
    """A Verification without a proof for each claim. Raises the InputErrors of the model and plan; RunError
    inside a process group."""
    answers = []
    for claim in claims:
        began = time.perf_counter()
        answer = _checked(claim, mesh, settings)
        answers.append(replace(answer, seconds=round(time.perf_counter() - began, 2)))
        on_answer(answers[-1])
    return tuple(answers)


def informed(proved: Verification, claim: Claim, settings: StepSettings) -> Verification:
    """The same, with the reasons that a trace suspects for what the proof found wrong without one, or crashed
    over. What the proof found right is right."""
    has_crashed = proved.verdict is Verdict.CRASHES
    if not has_crashed and not any(is_unexplained(finding) for finding in proved.findings):
        return proved
    try:
        source: ModelSource | None = find_model(claim.model)
        plan = claim.parsed_twin_plan if proved.twin else claim.parsed_plan
        if proved.twin and source is not None:
            source = source.small(proved.tp)
        if source is None:
            return proved
        suspicions = foresee(source, plan, proved.tp, settings).findings
    except ShardwiseError:
        return proved
    if has_crashed:
        proved = _told_by_trace(proved, suspicions)
    return replace(proved, findings=tuple(with_suspicions(proved.findings, suspicions, add=has_crashed)))


def _told_by_trace(crashed: Verification, suspicions: Sequence[Finding]) -> Verification:
    """Where ranks only died (a collective of unequal parts ends a process), what a trace raises instead."""
    crash = crashed.findings[0]
    seen = next((each for each in suspicions if each.kind is FindingKind.CRASHES), None)
    if seen is None or crash.subject != "model":
        return crashed
    told = replace(crash, subject=seen.subject, reason=seen.reason)
    return replace(crashed, findings=(told, *crashed.findings[1:]), note=seen.reason)


def _checked(claim: Claim, mesh: Mesh, settings: StepSettings) -> Verification:
    plan = claim.parsed_plan
    answer = Verification(claim.model, claim.label, mesh.tp, is_static=True)
    try:
        source, whole, twin = _built(claim, mesh.tp)
    except ShardwiseError as error:
        return claim.unproved(answer, error)
    answer, plan = replace(answer, twin=twin), claim.parsed_twin_plan if twin else plan
    if (why := no_plan(whole, plan)) is not None:
        return replace(answer, note=why)
    answer = replace(answer, parameters=sum(parameter.numel() for parameter in whole.parameters()))
    try:
        sharded, findings = _counted(source, plan, whole, mesh)
    except Exception as error:  # a plan, and the code that it puts into a model, may raise anything
        if isinstance(error, ModelError) and plan is TheirPlan.OWN:
            return replace(answer, note=shown(error, 300))
        return claim.crashed(answer, error)
    foresight = foresee(source, plan, mesh.tp, settings)
    small = source.small(mesh.tp) if foresight.note and not twin and claim.twin is None else None
    if small is not None:  # as defaults that leave a size open want it
        answer = replace(answer, twin=TWIN)
        foresight = foresee(small, claim.parsed_twin_plan, mesh.tp, settings)
    note = "Its step can't be traced, so only its parameters were looked at: "
    note = f"{note}{foresight.note}" if foresight.note else ""
    return replace(answer, sharded=sharded, findings=(*foresight.findings, *findings), note=note)


def _built(claim: Claim, tp: int) -> tuple[ModelSource, nn.Module, str]:
    """The source, its model on the meta device, and what it is instead of the model as named: its twin if
    that is asked for, or all that can be built."""
    source = find_model(claim.model)
    small = source.small(tp) if claim.twin is not False else None
    if small is None or not claim.twin:
        try:
            return source, source.build(dtype=torch.float32), ""
        except ShardwiseError:
            if small is None:
                raise
    return small, small.build(dtype=torch.float32), TWIN


def _counted(
    source: ModelSource, plan: AnyPlan, whole: nn.Module, mesh: Mesh
) -> tuple[Sharded, list[Finding]]:
    """What static.py says of the model, sharded on the meta device."""
    with fake_world(mesh, rank=0, device="cpu") as device_mesh:
        model = (
            build_sharded(source, dtype=torch.float32, mesh=device_mesh) if plan is TheirPlan.OWN else whole
        )
        ties = set(tied_parameters(whole).values())
        sharded, findings = of_model(apply_any(model, plan, device_mesh), plan, mesh.tp)
        return sharded, [*untied(ties, model), *findings]
