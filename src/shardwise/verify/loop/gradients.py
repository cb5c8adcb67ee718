"""Why gradients of a loop are wrong.

What the optimizer finds at the first wrong step is held against what would be wrong in a known way: what this
rank alone finds on its part of the batch (nobody sums), the whole's times one factor (the loss's scale, or
clipping), the mean of what ranks find (each divides by its own tokens). What is none of these goes to
reasons.py, with how the pieces along each axis relate to the whole.
"""

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.mesh import Role, role_of
from shardwise.parallel.apply import applied_to
from shardwise.parallel.parameters import part_of_dtensor
from shardwise.verify.along import Along
from shardwise.verify.evidence import Evidence
from shardwise.verify.exchange import all_agree, gathered, largest
from shardwise.verify.expected import Differences, GradientError
from shardwise.verify.held import held_over, local, size
from shardwise.verify.loop.differences import OffAtStep
from shardwise.verify.loop.record import StepRecord, Tensors
from shardwise.verify.loop.runs import Runs
from shardwise.verify.reasons import explain_differences
from shardwise.verify.relation import Related, Relation, relate

CLOSE = 1e-3
"""Of what the optimizer finds, relative: a known fault explains it. Other faults are off by 1e-2 and more."""


def gradients_at(runs: Runs, at: int) -> list[Finding]:
    off, one, other = runs.off.steps[at], runs.sharded.steps[at], runs.whole.steps[at]
    if one.given is not None and off.raw is not None and not off.raw:
        return [_after_the_backward(runs, at)]
    error = max([*off.given.values(), *(off.raw or {}).values()])
    found = _unsummed(runs, at) or _scaled(runs, one, other) or _own_means(runs, at)
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
    return _of_own_part(" and ".join(runs.data))


def _of_own_part(along: str) -> Told:
    reason = (
        f"each rank along {along} keeps the gradients of its own part of the batch, and nothing sums them"
    )
    advice = f"Sum gradients over {along} after the backward, as DDP and FSDP2 do."
    return Cause.PARTS_NOT_SUMMED, reason, advice


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
    """By parameter: how the pieces of the ranks along each axis relate to the whole. Of what the backward
    left, where fewer are wrong there: clipping passes one wrong gradient on to all. Not where the step sums
    them later."""
    is_raw = off.raw is not None and 0 < len(off.raw) <= len(off.given)
    is_raw = is_raw and not (len(off.raw or ()) == len(off.given) and _is_summed_later(one))
    wrong = off.raw if is_raw and off.raw is not None else off.given
    gradients, whole = one.gradients, other.gradients
    if is_raw and one.raw is not None and other.raw is not None:
        gradients, whole = one.raw, other.raw
    names = [name for name in wrong if whole.get(name) is not None]
    related, along = _along_axes(runs, gradients, whole, names)
    parts = {each.named for each in along.values() if each.relation is Relation.PARTS}
    if len(along) == len(wrong) == len(one.gradients) and len(parts) == 1:
        (axis,) = parts
        return [_all_unsummed(axis, max(wrong.values()))]
    errors = {name: GradientError(error, float("inf")) for name, error in wrong.items()}
    known = Differences(0.0, 0.0, errors, runs.allowed.tolerance)
    n_ranks = runs.mesh.size() // max(1, runs.parts)
    found = explain_differences(Evidence(runs.model, n_ranks, known, None, related, along=along))
    told = {each.subject for each in found}
    reason = "its gradient isn't the one process's"
    found += [
        Finding(FindingKind.GRADIENT_DIFFERS, name, reason, error, cause=Cause.UNKNOWN)
        for name, error in wrong.items()
        if name not in told
    ]
    return found


def _is_summed_later(one: StepRecord) -> bool:
    """Whether the step changes gradients between backward and optimizer by more than a factor. All ranks call
    it."""
    is_scaled = one.raw is None or one.given is None or _fit(one.given, one.raw)[1] <= CLOSE
    return not all_agree(is_scaled)


def _along_axes(
    runs: Runs, gradients: Tensors, whole: Tensors, names: Sequence[str]
) -> tuple[dict[str, Related], dict[str, Along]]:
    """(by parameter, how its pieces along an axis relate to the whole; those that lack a sum over an axis
    whose ranks see other tokens). All ranks call it."""
    related: dict[str, Related] = {}
    along: dict[str, Along] = {}
    axes = runs.mesh.mesh_dim_names or ()
    for axis in sorted(axes, key=lambda name: name in runs.data):
        group = runs.mesh.get_group(axis)
        if group.size() == 1:
            continue
        every = gathered([held_over(gradients.get(name), runs.model, (axis,)) for name in names], group)
        for at, name in enumerate(names):
            pieces = [each[at] for each in every]
            if role_of(axis) is Role.CUTS_DEPTH:  # other stages hold other parameters, but for a tied one
                pieces = [piece for piece in pieces if piece is not None]
            expected = whole[name]
            if len(pieces) < 2 or expected is None:
                continue
            limit = runs.allowed.gradients[0].get(name, 0.0) / (size(expected) or 1.0)
            found = relate(pieces, expected, tolerance=max(runs.allowed.tolerance, limit))
            if axis in runs.data and found.relation is Relation.PARTS and found.factor is None:
                along.setdefault(name, Along((axis,), len(pieces)))
            known = related.get(name)
            if known is None or (known.relation in _VAGUE and found.relation not in _VAGUE):
                related[name] = found
    return related, along


_VAGUE = frozenset({Relation.OTHER, Relation.UNEQUAL, Relation.PARTS})


def _all_unsummed(axis: str, error: float) -> Finding:
    cause, reason, advice = _of_own_part(axis)
    kind = FindingKind.GRADIENT_DIFFERS
    return Finding(kind, "all gradients", reason, error, advice=advice, cause=cause)


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
