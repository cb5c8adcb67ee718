"""Why a loop doesn't train as one process does: what explains the rest comes first, and what follows last.

What the optimizer finds at the first wrong step is held against what would be wrong in a known way: what this
rank alone finds on its part of the batch (nobody sums), the mean of those (each divides by its own tokens),
the whole's times one factor (the loss's scale, or clipping). What is none of these goes to reasons.py, with
how the pieces along the other axes relate to the whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.core.drift import Drift, Held
from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.parallel.apply import applied_to
from shardwise.parallel.parameters import part_of_dtensor
from shardwise.verify.evidence import Evidence
from shardwise.verify.exchange import all_agree, gathered, largest
from shardwise.verify.expected import Differences, GradientError
from shardwise.verify.held import held_over, local, size
from shardwise.verify.loop.differences import Allowed, Off, OffAtStep
from shardwise.verify.loop.record import Record, StepRecord, Tensors
from shardwise.verify.reasons import explain_differences
from shardwise.verify.relation import relate

CLOSE = 1e-3
"""Of what the optimizer finds, relative: a known fault explains it. Other faults are off by 1e-2 and more."""


@dataclass(frozen=True, slots=True)
class Runs:
    """All that is known. data: axes whose ranks see other parts of the batch, of `parts` parts; own: what one
    process does on this rank's part alone; None where there is one part."""

    model: nn.Module
    mesh: DeviceMesh
    data: tuple[str, ...]
    parts: int
    sharded: Record
    whole: Record
    own: Record | None
    allowed: Allowed
    off: Off
    drifts: Sequence[Drift]


Placed = tuple[int, int, Finding]
"""From which step on, from 0; how early it stands in what a step does; what."""


def findings(runs: Runs) -> list[Finding]:
    """All ranks call it; all come to the same. The earliest explains what is computed after it."""
    given = [*_optimizer(runs), *_inputs(runs), *_kept(runs), *_settings(runs)]
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


# ------------------------------------------------------------------------------------- gradients


def _gradients(runs: Runs) -> list[Placed]:
    """Of the first step whose optimizer finds other gradients."""
    at = next((at for at, step in enumerate(runs.off.steps) if step.given), None)
    return [] if at is None else [(at, _COMPUTED, each) for each in _gradients_at(runs, at)]


def _gradients_at(runs: Runs, at: int) -> list[Finding]:
    off, one, other = runs.off.steps[at], runs.sharded.steps[at], runs.whole.steps[at]
    if one.given is not None and off.raw is not None and not off.raw:
        return [_after_the_backward(runs, at)]
    error = max([*off.given.values(), *(off.raw or {}).values()])
    found = _unsummed(runs, at) or _own_means(runs, at) or _scaled(runs, one, other)
    if found is not None:
        cause, reason, advice = found
        step = f"at step {at + 1} " if at else ""
        kind = FindingKind.GRADIENT_DIFFERS
        return [Finding(kind, "all gradients", f"{step}{reason}", error, advice=advice, cause=cause)]
    return _by_relation(runs, off, one, other)


