"""Verifications as rows of text, for the terminal and the page alike; nothing here knows of either."""

from dataclasses import dataclass, replace

from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.layer_name import any_layer
from shardwise.core.verification import Proof, Verdict, Verification, VerificationRun

# what only says that something else is wrong
PASSED_ON = frozenset({Cause.FOLLOWS, Cause.FORWARD})
_TELL_RATIO = frozenset({Cause.SUMMED_TOO_OFTEN, Cause.AVERAGED})


def headline(each: Verification) -> str:
    """What was found, in a sentence; of many findings the first, and how many others there are."""
    match each.verdict:
        case Verdict.NOT_PROVED if each.note:
            return each.note
        case Verdict.RIGHT | Verdict.NOT_PROVED:
            notes = len(each.findings)
            told = [f"{notes} note{'s' * (notes > 1)}"] if notes else []
            without = _without_gradient(each)
            return "; ".join([*told, *([f"nothing is proved of {without}"] if without else [])])
        case Verdict.SKIPPED | Verdict.CRASHES | Verdict.TIMED_OUT:
            return each.note
        case Verdict.NEARLY_NOTHING:
            return next(
                finding.reason for finding in each.findings if finding.kind is FindingKind.LITTLE_IS_SHARDED
            )
        case Verdict.WRONG | Verdict.SUSPECTED:
            own = grouped([finding for finding in each.wrong if _explained_by(finding, each) is None])
            more = f"; and {len(own) - 1} more" if len(own) > 1 else ""
            subject = "" if own[0].first.kind is FindingKind.CRASHES else f"{own[0].subject}: "
            return f"{subject}{own[0].first.reason}{more}"


def verdict_text(each: Verification) -> str:
    """The answer in a sentence or two."""
    proof = each.proof
    match each.verdict:
        case Verdict.SUSPECTED:
            return f"Suspected, before anything ran: {headline(each)}"
        case Verdict.NOT_PROVED:
            return f"Nothing found statically; not proved. {each.note}".strip()
        case Verdict.NEARLY_NOTHING if proof is None:
            return f"Not proved, and there is little to prove: {headline(each)}"
        case Verdict.RIGHT | Verdict.NEARLY_NOTHING:
            assert proof is not None
            start = "Right" if each.verdict is Verdict.RIGHT else "Right, but it shards nearly nothing"
            without = _without_gradient(each)
            many = how_many(proof) if without else f"all {how_many(proof)}"
            rest = f" Nothing is proved of {without}." if without else ""
            return (
                f"{start}: outputs, loss, {many} gradients, and the weights after {proof.steps} clipped "
                f"optimizer steps are the unsharded model's.{rest}"
            )
        case Verdict.WRONG:
            n = len({finding.subject for finding in each.wrong if finding.kind in _OF_GRADIENTS})
            are_exact = all(finding.subject != "output" for finding in each.wrong)
            if proof is None or (are_exact and not n):
                return f"Wrong: {headline(each)}"
            forward = "the outputs are exact" if are_exact else "the outputs differ"
            gradients = f"{n} of {proof.parameters_compared} gradients are not the unsharded model's"
            return f"Wrong: {forward}, and {gradients}."
        case Verdict.CRASHES:
            seen = "unsharded it runs, and under the plan it doesn't. " if each.ran_unsharded else ""
            return f"Crashes: {seen}{each.note}"
        case Verdict.TIMED_OUT:
            return f"Timed out, so nothing is proved: {each.note}"
        case Verdict.SKIPPED:
            return f"Skipped, so nothing is proved: {each.note}"


_OF_GRADIENTS = frozenset({FindingKind.GRADIENT_DIFFERS, FindingKind.GRADIENT_MISSING})
_MOST_NAMES = 3


def how_many(proof: Proof) -> str:
    """Gradients compared; where some have none on either side, without those, of all."""
    n = proof.parameters_compared
    return f"{n - len(proof.without_gradient)} of {n}" if proof.without_gradient else str(n)


def _without_gradient(each: Verification) -> str:
    """Which parameters a proof says nothing of; empty where there are none."""
    names = each.proof.without_gradient if each.proof is not None else ()
    if not names:
        return ""
    groups = list(dict.fromkeys(any_layer(name) for name in names))
    more = f" and {len(groups) - _MOST_NAMES} more" if len(groups) > _MOST_NAMES else ""
    has = "parameters that have" if len(names) > 1 else "parameter that has"
    return f"{len(names)} {has} no gradient on either side: {', '.join(groups[:_MOST_NAMES])}{more}"


