"""What a prediction beside a measurement says, in words."""

import math
from collections.abc import Iterator, Sequence

from shardwise.core.beside import MEASURED_ALONE, Beside, BesideLine, Found, LineKind, TermLine
from shardwise.core.prediction import Term
from shardwise.profiles.diff import ms, signed_ms

_WORTH_SAYING = 0.01  # of the measured step
_MOST_TERMS, _MOST_LINES = 5, 3
_ALIKE_COVERS = 0.8
_ALIKE_SPREAD = 0.15
_ALIKE_LEAST = 1.25
_NO_TERM_IN_PROFILES = {
    Term.SLOWED.value: "lies in the measured kernels",
    Term.BUBBLE.value: "is waiting and idle time in a profile",
}


def alike(lines: Sequence[BesideLine]) -> float | None:
    """The factor by which nearly all of a term's lines are off, predicted over measured; None where they are
    off by different ones, or hardly."""
    both = [line for line in lines if line.predicted.ns > 0 and line.measured.ns > 0]
    if len(both) < 2:
        return None
    for side in ("predicted", "measured"):
        whole = sum(getattr(line, side).ns for line in lines)
        if sum(getattr(line, side).ns for line in both) < _ALIKE_COVERS * whole:
            return None
    weights = [line.predicted.ns + line.measured.ns for line in both]
    logs = [math.log(line.predicted.ns / line.measured.ns) for line in both]
    total = sum(weights)
    mean = sum(weight * log for weight, log in zip(weights, logs, strict=True)) / total
    spread = sum(weight * abs(log - mean) for weight, log in zip(weights, logs, strict=True)) / total
    return math.exp(mean) if spread <= _ALIKE_SPREAD and abs(mean) >= math.log(_ALIKE_LEAST) else None


def verdict(both: Beside) -> Iterator[str]:
    predicted, measured = both.predicted, both.measured
    if measured.step_ns <= 0:
        return
    yield f"{predicted.label}: {_whole(both)}"
    large = [
        each
        for each in sorted(both.terms, key=lambda each: -abs(each.delta_ns))
        if abs(each.delta_ns) >= _WORTH_SAYING * measured.step_ns
    ]
    if large:
        told = "; ".join(_of_term(each, both.off_ns) for each in large[:_MOST_TERMS])
        yield f"By term, of {ms(both.off_ns)} that terms are off, either way: {told}."
    else:
        yield "No term is off by 1 % of the step."
    for each in large:
        if each.alike is not None:
            way = "too slow" if each.alike > 1 else "too fast"
            factor = each.alike if each.alike > 1 else 1 / each.alike
            yield (
                f"Nearly all lines of {each.term} are predicted {factor:.2f} times {way}: one thing that "
                "they share is off, a constant or how busy the machine was."
            )
    lines = [line for line in both.lines if abs(line.delta_ns) >= _WORTH_SAYING * measured.step_ns]
    apart = (*MEASURED_ALONE, *([] if Term.WAITING in dict(predicted.terms) else [Term.WAITING]))
    shown = [_of_line(line) for line in lines if line.term not in apart][:_MOST_LINES]
    if shown:
        yield f"Most of it: {'; '.join(shown)}."
    yield from _cautions(both)


def _whole(both: Beside) -> str:
    error = both.error or 0.0
    way = "too slow" if error > 0 else "too fast"
    said = f"{100 * abs(error):.1f} % {way}" if abs(error) >= 0.0005 else "the same"
    return (
        f"a step was predicted at {ms(both.predicted.step_ns)} on {both.predicted.machine}, and took "
        f"{ms(both.measured.step_ns)} in {both.measured.label}: {said}."
    )


def _of_term(each: TermLine, off_ns: float) -> str:
    share = f"{100 * abs(each.delta_ns) / off_ns:.0f} %" if off_ns else "0 %"
    if each.predicted_ns is None:
        why = "not modelled" if each.term == Term.WAITING else "not predicted"
        return f"{each.term} {signed_ms(each.delta_ns)} ({share}; {why})"
    if each.measured_ns is None:
        return f"{each.term} {signed_ms(each.delta_ns)} ({share}; {_NO_TERM_IN_PROFILES.get(each.term, '')})"
    ratio = f"; {each.predicted_ns / each.measured_ns:.2f} of what it took" if each.measured_ns else ""
    return f"{each.term} {signed_ms(each.delta_ns)} ({share}{ratio})"


def line_name(line: BesideLine) -> str:
    """`aten::mm of layers.*.attention.wq, backward`."""
    what = line.op.replace("_", "-") if line.kind is LineKind.EXCHANGE else line.op
    if line.kind is LineKind.ISSUING:
        what = "issuing" if line.op in ("", line.term) else line.op
    if line.term == Term.WAITING:
        what = f"waiting in {what}"
    where = f" of {line.module}" if line.module else ""
    when = f", {line.step_pass}" if line.step_pass else ""
    return f"{what or 'several ops'}{where}{when}"


def _of_line(line: BesideLine) -> str:
    shapes = f" {line.shapes}" if line.shapes else ""
    name = line_name(line)
    if line.found is Found.MEASURED:
        return f"{name}{shapes} took {ms(line.measured.ns)} and wasn't predicted"
    if line.found is Found.PREDICTED:
        return f"{name}{shapes} was predicted at {ms(line.predicted.ns)} and isn't in the profile"
    return f"{name}{shapes} predicted {ms(line.predicted.ns)}, took {ms(line.measured.ns)}"


def _cautions(both: Beside) -> Iterator[str]:
    if both.unsplit_ns >= _WORTH_SAYING * both.measured.step_ns:
        yield (
            f"Of {ms(both.unsplit_ns)} of the measured exchanges, waiting can't be told apart: they count as "
            "exchanges, and a prediction has none of the waiting."
        )
    if both.matched < 0.8:
        yield (
            f"{100 * both.matched:.0f} % of the measured work and exchanges has a predicted line; the rest "
            "stands as measured alone."
        )
