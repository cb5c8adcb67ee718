"""A predicted step, line by line: what each op and collective of the busiest stage takes in a whole step,
equal layers together, and what the step waits for.

    times      as often as it runs: micro-batches x once for a pass, once for the last backward's own
               (gradients that are summed beside it) and the step's end
    booked     a term's seconds as predict() adds them up: what the compute waits for in any case in full, the
               rest dealt out over what runs beside it (FSDP's collectives, sums of gradients) by what each
               takes, of which it is the part that isn't hidden
    issuing    waiting for launches, by the module whose work came too late, in each micro-batch's passes and
               once in the step's end, which begins with nothing in flight; where host and device are one
               (a CPU), what the host takes for each op, which predict() counts to the op's term

A term that has seconds and no item (a bubble, what communication slows) is one line without a module.
"""

from collections import defaultdict

import numpy as np

from shardwise.core.beside import MOST_SHAPES, LineKind, PredictedLine, PredictedStep
from shardwise.core.case import StepSettings
from shardwise.core.difference import Use
from shardwise.core.layer_name import any_layer
from shardwise.core.prediction import Prediction, Term
from shardwise.core.program import BACKWARDS, LOSS_MODULE, ONCE, Collective, Op, Phase
from shardwise.core.timeline import Pass
from shardwise.predict.layout import Layout
from shardwise.predict.streams import beside_layers
from shardwise.predict.timeline import launch_waits
from shardwise.predict.work import PHASES, TERMS, Work

_NS = 1e9
_Key = tuple[LineKind, Term, str, str, str, str]


def step_of(layout: Layout, prediction: Prediction, settings: StepSettings) -> PredictedStep:
    """prediction: of the layout. settings: of the whole step."""
    together = layout.work.together
    items, issuing = _Items(), _Items()
    micro_batches = layout.setup.micro_batches
    for work, times in layout.runs:
        items.add(work, times)
        if together:
            issuing.add_host(work, times)
    if not together:
        issuing.add_waits(launch_waits(layout), micro_batches)
    known = {term: s for term, s in prediction.terms if term is not Term.WAITING or not layout.punctual}
    terms = _apart(known, items, issuing if together else _Items())
    lines = [*items.lines(terms, but=Term.LAUNCH), *issuing.lines(terms, only=Term.LAUNCH)]
    return PredictedStep(
        prediction.plan,
        prediction.model,
        prediction.plan,
        prediction.machine,
        layout.machine.device,
        prediction.axes,
        settings,
        together,
        tuple((term.value, seconds * _NS) for term, seconds in terms.items()),
        tuple(sorted([*lines, *_rest(terms, lines)], key=_largest_first)),
        prediction.notes,
    )


class _Items:
    """Calls and seconds by what is run."""

    def __init__(self) -> None:
        self.count: dict[_Key, float] = defaultdict(float)
        self.own_s: dict[_Key, float] = defaultdict(float)
        self.in_full_s: dict[_Key, float] = defaultdict(float)  # of own_s
        self.host_s: dict[Term, float] = defaultdict(float)

    def add(self, work: Work, times: int) -> None:
        """A pass's items; also what the host takes for them, by term."""
        many = len(work.items)
        counts = np.bincount(work.template, minlength=many)
        in_order_s = np.where(beside_layers(work), 0.0, work.device_s)
        own_s, in_full_s, host_s, waits_s = (
            np.bincount(work.template, weights=column, minlength=many)
            for column in (work.device_s, in_order_s, work.host_s, work.waits_s)
        )
        first = {int(template): row for row, template in reversed(list(enumerate(work.template.tolist())))}
        for template, row in first.items():
            term = TERMS[int(work.term[row])]
            self.host_s[term] += float(host_s[template]) * times
            item = work.items[template]
            if isinstance(item, Op) and item.on_host:
                continue
            phase = PHASES[
                int(work.phase[row])
            ]  # of a bucket another one than of the sum that it is cut from
            key = _key(item, term, phase)
            self.count[key] += float(counts[template]) * times
            self.own_s[key] += float(own_s[template]) * times
            self.in_full_s[key] += float(in_full_s[template]) * times
            if isinstance(item, Collective) and waits_s[template] > 0:
                self.own_s[_key(item, Term.WAITING, phase)] += float(waits_s[template]) * times

    def add_host(self, work: Work, times: int) -> None:
        """What the host takes to issue a pass's items, by module."""
        for template, host_s in zip(work.template.tolist(), work.host_s.tolist(), strict=True):
            item = work.items[template]
            self._issues(item.module, item.phase, 1.0 * times, host_s * times)

    def add_waits(self, waits: dict[tuple[str, str], float], micro_batches: int) -> None:
        """waits: of one micro-batch and the step's end."""
        for (module, name), seconds in waits.items():
            phase = Phase(name)
            if phase in ONCE:
                self.in_full_s[self._issues(module, phase, 0.0, seconds)] += seconds
            else:
                self._issues(module, phase, 0.0, seconds * micro_batches)

    def _issues(self, module: str, phase: Phase, count: float, seconds: float) -> _Key:
        key = (LineKind.ISSUING, Term.LAUNCH, _pass_of(phase), _module(module), "", "")
        self.count[key] += count
        self.own_s[key] += seconds
        return key

    def lines(
        self, terms: dict[Term, float], but: Term | None = None, only: Term | None = None
    ) -> list[PredictedLine]:
        """Each term's seconds: what counts in full, and the rest dealt out over its items."""
        sums, in_full = (_by_term(each) for each in (self.own_s, self.in_full_s))
        shares = {term: _shares(s, in_full[term], sums[term] - in_full[term]) for term, s in terms.items()}
        made = []
        for key, own_s in self.own_s.items():
            kind, term, step_pass, module, op, shapes = key
            if term not in terms or term is but or (only is not None and term is not only):
                continue
            of_full, of_rest = shares[term]
            full_s = self.in_full_s.get(key, 0.0)
            use = Use(self.count.get(key, 0.0), (full_s * of_full + (own_s - full_s) * of_rest) * _NS)
            made.append(PredictedLine(kind, term.value, step_pass, module, op, shapes, use, own_s * _NS))
        return made


