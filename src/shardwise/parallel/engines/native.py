"""The native engine: DTensor parameters, forwards on plain local tensors, explicit collectives."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.collective import Origin
from shardwise.core.errors import PlanError
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.plan import Ownership, Plan, StyleName
from shardwise.core.program import REPLICATED_PARAMETERS
from shardwise.parallel import collectives
from shardwise.parallel.axis import Axis, Site
from shardwise.parallel.embedding import EmbeddingShard
from shardwise.parallel.layers import ColwiseLinear, RowwiseLinear, gather_input
from shardwise.parallel.loss import Loss, PlainLoss, VocabParallelLoss
from shardwise.parallel.ownership import RowOwnership
from shardwise.parallel.parameters import (
    PartialGradients,
    keep_rows_in_order,
    local_weight,
    refuse_untied,
    shard_parameter,
    take_whole_tensors,
)
from shardwise.parallel.resolve import Assignment, below_gather_input, last_linear, resolve, tied_parameters

TensorFunction = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class _Work:
    """What is collected while a plan is applied."""

    model: nn.Module
    plan: Plan
    axis: Axis
    sharded: dict[int, tuple[nn.Parameter, EmbeddingShard | None]] = field(default_factory=dict)
    partial: list[tuple[nn.Module, str]] = field(default_factory=list)
    row_order: dict[str, RowOwnership] = field(default_factory=dict)
    loss: Loss = field(default_factory=PlainLoss)


def apply_native(
    model: nn.Module, plan: Plan, mesh: DeviceMesh, *, fsdp: int
) -> tuple[Loss, dict[str, RowOwnership]]:
    """Shards `model` in place. Returns the loss for its logits and the parameters whose rows are interleaved. fsdp: see resolve()."""
    axis = Axis.of(mesh, TENSOR_AXIS, plan.reduce_scatter)
    assignments = resolve(model, plan, tp=axis.size, fsdp=fsdp)
    work = _Work(model, plan, axis)
    # an embedding decides how a weight that it shares with the head is cut
    for assignment in sorted(assignments, key=lambda a: not isinstance(a.module, nn.Embedding)):
        match assignment.module:
            case nn.Embedding():
                _apply_embedding(assignment, work)
            case nn.Linear():
                _apply_linear(assignment, work)
            case nn.RMSNorm() | nn.LayerNorm():
                _apply_norm(assignment, work)
            case _:
                _apply_gather_input(assignment, work)
    origin = Origin(REPLICATED_PARAMETERS, None, Partial(), Replicate())
    PartialGradients(model, work.partial, axis, origin)
    refuse_untied(model, set(tied_parameters(model).values()))
    return work.loss, work.row_order


def _site(assignment: Assignment, work: _Work) -> Site:
    return Site(assignment.name, assignment.rule.ref, work.axis)


def _replace(
    module: nn.Module,
    name: str,
    placement: Placement,
    grad: Placement,
    work: _Work,
    shard: EmbeddingShard | None = None,
) -> None:
    """Puts a DTensor parameter in a whole one's place; a tied one is replaced once and shared again."""
    parameter = getattr(module, name)
    known = work.sharded.get(id(parameter))
    if known is None:
        ownership = shard.ownership if shard is not None else None
        known = (shard_parameter(parameter, placement, work.axis, ownership), shard)
        work.sharded[id(parameter)] = known
        if grad == Partial():
            work.partial.append((module, name))
    setattr(module, name, known[0])


def _apply_embedding(assignment: Assignment, work: _Work) -> None:
    module, style = assignment.module, assignment.rule.style
    assert isinstance(module, nn.Embedding)
    ownership = RowOwnership(module.num_embeddings, work.axis.size, style.ownership)
    shard = EmbeddingShard(
        _site(assignment, work),
        style.name,
        ownership,
        module.padding_idx,
        sequence_parallel=style.output != Replicate(),
    )
    _replace(module, "weight", shard.weight_placement(), shard.grad_placement(), work, shard)
    _order_rows(assignment, shard, work)
    module.forward = lambda ids: shard(ids, local_weight(module.weight, shard.grad_placement()))  # type: ignore[method-assign, assignment]


def _order_rows(assignment: Assignment, shard: EmbeddingShard, work: _Work) -> None:
    if shard.ownership.kind is Ownership.INTERLEAVED and work.axis.size > 1:
        keep_rows_in_order(
            assignment.module, shard.ownership, work.axis, _site(assignment, work).origin(Shard(0), Shard(0))
        )
        work.row_order[f"{assignment.name}.weight"] = shard.ownership
    else:
        take_whole_tensors(assignment.module)


