"""Runs a toy, whole or on ranks: Toy -> Run, what one rank had.

The styles are the native engine's own, by parallelize(); ranks are threads (thread_ranks.py). What goes over
the wire is what the collectives were handed; what lies between is what the styles show (parallel/watch.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.core.errors import RunError
from shardwise.core.plan import Plan, ReduceScatter, Rule
from shardwise.core.walkthrough import Phase
from shardwise.parallel.apply import loss_of, parallelize
from shardwise.parallel.watch import watched_by
from shardwise.walkthrough.subject import Cut, Subject
from shardwise.walkthrough.thread_ranks import Exchanged
from shardwise.walkthrough.toy import DTYPE, LossToy, Toy


@dataclass(slots=True)
class Run:
    """What one rank had (or the unsharded module): tensors without the batch, [S, ...]; collectives by phase.

    shown: what the style showed of its inside, by name.
    """

    parameter: Tensor
    input: Tensor
    output: Tensor
    output_gradient: Tensor
    input_gradient: Tensor
    gradient: Tensor
    shown: dict[str, Tensor]
    exchanges: dict[Phase, list[Exchanged]]


def plan_of(subject: Subject) -> Plan:
    """For a model whose one module is called "module"."""
    assert subject.style is not None
    return Plan(subject.name, (Rule("module", subject.style),), reduce_scatter=ReduceScatter.BACKEND)


def run_whole(toy: Toy) -> Run:
    return _run(toy, nn.ModuleDict({"module": toy.module()}), toy.input(), toy.output_gradient(), {}, [])


def run_rank(toy: Toy, rank: int, mesh: DeviceMesh, log: list[Exchanged]) -> Run:
    model = nn.ModuleDict({"module": toy.module()})
    subject = toy.subject
    parallelize(model, plan_of(subject), mesh)
    shown: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        shown[name] = value.detach().clone()

    def part(tensor: str, whole: Tensor) -> Tensor:
        cut = subject.cut.get(tensor)
        dim = 1 if cut is Cut.ROWS else 2
        return whole if cut is None else whole.chunk(toy.ranks, dim)[rank].contiguous()

    with watched_by(keep):
        return _run(toy, model, part("input", toy.input()), part("output", toy.output_gradient()), shown, log)


def _run(
    toy: Toy,
    model: nn.ModuleDict,
    x: Tensor,
    output_gradient: Tensor,
    shown: dict[str, Tensor],
    log: list[Exchanged],
) -> Run:
    module = model["module"]
    if x.is_floating_point():
        x.requires_grad_()
    if isinstance(toy, LossToy):
        # the head makes the logits; the walk-through is of the loss, from there on
        x = module(x).detach().requires_grad_()
        log.clear()
        y = loss_of(model)(x, toy.labels())
        forward = len(log)
        with loss_of(model).backward_context():
            y.backward()
        parameter, gradient = x[0], _grad(x)[0]
        y, output_gradient = y.view(1, 1), torch.ones(1, 1, dtype=DTYPE)
    else:
        y = module(x)
        forward = len(log)
        y.backward(output_gradient)
        weight = module.get_parameter("weight")
        parameter, gradient = _local(weight), _local(_grad(weight))
    return Run(
        parameter=parameter.detach().clone(),
        input=x.detach()[0],
        output=y.detach()[0],
        output_gradient=output_gradient[0],
        input_gradient=_grad(x)[0] if x.requires_grad else torch.empty(0),
        gradient=gradient.detach().clone(),
        shown=shown,
        exchanges={Phase.FORWARD: log[:forward], Phase.BACKWARD: log[forward:]},
    )


def _grad(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise RunError("a walk-through's backward left no gradient. This is a bug in a style.")
    return tensor.grad


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
