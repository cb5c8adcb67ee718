"""A PredictedStep and a run's profile -> Beside: the same work found on both sides, each nanosecond of either
in one line.

Work is the same by pass, module, op and shapes; what is left by fewer of them (Found says which). A line has
one term, the prediction's; work that wasn't predicted counts by its kind. What ranks wait for one another
stands by itself.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from shardwise.core.beside import (
    FURTHER,
    IDLE,
    MEASURED_ALONE,
    Beside,
    BesideLine,
    Found,
    LineKind,
    PredictedLine,
    PredictedStep,
    TermLine,
)
from shardwise.core.difference import RunProfile, Use
from shardwise.core.errors import InputError
from shardwise.core.prediction import Term
from shardwise.core.timeline import Pass, Timeline
from shardwise.profiles.beside_words import alike, verdict
from shardwise.profiles.classify import class_of
from shardwise.profiles.placed import Place, Sums, placed

_NAMES_SHOWN = 4
_WORTH_NAMING = 0.05  # of a line
_ONE_WAY = {"send": "send_recv", "recv": "send_recv"}  # as profiles name both
_TERM_OF_CLASS = {
    "attention": Term.ATTENTION,
    "matmul": Term.MATMUL,
    "convolution": Term.MATMUL,
    "embedding": Term.EMBEDDING,
    "optimizer": Term.OPTIMIZER,
}
LEAST_ALIKE = 0.5
"""Of the predicted matmuls' time, the share whose shapes the profile must have; else it is of something
else."""

_Key = tuple[str, ...]
_LEVELS: dict[LineKind, tuple[tuple[Found, Callable[["_Work"], _Key]], ...]] = {
    LineKind.WORK: (
        (Found.SHAPES, lambda work: (work.step_pass, work.module, work.op, work.shapes)),
        (Found.MODULE, lambda work: (work.step_pass, work.module, work.op)),
        (Found.OP_SHAPES, lambda work: (work.step_pass, work.op, work.shapes)),
        (Found.OP_SHAPES, lambda work: (work.op, work.shapes)),
        (Found.OP, lambda work: (work.step_pass, work.module, _out_of_place(work.op))),
        (Found.OP, lambda work: (work.step_pass, _out_of_place(work.op))),
        (Found.OP, lambda work: (_out_of_place(work.op),)),
    ),
    LineKind.EXCHANGE: (
        (Found.MODULE, lambda work: (work.step_pass, work.module, work.op)),
        (Found.MODULE, lambda work: (work.module, work.op)),
        (Found.OP, lambda work: (work.step_pass, work.op)),
        (Found.OP, lambda work: (work.op,)),
    ),
    LineKind.ISSUING: ((Found.MODULE, lambda work: (work.step_pass, work.module)),),
}


@dataclass(slots=True)
class _Work:
    """One side's work of one line: predicted, or measured (without a term)."""

    kind: LineKind
    term: str
    step_pass: str
    module: str
    op: str
    shapes: str
    use: Use
    names: dict[str, float] = field(default_factory=dict)


def beside(predicted: PredictedStep, measured: RunProfile, timelines: Sequence[Timeline]) -> Beside:
    """timelines: those that the profile is of. Raises InputError where the profile is of another model or
    mesh than the prediction."""
    _check_ranks(predicted, measured, timelines)
    known = {line.op for line in predicted.lines if line.kind is LineKind.WORK}
    known |= {f"{_out_of_place(op)}{end}" for op in known for end in ("", "_")}
    sums, windows = placed(timelines, known)
    own, alone, unsplit_ns = _measured(sums, windows)
    expected = [_expected(line) for line in predicted.lines]
    _check_shapes(predicted, measured, expected, own)
    lines = [*_matched(expected, own), *(_line(Found.MEASURED, [], [work]) for work in alone)]
    lines.sort(key=lambda line: (-abs(line.delta_ns), line.term, line.module, line.op, line.shapes))
    made = Beside(predicted, measured, _terms(predicted, lines), tuple(lines), unsplit_ns)
    return replace(made, verdict=tuple(verdict(made)))


# --------------------------------------------------------------------------------------------- two sides


