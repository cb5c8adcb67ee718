"""Why a loop doesn't train as one process does: what explains the rest comes first, and what follows last.

gradients.py says why gradients are wrong; here are all other differences, and what explains what.
"""

from dataclasses import replace

import torch.distributed as dist

from shardwise.core.drift import Drift, Held
from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.verify.exchange import largest
from shardwise.verify.loop.gradients import gradients_at
from shardwise.verify.loop.runs import Runs

Placed = tuple[int, int, Finding]
"""From which step on, from 0; how early it stands in what a step does; what."""


def findings(runs: Runs) -> list[Finding]:
    """All ranks call it; all come to the same. The earliest explains what is computed after it."""
    given = [*_optimizer(runs), *_inputs(runs), *_kept(runs), *_between(runs), *_settings(runs)]
    gradients, numbers = _gradients(runs), _numbers(runs)
    if gradients and all(finding.cause is Cause.UNKNOWN for _, _, finding in gradients):
        numbers = [_of_forward(each) if each[0] == gradients[0][0] else each for each in numbers]
    computed = [*_drifted(runs), *gradients, *numbers]
    placed = sorted([*given, *computed], key=lambda each: each[:2])
    if not placed:
        return _left(runs, None)
    first, found = placed[0], []
    for each in placed:
        finding = each[2]
        is_explained = each in computed or first[1] == _STALE
        if is_explained and each[:2] != first[:2] and not (first[1] >= _RETURNED > each[1]):
            finding = replace(finding, follows=first[2].subject)
        found.append(finding)
    return sorted(found, key=lambda each: each.follows is not None) + _left(runs, first[2].subject)


_STALE, _GIVEN, _KEPT, _SET, _HELD, _COMPUTED, _RETURNED = range(7)
"""How early something stands in a step: the optimizer, its input, what is left, settings, weights, gradients,
and the loss and norm that it returns, which nothing is computed from."""


def _of_forward(placed: Placed) -> Placed:
    """A wrong loss in the step whose gradients are wrong in no way that tells: it is what explains them."""
    at, _, finding = placed
    if finding.kind is not FindingKind.LOSS_DIFFERS:
        return placed
    reason = f"{finding.reason}: the forward is another one already"
    advice = "shardwise verify names the module of the model where it begins."
    return at, _HELD, replace(finding, reason=reason, advice=advice)


def _optimizer(runs: Runs) -> list[Placed]:
    strangers = int(largest(float(runs.sharded.strangers)))
    if not strangers:
        return []
    reason = (
        f"it holds {strangers} parameters that aren't the sharded model's, so those are never trained: it "
        "was "
        "made before the model was sharded"
    )
    advice = "Make it after all that replaces parameters: parallelize(), fully_shard(), DTensor."
    return [(0, _STALE, Finding(FindingKind.WEIGHTS_DIFFER, "optimizer", reason, advice=advice))]


def _inputs(runs: Runs) -> list[Placed]:
    """What ranks that should see the same tokens were given apart."""
    first = next((each for each in runs.drifts if each.held is Held.INPUT), None)
    if first is None:
        return []
    along = " and ".join(first.axes)
    advice = (
        f"Give the ranks along {along} the same batch: which part a rank reads is said by its place on the "
        "mesh's other axes."
    )
    return [(first.step - 1, _GIVEN, _of_drift(first, advice))]


def _drifted(runs: Runs) -> list[Placed]:
    """Weights and buffers that ranks should hold alike, and no longer do."""
    first = next((each for each in runs.drifts if each.held is not Held.INPUT), None)
    return [] if first is None else [(first.step - 1, _HELD, _of_drift(first, first.advice))]


def _of_drift(drift: Drift, advice: str) -> Finding:
    reason, cause = f"at step {drift.step} it {drift.where}", Cause.RANKS_DRIFT
    return Finding(FindingKind.RANKS_DISAGREE, drift.named, reason, advice=advice, cause=cause)


def _kept(runs: Runs) -> list[Placed]:
    """Gradients of a step that the next one adds to."""
    for at, step in enumerate(runs.sharded.steps):
        n_kept = int(largest(float(len(step.kept))))
        if n_kept:
            on_one = "on one process too" if runs.whole.steps[at].kept else "and one process has none"
            reason = (
                f"as the backward of step {at + 1} begins, {n_kept} parameters still have gradients of the "
                "step "
                f"before, {on_one}: nobody zeroed them"
            )
            advice = "Call optimizer.zero_grad(), of the optimizer that holds the sharded parameters."
            return [(at, _KEPT, Finding(FindingKind.GRADIENT_DIFFERS, "zero_grad", reason, advice=advice))]
    return []


