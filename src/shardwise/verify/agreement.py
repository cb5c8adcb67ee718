"""Compares a sharded model with the unsharded one: the loss and every gradient.

Every rank computes the unsharded reference whole, so the comparison moves three numbers per parameter. For a parameter with sharded
gradient s and unsharded gradient u, over all ranks' parts: relative error ||s - u|| / max(||u||, floor), ratio <s, u> / <u, u>.
floor = 64 eps G / tolerance, with G the norm of the whole unsharded gradient: a gradient that is zero but for rounding (of a key's bias,
where softmax takes no notice of it) is then no finding.
A gradient that is Partial (PyTorch's own sequence parallelism leaves norm gradients so) is summed first: that is what it stands for.
The native engine promises gradients placed as their parameters are, so a Partial one of its is taken as it is, and found.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.core.finding import Agreement, Finding, FindingKind
from shardwise.core.plan import Engine
from shardwise.parallel.apply import applied_to, loss_of
from shardwise.parallel.parameters import part_of_dtensor
from shardwise.verify.exchange import largest

# float64 rounding of a model of this kind stays below 1e-12; a wrong reduction starts at 1e-2
TOLERANCE = 1e-10


@dataclass(frozen=True, slots=True)
class Reference:
    """The unsharded model's loss and whole gradients by parameter name."""

    loss: float
    gradients: dict[str, Tensor]


def reference(model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Reference:
    """Runs the unsharded model forward and backward once."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model)(model(ids_BS), labels_BS)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Reference(loss.item(), gradients)


def agreement(
    model: nn.Module,
    ids_BS: Tensor,
    labels_BS: Tensor,
    whole: Reference,
    *,
    layers: int,
    tolerance: float = TOLERANCE,
    run: Callable[[], Tensor] | None = None,
) -> Agreement:
    """Runs the sharded model on the same batch and compares. All ranks must call it; all get the same answer.

    run: computes loss and gradients in another way than one forward and backward (micro-batches), and returns the loss.
    """
    model.zero_grad(set_to_none=True)
    if run is None:
        loss_function = loss_of(model)
        loss = loss_function(model(ids_BS), labels_BS)
        with loss_function.backward_context():
            loss.backward()
    else:
        loss = run()
    plan = applied_to(model).plan
    findings: list[Finding] = []
    loss_error = _largest(abs(loss.item() - whole.loss) / abs(whole.loss))
    if not loss_error <= tolerance:
        findings.append(
            Finding(
                FindingKind.LOSS_DIFFERS,
                "loss",
                f"the loss differs from the unsharded model's {whole.loss:.6g}",
                loss_error,
            )
        )
    names = [name for name, _ in model.named_parameters()]
    sums = _sums(model, whole)
    worst_name, worst_error = "", 0.0
    floor = 64 * torch.finfo(next(model.parameters()).dtype).eps * float(sums[:, 1].sum()) ** 0.5 / tolerance
    for name, (difference, own, product) in zip(names, sums.tolist(), strict=True):
        if name in whole.gradients and difference < 0:
            findings.append(Finding(FindingKind.GRADIENT_MISSING, name, "no gradient arrived on some rank"))
            continue
        scale = max(own**0.5, floor)
        error = (
            difference**0.5 / scale
            if difference >= 0 and scale
            else (0.0 if difference == 0 else float("inf"))
        )
        ratio = product / own if own else None
        if not error <= worst_error:
            worst_name, worst_error = name, error
        if not error <= tolerance:
            findings.append(Finding(FindingKind.GRADIENT_DIFFERS, name, _reason(ratio), error, ratio))
    return Agreement(
        plan=plan.name if plan is not None else "unsharded",
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        layers=layers,
        parameters_compared=len(names),
        loss_error=loss_error,
        worst_gradient=worst_name,
        worst_gradient_error=worst_error,
        tolerance=tolerance,
        findings=tuple(findings),
    )


def _sums(model: nn.Module, whole: Reference) -> Tensor:
    """[parameters, 3]: ||s - u||^2, ||u||^2, <s, u> over all ranks' parts; the first is negative where a rank has no gradient."""
    rows = []
    applied = applied_to(model)
    row_order = applied.row_order
    may_be_partial = applied.plan is None or applied.plan.engine is Engine.DTENSOR
    device = next(model.parameters()).device
    for name, parameter in model.named_parameters():
        expected = whole.gradients.get(name)
        if parameter.grad is None or expected is None:
            # a parameter that takes no part in the loss has a gradient on neither side
            rows.append(
                torch.tensor([0.0 if parameter.grad is None and expected is None else -torch.inf, 0.0, 0.0])
            )
            continue
        grad: Tensor = parameter.grad
        if isinstance(grad, DTensor) and any(p.is_partial() for p in grad.placements):
            if may_be_partial:
                grad = grad.full_tensor()
            else:
                assert isinstance(parameter, DTensor)
                grad = DTensor.from_local(
                    grad.to_local(), parameter.device_mesh, parameter.placements, run_check=False
                )
        if isinstance(grad, DTensor):
            part = part_of_dtensor(expected, grad, row_order.get(name)).to_local()
            grad = grad.to_local()
        else:
            part = expected
        got, want = grad.double().flatten(), part.double().flatten()
        rows.append(torch.stack(((got - want).square().sum(), want.square().sum(), (got * want).sum())).cpu())
    sums = torch.stack(rows).double().to(device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.cpu()


def _largest(value: float) -> float:
    return largest(value, dist.group.WORLD) if dist.group.WORLD is not None else value


def _reason(ratio: float | None) -> str:
    if ratio is None:
        return "its gradient is not zero, as the unsharded one is"
    for factor in (2, 3, 4, 8):
        if abs(ratio - factor) < 1e-6:
            return f"its gradient is {factor} times the unsharded one: it was summed where every rank had the whole"
        if abs(ratio - 1 / factor) < 1e-6:
            return f"its gradient is 1/{factor} of the unsharded one: parts were not summed, or averaged"
    return "its gradient is not the unsharded one"