def _apply_linear(assignment: Assignment, work: _Work) -> None:
    module, style, site = assignment.module, assignment.rule.style, _site(assignment, work)
    assert isinstance(module, nn.Linear)
    tie = work.sharded.get(id(module.weight), (None, None))[1]
    if style.name is StyleName.REPLICATE:
        _replace_replicated(module, Replicate(), work)
        module.forward = lambda x: F.linear(  # type: ignore[method-assign, assignment]
            x, local_weight(module.weight, Replicate()), _bias(module, Replicate())
        )
        return
    if style.name is StyleName.ROWWISE:
        rowwise = RowwiseLinear(site, style.input or Shard(-1), style.output or Replicate())
        bias_grad = Partial() if rowwise.output == Shard(1) else Replicate()
        _replace(module, "weight", Shard(1), Shard(1), work)
        if module.bias is not None:
            _replace(module, "bias", Replicate(), bias_grad, work)
        take_whole_tensors(module)
        module.forward = lambda x: rowwise(x, local_weight(module.weight, Shard(1)), _bias(module, bias_grad))  # type: ignore[method-assign, assignment]
        return
    before = None if below_gather_input(assignment.name, work.plan) else style.input or Replicate()
    colwise = ColwiseLinear(site, before, style.output or Shard(-1), module.out_features)
    _replace(module, "weight", Shard(0), Shard(0), work)
    if module.bias is not None:
        _replace(module, "bias", Shard(0), Shard(0), work)
    if tie is None:
        take_whole_tensors(module)
        module.forward = lambda x: colwise(x, local_weight(module.weight, Shard(0)), _bias(module, Shard(0)))  # type: ignore[method-assign, assignment]
    else:
        _order_rows(assignment, tie, work)
        to_rows = _tied_rows(tie, site, (module.out_features, module.in_features))
        module.forward = lambda x: colwise(  # type: ignore[method-assign, assignment]
            x, to_rows(local_weight(module.weight, tie.grad_placement())), _bias(module, Shard(0))
        )
    if colwise.output == Shard(-1) and assignment.module is last_linear(work.model):
        ownership = (
            tie.ownership
            if tie is not None and tie.weight_placement() == Shard(0)
            else RowOwnership(module.out_features, work.axis.size)
        )
        work.loss = VocabParallelLoss(site, ownership)


def _tied_rows(tie: EmbeddingShard, site: Site, shape: tuple[int, int]) -> TensorFunction:
    """How a head gets its rows [V/T, H] of a table that the embedding has cut its own way; gradients go back the same way."""
    n_rows, hidden = shape
    axis = site.axis
    match tie.weight_placement():
        case Shard(0):
            return lambda weight: weight
        case Shard(1):
            return lambda weight: collectives.all_to_all(
                weight,
                0,
                1,
                axis,
                full_size=hidden,
                grad_placement=Shard(0),
                origin=site.origin(Shard(1), Shard(0)),
            )
        case _ if tie.grad_placement() == Partial():
            sizes = collectives.chunk_sizes(n_rows, axis.size)
            return lambda weight: weight.narrow(0, sum(sizes[: axis.rank]), sizes[axis.rank])
        case _:
            return lambda weight: collectives.split(
                weight, 0, axis, grad_placement=Shard(0), origin=site.origin(Replicate(), Shard(0))
            )


def _apply_norm(assignment: Assignment, work: _Work) -> None:
    module = assignment.module
    grad: Placement = Partial() if assignment.rule.style.name is StyleName.SEQUENCE_PARALLEL else Replicate()
    _replace_replicated(module, grad, work)
    match module:
        case nn.RMSNorm():
            module.forward = lambda x: F.rms_norm(  # type: ignore[method-assign]
                x, module.normalized_shape, _weight(module, grad), module.eps
            )
        case nn.LayerNorm():
            module.forward = lambda x: F.layer_norm(  # type: ignore[method-assign, assignment]
                x, module.normalized_shape, _weight(module, grad), _bias(module, grad), module.eps
            )


def _replace_replicated(module: nn.Module, grad: Placement, work: _Work) -> None:
    for name, _ in list(module.named_parameters(recurse=False)):
        _replace(module, name, Replicate(), grad, work)
    take_whole_tensors(module)


def _weight(module: nn.RMSNorm | nn.LayerNorm, grad: Placement) -> Tensor | None:
    return None if module.weight is None else local_weight(module.weight, grad)


def _bias(module: nn.Linear | nn.LayerNorm, grad: Placement) -> Tensor | None:
    return None if module.bias is None else local_weight(module.bias, grad)


def _apply_gather_input(assignment: Assignment, work: _Work) -> None:
    module, site = assignment.module, _site(assignment, work)
    before = assignment.rule.style.input or Shard(1)
    inner = module.forward

    def forward(*args: object, **kwargs: object) -> object:
        if args and isinstance(args[0], Tensor):
            return inner(gather_input(args[0], before, site), *args[1:], **kwargs)
        for (
            key,
            value,
        ) in kwargs.items():  # called by keyword, as Hugging Face does: the first tensor is the hidden state
            if isinstance(value, Tensor):
                return inner(*args, **{**kwargs, key: gather_input(value, before, site)})
        raise PlanError(f"{site.module}: rule {site.rule} found no tensor among the module's inputs.")

    module.forward = forward