def _expected(line: PredictedLine) -> _Work:
    op = _ONE_WAY.get(line.op, line.op) if line.kind is LineKind.EXCHANGE else line.op
    return _Work(line.kind, line.term, line.step_pass, line.module, op, line.shapes, line.use)


def _measured(sums: dict[Place, Sums], windows: int) -> tuple[list[_Work], list[_Work], float]:
    """(what may be matched, what no prediction has, what of the exchanges isn't split), per step."""
    merged: dict[tuple[LineKind, str, _Key], _Work] = {}
    unsplit_ns = 0
    for place, found in sums.items():
        unsplit_ns += found.unsplit_ns
        where = place[1:5]
        for term, ns, count in (
            ("", found.ns, found.count),
            (Term.WAITING.value, found.waiting_ns, 0),
            (IDLE, found.idle_ns, 0),
        ):
            if not ns and (term or not count):
                continue
            key = (place.kind, term, where)
            work = merged.setdefault(key, _Work(place.kind, term, *where, Use()))
            work.use += Use(count / windows, ns / windows)
            work.names[place.name] = work.names.get(place.name, 0.0) + ns
    own = [work for work in merged.values() if work.term != IDLE]
    return own, [work for work in merged.values() if work.term == IDLE], unsplit_ns / max(1, windows)


# --------------------------------------------------------------------------------------------- matching


def _matched(expected: list[_Work], own: list[_Work]) -> Iterator[BesideLine]:
    for kind, waits in ((kind, waits) for kind in _LEVELS for waits in (False, True)):
        levels = _LEVELS[kind]
        left, right = (
            [work for work in side if work.kind is kind and (work.term == Term.WAITING) is waits]
            for side in (expected, own)
        )
        groups: list[tuple[Found, list[_Work], list[_Work]]] = []
        for found, key in levels:
            known, given = _grouped(left, key), _grouped(right, key)
            for common in [each for each in known if each in given]:
                chosen = _of_one_term(known[common])
                groups.append((found, chosen, given[common]))
                taken = {id(work) for work in (*chosen, *given[common])}
                left = [work for work in left if id(work) not in taken]
                right = [work for work in right if id(work) not in taken]
        right = _joining(right, groups, [key for _, key in levels[1:]])
        yield from (_line(*group) for group in groups)
        yield from (_line(Found.PREDICTED, [work], []) for work in left)
        yield from (_line(Found.MEASURED, [], [work]) for work in right)


def _joining(
    rest: list[_Work],
    groups: Sequence[tuple[Found, list[_Work], list[_Work]]],
    keys: Sequence[Callable[[_Work], _Key]],
) -> list[_Work]:
    """What is left joins the work that it is most like: ranks needn't run the same shapes (of parameters that
    all hold, one counts the norm), and a prediction is one rank's. Returns what is like none."""
    for key in keys:
        like = {key(work): own for _, expected, own in reversed(groups) for work in expected}
        for work in rest:
            like.get(key(work), []).append(work)
        rest = [work for work in rest if key(work) not in like]
    return rest


def _out_of_place(op: str) -> str:
    """A backward adds gradients up in place where it may, which a trace doesn't see."""
    return op.removesuffix("_")


def _grouped(works: list[_Work], key: Callable[[_Work], _Key]) -> dict[_Key, list[_Work]]:
    groups: dict[_Key, list[_Work]] = defaultdict(list)
    for work in works:
        groups[key(work)].append(work)
    return groups


def _of_one_term(works: list[_Work]) -> list[_Work]:
    """Those of the term that has most of them; a line has one."""
    by_term: dict[str, float] = defaultdict(float)
    for work in works:
        by_term[work.term] += work.use.ns
    most = max(by_term, key=lambda term: (by_term[term], term))
    return [work for work in works if work.term == most]


def _line(found: Found, expected: list[_Work], own: list[_Work]) -> BesideLine:
    works = [*expected, *own]
    names: dict[str, float] = defaultdict(float)
    for work in own:
        for name, ns in work.names.items():
            names[name] += ns

    worth = _WORTH_NAMING * sum(names.values())
    shown = [name for name, ns in names.items() if ns >= worth]

    def common(values: Sequence[str]) -> str:
        return values[0] if len(set(values)) == 1 else ""

    return BesideLine(
        works[0].kind,
        expected[0].term if expected else _term_of(own[0]),
        common([work.step_pass for work in works]),
        common([work.module for work in works]),
        common([work.op for work in works]),
        common([work.shapes for work in works]),
        found,
        sum((work.use for work in expected), Use()),
        sum((work.use for work in own), Use()),
        tuple(sorted(shown, key=lambda name: (-names[name], name))[:_NAMES_SHOWN]),
    )