def _by_term(seconds: dict[_Key, float]) -> dict[Term, float]:
    sums: dict[Term, float] = defaultdict(float)
    for key, each_s in seconds.items():
        sums[key[1]] += each_s
    return sums


def _shares(term_s: float, in_full_s: float, rest_s: float) -> tuple[float, float]:
    """What of its items' own seconds a term has: of those that count in full, and of the rest."""
    if rest_s <= 1e-12 * in_full_s:  # floating point leaves something of nothing
        return (term_s / in_full_s if in_full_s > 0 else 0.0), 0.0
    kept_s = min(in_full_s, max(term_s, 0.0))
    return (kept_s / in_full_s if in_full_s > 0 else 0.0), (term_s - kept_s) / rest_s


def _apart(terms: dict[Term, float], items: _Items, issuing: _Items) -> dict[Term, float]:
    """The terms with what the host takes for their ops moved to its own, where that is in them."""
    moved = sum(issuing.own_s.values())
    if not moved:
        return terms
    apart = {term: seconds - items.host_s.get(term, 0.0) for term, seconds in terms.items()}
    apart[Term.LAUNCH] += moved
    return apart


def _rest(terms: dict[Term, float], lines: list[PredictedLine]) -> list[PredictedLine]:
    """Of each term what no line has."""
    booked: dict[str, float] = defaultdict(float)
    for line in lines:
        booked[line.term] += line.use.ns
    made = []
    for term, seconds in terms.items():
        left = seconds * _NS - booked[term.value]
        if abs(left) >= 0.5:  # ns: less is what floating point leaves
            kind = LineKind.ISSUING if term is Term.LAUNCH else LineKind.WORK
            made.append(PredictedLine(kind, term.value, "", "", term.value, "", Use(0.0, left), left))
    return made


def _key(item: Op | Collective, term: Term, phase: Phase) -> _Key:
    where = _pass_of(phase), _module(item.module)
    if isinstance(item, Collective):
        return LineKind.EXCHANGE, term, *where, item.call.kind.value, ""
    shapes = " ".join(f"[{','.join(map(str, spec.shape))}]" for spec in item.inputs if spec.shape)[
        :MOST_SHAPES
    ]
    return LineKind.WORK, term, *where, item.name, shapes


def _pass_of(phase: Phase) -> str:
    found = Pass.END if phase in ONCE else Pass.BACKWARD if phase in BACKWARDS else Pass.FORWARD
    return found.name.lower()


def _module(name: str) -> str:
    """Of any layer; the loss is no module in a profile either."""
    return "" if name == LOSS_MODULE else any_layer(name)


def _largest_first(line: PredictedLine) -> tuple[float, str, str, str, str, str]:
    return -line.use.ns, line.term, line.step_pass, line.module, line.op, line.shapes