def _after_the_backward(runs: Runs, at: int) -> Finding:
    """The backward's are right, and not what the optimizer finds."""
    one, other = runs.sharded.steps[at], runs.whole.steps[at]
    assert one.raw is not None
    assert other.raw is not None
    scale, rest = _fit(one.gradients, one.raw)
    whole_scale, _ = _fit(other.gradients, other.raw)
    own_norm, whole_norm = _size(one.raw), _size(other.raw)
    told: list[tuple[float, float, float]] = [(0.0, 0.0, 0.0)] * dist.get_world_size()
    dist.all_gather_object(told, (scale, rest, own_norm))
    error = max(runs.off.steps[at].given.values())
    kind, subject = FindingKind.WEIGHTS_DIFFER, "gradient norm"
    if any(rest > CLOSE for _, rest, _ in told):
        reason = (
            "gradients are right after the backward, and the optimizer finds others: what changes them in "
            "between does it in another way than on one process"
        )
        return Finding(kind, subject, reason, error)
    scales = sorted({round(scale, 6) for scale, _, _ in told})
    by = f"{scales[0]:.4g}" if len(scales) == 1 else f"{scales[0]:.4g} to {scales[-1]:.4g} on the ranks"
    reason = (
        f"gradients are right after the backward, and are then scaled by {by}, on one process by "
        f"{whole_scale:.4g}: they are clipped by another norm"
    )
    largest_norm = whole_scale * whole_norm
    if all(abs(scale * norm - largest_norm) <= CLOSE * largest_norm for scale, _, norm in told):
        reason += ", that of what each rank alone holds"
    advice = (
        "Take the norm of the whole gradients, each element once: torch.nn.utils.clip_grad_norm_ does "
        "where all "
        "parameters are DTensors of one mesh; else sum the squares over the ranks that hold other parts."
    )
    return Finding(kind, subject, reason, error, advice=advice)


Told = tuple[Cause, str, str]


def _unsummed(runs: Runs, at: int) -> Told | None:
    """Each rank has what it finds on its own part of the batch."""
    if runs.own is None:
        return None
    _, rest = _fit(runs.sharded.steps[at].gradients, _parts_of(runs, runs.own.steps[at].gradients))
    if at or not all_agree(rest <= CLOSE):
        return None
    along = " and ".join(runs.data)
    reason = (
        f"each rank along {along} keeps the gradients of its own part of the batch, and nothing sums them"
    )
    return (
        Cause.PARTS_NOT_SUMMED,
        reason,
        f"Sum gradients over {along} after the backward, as DDP and FSDP2 do.",
    )


def _own_means(runs: Runs, at: int) -> Told | None:
    """The mean of what ranks find, each on its own part with a loss that is a mean over that part."""
    if runs.own is None or at:
        return None
    own = runs.own.steps[at]
    means: Tensors = {}
    for name, each in (own.raw or own.gradients).items():
        if each is not None:
            summed = each.double().clone()
            dist.all_reduce(summed)  # ranks of other axes have the same parts: a mean all the same
            means[name] = summed / dist.get_world_size()
    _, rest = _fit(runs.sharded.steps[at].gradients, _parts_of(runs, means))
    if not all_agree(rest <= CLOSE):
        return None
    reason = (
        "they are the mean of what the ranks' own losses give: each rank divides by the tokens of its own "
        "part of "
        "the batch, and the parts have other numbers of them"
    )
    advice = (
        "Divide each rank's sum by the whole batch's number of labels (valid= in shardwise.loss_of), and "
        "have "
        "gradients summed: in FSDP2 set_gradient_divide_factor(1.0) and "
        "set_force_sum_reduction_for_comms(True); in "
        "DDP multiply the loss by the number of ranks."
    )
    return Cause.AVERAGED, reason, advice


def _scaled(runs: Runs, one: StepRecord, other: StepRecord) -> Told | None:
    """All of them are one multiple of the whole's: as the optimizer finds them, or, where clipping has made
    that good, as the backward leaves them."""
    factor = _one_factor(runs, one.gradients, other.gradients)
    if factor is None and all_agree(one.raw is not None and other.raw is not None):
        assert one.raw is not None
        assert other.raw is not None
        factor = _one_factor(runs, one.raw, other.raw)
    if factor is None:
        return None
    n = next((n for n in range(2, 65) if abs(factor - n) < CLOSE * n), None)
    part = next((n for n in range(2, 65) if abs(factor - 1 / n) < CLOSE / n), None)
    times = f"{n} times" if n else f"1/{part} of" if part else f"{factor:.4g} times"
    reason = f"they are {times} those of one process: the loss is scaled, summed or averaged in another way"
    cause = Cause.SUMMED_TOO_OFTEN if factor > 1 else Cause.AVERAGED
    return (
        cause,
        reason,
        "Look at what the loss is divided by, and at who averages gradients: FSDP2 and DDP do, over their "
        "ranks.",
    )