def _term_of(work: _Work) -> str:
    """Of work that wasn't predicted."""
    if work.term:
        return work.term
    if work.kind is LineKind.ISSUING:
        return Term.LAUNCH.value
    if work.kind is LineKind.EXCHANGE:
        return FURTHER
    if work.step_pass == Pass.END.name.lower():
        return Term.OPTIMIZER.value
    return _TERM_OF_CLASS.get(class_of(work.op, next(iter(work.names), "")), Term.KERNELS).value


def _terms(predicted: PredictedStep, lines: Sequence[BesideLine]) -> tuple[TermLine, ...]:
    """Those that a side has anything of."""
    of_term: dict[str, list[BesideLine]] = defaultdict(list)
    for line in lines:
        of_term[line.term].append(line)
    made = []
    for term, predicted_ns in predicted.terms:
        its = of_term.pop(term, [])
        measured_ns = sum(line.measured.ns for line in its)
        if not predicted_ns and not measured_ns:
            continue
        # what communication slows lies in the kernels, and a bubble in waiting: no profile tells them apart
        is_told = measured_ns or any(line.op != term for line in its)
        made.append(TermLine(term, predicted_ns, measured_ns if is_told else None, alike(its)))
    for term in (*(term.value for term in Term), *MEASURED_ALONE):
        its = of_term.get(term, [])
        measured_ns = sum(line.measured.ns for line in its)
        if measured_ns:
            made.append(TermLine(term, None, measured_ns))
    return tuple(made)


# --------------------------------------------------------------------------------------------- of the same?


def _check_ranks(predicted: PredictedStep, measured: RunProfile, timelines: Sequence[Timeline]) -> None:
    if measured.has_device is predicted.together:
        ran, wanted = (
            ("a device", "a cpu") if measured.has_device else ("a CPU", f"{predicted.device} devices")
        )
        raise InputError(
            f"{measured.label}: ran on {ran}, and was predicted for {wanted} ({predicted.machine}). Give the "
            "--machine that it ran on; shardwise calibrate writes one."
        )
    world = 1
    for _, size in predicted.axes:
        world *= size
    said = dict(measured.facts).get("world size")
    ranks = int(said) if said is not None and said.isdecimal() else len(timelines)
    if ranks != world and (said is not None or ranks > world):
        mesh = ",".join(f"{name}={size}" for name, size in predicted.axes)
        raise InputError(
            f"{measured.label}: its profiles are of {ranks} rank{'s' * (ranks > 1)}, and the prediction of "
            f"{predicted.plan} is for {mesh}: {world}. Predict with the mesh that ran."
        )


def _check_shapes(
    predicted: PredictedStep, measured: RunProfile, expected: Sequence[_Work], own: Sequence[_Work]
) -> None:
    """Matmuls tell a model, a batch and a mesh apart. A profile without shapes is taken as it is."""
    ran = [work for work in own if work.kind is LineKind.WORK and class_of(work.op, "") == "matmul"]
    shapes = {work.shapes for work in ran if work.shapes}
    wanted = [work for work in expected if work.term == Term.MATMUL and work.shapes]
    whole = sum(work.use.ns for work in wanted)
    if not shapes or not whole:
        return
    there = sum(work.use.ns for work in wanted if work.shapes in shapes)
    if there >= LEAST_ALIKE * whole:
        return
    missing = max((work for work in wanted if work.shapes not in shapes), key=lambda work: work.use.ns)
    largest = max(ran, key=lambda work: work.use.ns)
    raise InputError(
        f"{measured.label}: ran another step than was predicted for {predicted.plan} of {predicted.model}: "
        f"{100 * there / whole:.0f} % of the predicted matmuls' time is of shapes that it has. Predicted, "
        f"and not there: {missing.op} {missing.shapes}; its largest: {largest.op} {largest.shapes}. Predict "
        "the model, mesh, batch and sequence that ran."
    )