def facts(each: Verification, mesh: str) -> list[tuple[str, str]]:
    """What was compared and how exactly: names and values. mesh: of the run."""
    told = [
        ("model", f"{each.model}{f', {each.twin}' if each.twin else ''}"),
        ("plan", f"{each.plan} on {mesh}"),
    ]
    if each.parameters is not None:
        told.append(("parameters", f"{each.parameters:,}"))
    if each.sharded is not None and each.tp > 1:
        told.append(
            (
                "sharded",
                f"{each.sharded.inner_share:.1%} outside embedding and head, {each.sharded.share:.1%} of all",
            )
        )
    if each.proof is not None:
        proof = each.proof
        told += [
            ("computed in", ", ".join((proof.dtype, *proof.otherwise))),
            ("the model's own noise", error(proof.noise)),
            ("outputs", f"{error(proof.output_error)} off; allowed {error(proof.tolerance)}"),
            ("loss", f"{error(proof.loss_error)} off; allowed {error(proof.tolerance)}"),
            ("worst gradient", f"{error(proof.worst_gradient_error)} off: {proof.worst_gradient}"),
        ]
        if proof.weights_error is not None and proof.norm_error is not None:
            told.append(
                (
                    f"after {proof.steps} steps",
                    f"weights {error(proof.weights_error)} off, gradient norm {error(proof.norm_error)}",
                )
            )
    return told


def error(value: float | None) -> str:
    """A relative error; what is far off in plain figures."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if value == float("inf"):
        return "none on one side"
    return f"{100 * value:.3g} %" if value >= 1e-3 else f"{value:.1e}"


def sentence(text: str) -> str:
    """A reason as a sentence."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"


def settings(run: VerificationRun) -> str:
    """What all cases share."""
    if any(each.is_static for each in run.verifications):
        return f"{run.mesh}, batch {run.batch}, {run.seq} tokens each, traced and not run"
    batches = f"batch {run.batch}" + (f" and {run.smallest_batch}" if run.smallest_batch else "")
    return f"{run.mesh} on {run.device}, {batches}, {run.seq} tokens each, no dropout"


def totals(run: VerificationRun) -> str:
    """How many of each verdict."""
    counts = {verdict: sum(each.verdict is verdict for each in run.verifications) for verdict in Verdict}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


@dataclass(frozen=True, slots=True)
class Group:
    """Findings that differ in the layer only. subject: with * for the layer where there are several. under:
    what follows from them."""

    subject: str
    findings: tuple[Finding, ...]
    under: tuple["Group", ...] = ()

    @property
    def first(self) -> Finding:
        return self.findings[0]

    @property
    def figures(self) -> tuple[str, ...]:
        """Relative error and ratio; of several the range."""
        errors = [finding.relative_error for finding in self.findings if finding.relative_error is not None]
        told = [f"{_span(error(min(errors)), error(max(errors)))} off"] if errors else []
        ratios = [
            finding.ratio
            for finding in self.findings
            if finding.ratio is not None and finding.cause in _TELL_RATIO
        ]
        if ratios:
            told.append(f"{_span(f'{min(ratios):.6g}', f'{max(ratios):.6g}')} times the unsharded one")
        if len(self.findings) > 1:
            told.append(f"{len(self.findings)} layers")
        return tuple(told)

    @property
    def consequences(self) -> tuple[tuple[str, tuple["Group", ...]], ...]:
        """What follows, by the reason that it has: (reason, groups)."""
        found: dict[str, list[Group]] = {}
        for group in self.under:
            found.setdefault(group.first.reason, []).append(group)
        return tuple((reason, tuple(groups)) for reason, groups in found.items())


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def tree(each: Verification) -> list[Group]:
    """What is found, each with what follows from it. A crash is all there is to say, and the verdict says
    it."""
    told = [finding for finding in each.findings if finding.kind is not FindingKind.CRASHES]
    roots = grouped([finding for finding in told if _explained_by(finding, each) is None])
    grown: list[Group] = []
    told_under: set[str] = set()  # a note may be about the same parameter
    for group in roots:
        subjects = {finding.subject for finding in group.findings} - told_under
        told_under |= subjects
        under = [finding for finding in told if _explained_by(finding, each) in subjects]
        grown.append(replace(group, under=tuple(grouped(under))))
    return grown


def _explained_by(finding: Finding, each: Verification) -> str | None:
    """The subject of what it follows from; None of what stands by itself. Documents of before say no more
    than that something does follow: from what stands first."""
    if finding.follows is not None and finding.follows != finding.subject:
        return finding.follows
    if finding.cause in PASSED_ON and finding.kind not in _OF_ALL:
        first = next((other for other in each.findings if other.cause not in PASSED_ON), each.findings[0])
        return first.subject if first is not finding else None
    return None


_OF_ALL = frozenset({FindingKind.OUTPUT_DIFFERS, FindingKind.LOSS_DIFFERS})


def grouped(findings: list[Finding]) -> list[Group]:
    """Equal findings of several layers as one, in the order of the first."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        pattern = any_layer(finding.subject)
        key = (pattern, finding.kind, str(finding.cause), finding.reason, str(finding.rule))
        groups.setdefault(key, []).append(finding)
    return [
        Group(key[0] if len(group) > 1 else group[0].subject, tuple(group)) for key, group in groups.items()
    ]