def _one_factor(runs: Runs, tensors: Tensors, whole: Tensors) -> float | None:
    """Not 1, and the same on all ranks."""
    factor, rest = _fit(tensors, _parts_of(runs, whole))
    low, high = -largest(-factor), largest(factor)
    is_one = rest <= CLOSE < abs(factor - 1) and high - low <= CLOSE * abs(high)
    return factor if all_agree(is_one) else None


def _by_relation(runs: Runs, off: OffAtStep, one: StepRecord, other: StepRecord) -> list[Finding]:
    """By parameter: how the pieces of the ranks that see the same tokens relate to the whole."""
    is_raw = bool(off.raw) and one.raw is not None and other.raw is not None
    gradients = one.raw if is_raw and one.raw is not None else one.gradients
    whole = other.raw if is_raw and other.raw is not None else other.gradients
    wrong = off.raw if is_raw and off.raw is not None else off.given
    names = [name for name in wrong if whole.get(name) is not None]
    axes = [name for name in runs.mesh.mesh_dim_names or () if name not in runs.data]
    limits, tolerance = runs.allowed.gradients[0], runs.allowed.tolerance
    related = {}
    if len(axes) == 1:
        group = runs.mesh.get_group(axes[0])
        pieces = gathered([held_over(gradients.get(name), runs.model, axes) for name in names], group)
        for at, name in enumerate(names):
            expected = whole[name]
            assert expected is not None
            close = max(tolerance, limits.get(name, 0.0) / (size(expected) or 1.0))
            related[name] = relate([each[at] for each in pieces], expected, tolerance=close)
    errors = {name: GradientError(error, float("inf")) for name, error in wrong.items()}
    known = Differences(0.0, 0.0, errors, tolerance)
    found = explain_differences(
        Evidence(runs.model, runs.mesh.size() // max(1, runs.parts), known, None, related)
    )
    told = {each.subject for each in found}
    reason = "its gradient isn't the one process's"
    found += [
        Finding(FindingKind.GRADIENT_DIFFERS, name, reason, error, cause=Cause.UNKNOWN)
        for name, error in wrong.items()
        if name not in told
    ]
    return found


def _fit(tensors: Tensors, like: Tensors) -> tuple[float, float]:
    """(the factor k with which k x like is nearest to this rank's tensors, how far off that is, relative)."""
    pairs = [
        (local(each).double(), local(other).double())
        for name, each in tensors.items()
        if each is not None and (other := like.get(name)) is not None
    ]
    if any(one.shape != other.shape for one, other in pairs):
        return 0.0, float("inf")
    product = sum(float((one * other).sum()) for one, other in pairs)
    own = sum(float(other.square().sum()) for _, other in pairs)
    total = sum(float(one.square().sum()) for one, _ in pairs)
    if not own or not total:
        return 0.0, 0.0 if not total else float("inf")
    factor = product / own
    rest = sum(size(one - factor * other) ** 2 for one, other in pairs)
    return factor, (rest / total) ** 0.5


def _parts_of(runs: Runs, whole: Tensors) -> Tensors:
    """Of whole tensors, what this rank holds of each."""
    order = applied_to(runs.model).row_order
    held: Mapping[str, Tensor] = dict(runs.model.named_parameters())
    found: Tensors = {}
    for name, each in whole.items():
        like = held.get(name)
        if each is not None and isinstance(like, DTensor):
            each = part_of_dtensor(each, like, order.get(name)).to_local()
        found[name] = each
    return found


def _size(tensors: Tensors) -> float:
    return float(sum(size(local(each)) ** 2 for each in tensors.values() if each is not None) ** 0.5)


# ------------------------------------------------------------------------------- what else differs


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