def _between(runs: Runs) -> list[Placed]:
    """Gradients that are changed before all micro-batches have given theirs."""
    for at, (one, other) in enumerate(zip(runs.sharded.steps, runs.whole.steps, strict=True)):
        every: list[float | None] = [None] * dist.get_world_size()
        dist.all_gather_object(every, one.between if other.between is None else None)
        factor = next((each for each in every if each is not None), None)
        if factor is not None:
            is_dropped = abs(factor) < 1e-6
            what = "dropped" if is_dropped else f"multiplied by {factor:.3g}"
            lost = "is lost" if is_dropped else "counts less, or more, than the rest"
            reason = (
                f"between two backwards of step {at + 1} they are {what}, and on one process they aren't: "
                f"what earlier micro-batches gave {lost}"
            )
            cause = Cause.NOTHING_ARRIVES if is_dropped else Cause.AVERAGED
            advice = "Zero, scale and clip gradients outside of the micro-batches of a step."
            kind = FindingKind.GRADIENT_DIFFERS
            finding = Finding(kind, "all gradients", reason, None, factor, advice, cause)
            return [(at, _KEPT, finding)]
    return []


def _settings(runs: Runs) -> list[Placed]:
    """What the optimizer steps with: learning rates, weight decay and all other numbers of its groups."""
    told: list[tuple[int, str, str, object, object]] = []
    for at, (one, other) in enumerate(zip(runs.sharded.steps, runs.whole.steps, strict=True)):
        for name, settings in one.settings.items():
            for key, value in settings.items():
                whole = other.settings.get(name, {}).get(key, value)
                if not _equal(value, whole):
                    told.append((at, key, name, value, whole))
    every: list[list[tuple[int, str, str, object, object]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, told)
    wrong = [rank for rank, each in enumerate(every) if each]
    if not wrong:
        return []
    at, key, name, value, whole = min(every[wrong[0]], key=lambda each: each[0])
    n_names = len({each[2] for each in every[wrong[0]] if each[:2] == (at, key)})
    others = f" and of {n_names - 1} more" if n_names > 1 else ""
    on = "" if len(wrong) == len(every) else f" on rank {', '.join(map(str, wrong))}"
    reason = f"at step {at + 1} the {key} of {name}{others} is {value}{on}, and {whole} on one process"
    advice = "Sort parameters into groups by what sharding doesn't change, and step schedules on all ranks."
    return [(at, _SET, Finding(FindingKind.WEIGHTS_DIFFER, f"optimizer's {key}", reason, advice=advice))]


def _equal(one: object, other: object) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) <= 1e-9 * max(abs(one), abs(other))
    return one == other


# ---------------------------------------------------------------------- what is computed


def _gradients(runs: Runs) -> list[Placed]:
    """Of the first step whose optimizer finds other gradients."""
    at = next((at for at, step in enumerate(runs.off.steps) if step.given), None)
    return [] if at is None else [(at, _COMPUTED, each) for each in gradients_at(runs, at)]


def _numbers(runs: Runs) -> list[Placed]:
    """The first step's loss and norm that are wrong. A loss explains more than what comes of it."""
    found: list[Placed] = []
    for what, kind in (("loss", FindingKind.LOSS_DIFFERS), ("norm", FindingKind.WEIGHTS_DIFFER)):
        offs = [step.loss if what == "loss" else step.norm for step in runs.off.steps]
        at = next((at for at, off in enumerate(offs) if off), None)
        if at is None:
            continue
        one, other = runs.sharded.steps[at], runs.whole.steps[at]
        values = (one.loss, other.loss) if what == "loss" else (one.norm, other.norm)
        named = "loss" if what == "loss" else "gradient norm"
        where = f"on rank {dist.get_rank()}, and {values[1]:.6g} on one process"
        reason = f"step {at + 1} returns {values[0]:.6g} {where}"
        every: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(every, reason)
        found.append((at, _RETURNED, Finding(kind, named, every[0], offs[at])))
    return found


def _left(runs: Runs, follows: str | None) -> list[Finding]:
    """Weights, states and buffers that aren't the one process's after the steps."""
    n, found, off = len(runs.whole.steps), [], runs.off
    kinds = [("", off.weights), *((kind, each) for kind, each in off.states.items())]
    for kind, wrong in kinds:
        worst = max(wrong, key=lambda name: wrong[name], default="")
        if worst:
            what = f"its {kind} in the optimizer isn't" if kind else "it isn't moved as"
            others = f", nor {len(wrong) - 1} more" if len(wrong) > 1 else ""
            reason = f"after {n} steps {what} the one process's{others}"
            found.append(Finding(FindingKind.WEIGHTS_DIFFER, worst, reason, wrong[worst], follows=follows))
    for name, error in off.buffers.items():
        reason = f"after {n} steps this buffer isn't the one process's"
        found.append(Finding(FindingKind.WEIGHTS_DIFFER, name, reason, error, follows=follows))
    return found
