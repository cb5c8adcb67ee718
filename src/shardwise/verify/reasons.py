"""Why a sharded model isn't the unsharded one: from the evidence to findings, what explains others first; and
what else is known of a model as the reason of what the numbers leave open.

A difference is passed on: in the forward to every later module, in the backward to every earlier one. So the
output is asked where its values begin to be wrong (wrong_output.py), and each wrong gradient what it comes
from (wrong_gradients.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.verify.evidence import Evidence
from shardwise.verify.words import ADVICE
from shardwise.verify.wrong_gradients import gradient_findings
from shardwise.verify.wrong_output import output_finding


def explain_differences(evidence: Evidence) -> list[Finding]:
    """A finding for the output or loss if they differ, and one for each wrong gradient. What explains others
    stands before them, and they say that they follow from it."""
    differences = evidence.differences
    findings: list[Finding] = []
    if differences.is_output_wrong:
        findings.append(output_finding(evidence))
    elif differences.is_loss_wrong:
        reason = "the outputs are right and the loss isn't"
        findings.append(Finding(FindingKind.LOSS_DIFFERS, "loss", reason, differences.loss))
    return findings + gradient_findings(evidence, findings[0] if findings else None)


def with_ties(findings: Iterable[Finding], untied: Iterable[Finding]) -> list[Finding]:
    """The gradient of a parameter that was torn apart is wrong for that reason."""
    reasons = {finding.subject: finding.reason for finding in untied if finding.kind is FindingKind.UNTIED}
    return [
        replace(finding, cause=Cause.UNTIED, reason=reasons[finding.subject], follows=None)
        if finding.subject in reasons and finding.cause is Cause.UNKNOWN
        else finding
        for finding in findings
    ]


def is_unexplained(finding: Finding) -> bool:
    """Whether the numbers of a proof leave open why it is wrong: of a gradient, or of the module that is the
    first to give another output."""
    return finding.cause is Cause.UNKNOWN or (
        finding.kind is FindingKind.OUTPUT_DIFFERS and finding.cause is Cause.FORWARD
    )


def with_suspicions(
    findings: Sequence[Finding], suspicions: Iterable[Finding], *, add: bool = False
) -> list[Finding]:
    """What a trace suspects, as the reason of what is wrong and has none. add: where nothing was proved,
    suspicions of anything else too."""
    by_name = {each.subject: each for each in suspicions if each.kind is not FindingKind.CRASHES}
    wrong = {finding.subject for finding in findings}
    cuts = (each for each in by_name.values() if each.cause is Cause.CUT_AS_ONE)
    cut = next((each for each in cuts if each.subject in wrong), None)
    informed = []
    for finding in findings:
        own = by_name.get(finding.subject)
        is_own = finding.cause is Cause.UNKNOWN or (finding.cause is Cause.FORWARD and own is cut)
        if cut is not None and finding.kind is FindingKind.OUTPUT_DIFFERS and is_unexplained(finding):
            reason = f"{finding.reason}. {cut.subject}: {cut.reason}"
            finding = replace(finding, cause=cut.cause, reason=reason, advice=cut.advice)
        elif own is not None and is_own:
            finding = replace(finding, cause=own.cause, reason=own.reason, advice=own.advice)
        informed.append(finding)
    return informed + [each for name, each in by_name.items() if add and name not in wrong]


def ungathered(reason: str) -> tuple[Finding, ...]:
    """Logits that no loss could be taken of."""
    cause = Cause.NOT_GATHERED
    return (Finding(FindingKind.OUTPUT_DIFFERS, "output", reason, advice=ADVICE[cause], cause=cause),)
