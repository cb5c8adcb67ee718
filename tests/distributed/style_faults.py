"""Faults that are planted on the ranks at run time, at least one for each native style, and where the
comparison must find them.

A fault is a patch of Shardwise's own code, or a plan that takes a wrong assumption. Nothing here outlives its
`with` block.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from shardwise.core.placement import Shard
from shardwise.core.plan import Family, Plan, ReduceScatter, Rule, Style, StyleName
from shardwise.parallel import checkpoints, chunks, collectives, exchanges, loss, own_forward, parameters
from shardwise.parallel import ownership as ownership_room
from shardwise.parallel.builtin import builtin_plan
from shardwise.parallel.embedding import EmbeddingShard
from shardwise.parallel.route import Route
from shardwise.parallel.styles import colwise, replicated, routed, rowwise
from shardwise.step import clipping, train
from shardwise.step.gradient_sums import GradientSums
from shardwise.verify import ranks
from tests.distributed.style_cases import Config, MlpConfig, gpt, llama, mlp_plans

Planting = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Fault:
    """`found_in`: parameters that the findings must name; all of them, where `only`. `loss_exact`: the
    forward looks right all the same. `says`: what a finding must say. is_telling: whether `make test` plants
    it too."""

    name: str
    config: Config
    plan: Plan
    found_in: frozenset[str]
    plant: Planting = nullcontext
    only: bool = False
    loss_exact: bool = True
    says: str = ""
    is_telling: bool = True


TABLE = frozenset({"tok_embeddings.weight"})
NORMS = frozenset(
    {
        "norm.weight",
        *(f"layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("attention_norm", "ffn_norm")),
    }
)
ROWWISE_LINEARS = frozenset(
    f"layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("attention.wo", "feed_forward.w2")
)
COLWISE_LINEARS = frozenset(
    f"layers.{layer}.{name}.weight"
    for layer in (0, 1)
    for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1")
)


def _backward(function: Any, backward: Callable[..., Any]) -> Planting:
    return partial(patch.object, function, "backward", staticmethod(backward))


def _rows_shifted(function: Any) -> Planting:
    original = function.backward

    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_weight, *rest = original(ctx, grad)
        return grad_weight.roll(1, 0), *rest

    return _backward(function, backward)


def _summed_again(ctx: Any, grad: Tensor) -> Any:
    return grad * 2, None, None


def _kept(ctx: Any, grad: Tensor) -> Any:
    return grad, None, None


def _shifted_chunk(x: Tensor, dim: int, axis: Any) -> Tensor:
    sizes = chunks.chunk_sizes(x.shape[dim], axis.size)
    rank = (axis.rank + 1) % axis.size
    return x.narrow(dim, sum(sizes[:rank]), sizes[rank])


def _rows_of_others_dropped(ctx: Any, grad: Tensor) -> Any:
    send_splits, receive_splits, axis, origin, _ = ctx.saved
    back = exchanges.swap_rows_now(grad, receive_splits, send_splits, axis, origin)
    first = sum(send_splits[: axis.rank])
    mask = torch.zeros_like(back)
    mask[first : first + send_splits[axis.rank]] = 1
    return back * mask, None, None, None, None, None


def _wrong_row(ids_BS: Tensor, ownership: Any, rank: int) -> Route:
    right = _ORIGINAL_ROUTE(ids_BS, ownership, rank)
    return replace(right, expand=right.expand.roll(1))


_ORIGINAL_ROUTE = ownership_room.route


def _own_part_as_if_contiguous(whole: Tensor, placement: Any, axis: Any, ownership: Any = None) -> Tensor:
    return _ORIGINAL_OWN_PART(whole, placement, axis)


def _shifted_part(whole: Tensor, placement: Any, axis: Any, ownership: Any = None) -> Tensor:
    right = _ORIGINAL_OWN_PART(whole, placement, axis, ownership)
    return right.roll(1, 0)


_ORIGINAL_OWN_PART = parameters.own_part


def _sum_twice(x: Tensor, axis: Any, origin: Any) -> Tensor:
    return exchanges.sum_now(exchanges.sum_now(x, axis, origin), axis, origin)


def _summed_though_whole(ctx: Any, grad: Tensor) -> Any:
    dim, axis, _, origin = ctx.saved
    summed = exchanges.sum_now(grad.contiguous(), axis, origin)
    return chunks.own_chunk(summed, dim, axis), None, None, None, None, None


def _cut_though_partial(ctx: Any, grad: Tensor) -> Any:
    dim, axis, _, _ = ctx.saved
    return chunks.own_chunk(grad, dim, axis), None, None, None, None, None


def _own_part_only(ctx: Any, grad: Tensor) -> Any:
    """Zeros instead of what other ranks have: a gather that was forgotten."""
    dim, axis, full_size, _ = ctx.saved
    sizes = chunks.chunk_sizes(full_size, axis.size)
    parts = [grad.new_zeros(*grad.shape[:dim], size, *grad.shape[dim + 1 :]) for size in sizes]
    parts[axis.rank] = grad
    return torch.cat(parts, dim), None, None, None


def _own_block_unsummed(x: Tensor, dim: int, axis: Any, origin: Any) -> Tensor:
    blocks: Tensor = x.unflatten(dim, (axis.size, -1))
    return blocks.select(dim, axis.rank).clone()


def _without_biases(self: Any, model: nn.Module, places: Any, axis: Any, origin: Any) -> None:
    _ORIGINAL_PARTIAL_INIT(self, model, [place for place in places if place[1] != "bias"], axis, origin)


def _without_positions(self: Any, model: nn.Module, places: Any, axis: Any, origin: Any) -> None:
    positions = model.get_submodule("pos_embeddings")
    _ORIGINAL_PARTIAL_INIT(
        self, model, [place for place in places if place[0] is not positions], axis, origin
    )


def _first_ids(
    _: replicated.ReplicatedTable, shard: EmbeddingShard, ids_BS: Tensor, weight: Tensor
) -> Tensor:
    first: Tensor = ids_BS.chunk(shard.site.axis.size, 1)[0]
    return torch.nn.functional.embedding(first, weight)


def _fused_rows_shifted(whole: Tensor, placement: Any, axis: Any, ownership: Any = None) -> Tensor:
    """Part of a fused QKV as if all queries came first, then all keys, then all values."""
    if placement == Shard(0) and whole.shape[0] == 3 * 96:
        return torch.cat([part.chunk(axis.size)[axis.rank] for part in whole.chunk(3)])
    return _ORIGINAL_OWN_PART(whole, placement, axis, ownership)


_ORIGINAL_PARTIAL_INIT = parameters.PartialGradients.__init__


def _nothing(*_: Any) -> None:
    pass


def _label_off_by_one(ctx: Any, logits: Tensor, valid: Tensor, columns: Tensor, site: Any) -> Tensor:
    width = logits.shape[1]
    return _ORIGINAL_LOSS(ctx, logits, valid, torch.where(columns >= 0, (columns + 1) % width, columns), site)


_ORIGINAL_LOSS = loss._VocabParallelSum.forward


def _softmax_of_own_part(ctx: Any, grad: Tensor) -> Any:
    probabilities, scale, mine, picked = ctx.saved_tensors
    grad_NV = probabilities * ((scale > 0) * grad).unsqueeze(1)
    return grad_NV.scatter_add(1, picked, torch.where(mine, -grad, 0).unsqueeze(1)), None, None, None


def _table_gradient_lost(ctx: Any, grad: Tensor) -> Any:
    split_dim, concat_dim, split_size, axis, origin = ctx.saved
    right = exchanges.swap_dims(grad, concat_dim, split_dim, split_size, axis, origin)
    return right.roll(1, split_dim), None, None, None, None, None


def _detached(parameter: Any, grad: Any) -> Tensor:
    return parameter.to_local().detach()  # type: ignore[no-any-return]


def _with_norms(plan: Plan, style: StyleName) -> Plan:
    norms = ("layers.*.attention_norm", "layers.*.ffn_norm", "norm")
    return replace(
        plan, rules=tuple(Rule(r.pattern, Style(style)) if r.pattern in norms else r for r in plan.rules)
    )


SP = {
    name: builtin_plan(name) for name in ("rowwise", "colwise", "routed", "routed-interleaved", "replicated")
}
NO_SP = {name: builtin_plan(name, sequence_parallel=False) for name in ("rowwise", "colwise", "replicated")}
MLP_1 = mlp_plans()["colwise takes shard(1), rowwise gives it"]
MLP_WHOLE = mlp_plans()["colwise gives replicate, rowwise takes it"]
MLP_REPLICATE = mlp_plans()["rowwise takes what replicate gives"]

FAULTS = (
    Fault(
        "rowwise embedding: gradient rows shifted by one",
        llama(),
        SP["rowwise"],
        TABLE,
        _rows_shifted(rowwise._LookUpOwn),
        only=True,
        is_telling=False,
    ),
    Fault(
        "rowwise embedding: the padding row gets a gradient",
        llama(padding_idx=3),
        SP["rowwise"],
        TABLE,
        partial(patch.object, EmbeddingShard, "padding_row", lambda self: None),
        only=True,
        is_telling=False,
    ),
    Fault(
        "rowwise embedding: reduce-scatter without a sum",
        llama(),
        SP["rowwise"],
        TABLE,
        partial(patch.object, collectives, "scatter_sum_now", _own_block_unsummed),
        loss_exact=False,
    ),
    Fault(
        "rowwise embedding without sequence parallelism: all-reduced backward too",
        llama(),
        NO_SP["rowwise"],
        TABLE | ROWWISE_LINEARS,
        _backward(collectives._AllReduce, _summed_again),
        says="2 times the unsharded one",
    ),
    Fault(
        "colwise embedding: gradient rows shifted by one",
        llama(),
        SP["colwise"],
        TABLE,
        _rows_shifted(colwise._LookUpSlices),
        only=True,
        is_telling=False,
    ),
    Fault(
        "colwise embedding without sequence parallelism: another rank's slice",
        llama(),
        NO_SP["colwise"],
        TABLE,
        partial(patch.object, collectives, "own_chunk", _shifted_chunk),
        only=True,
    ),
    Fault(
        "colwise embedding, tied: gradient columns shifted",
        llama(tied=True),
        SP["colwise"],
        TABLE,
        _backward(collectives._AllToAll, _table_gradient_lost),
        only=True,
        is_telling=False,
    ),
    Fault(
        "routed embedding: gradients of other ranks' tokens dropped",
        llama(),
        SP["routed"],
        TABLE,
        _backward(collectives._ExchangeRows, _rows_of_others_dropped),
        only=True,
    ),
    Fault(
        "routed embedding: tokens get their neighbours' rows",
        llama(),
        SP["routed"],
        TABLE,
        partial(patch.object, routed, "route", _wrong_row),
        loss_exact=False,
        is_telling=False,
    ),
    Fault(
        "routed interleaved embedding: rows kept as if contiguous",
        llama(),
        SP["routed-interleaved"],
        TABLE,
        partial(patch.object, parameters, "own_part", _own_part_as_if_contiguous),
        loss_exact=False,
    ),
    Fault(
        "replicated embedding: parts not summed",
        llama(),
        SP["replicated"],
        TABLE | NORMS,
        partial(patch.object, parameters.PartialGradients, "_reduce", _nothing),
        only=True,
    ),
    Fault(
        "colwise linear: gradient of the input not summed",
        llama(),
        NO_SP["rowwise"],
        TABLE | NORMS,
        _backward(collectives._FanOut, _kept),
    ),
    Fault(
        "colwise and rowwise linear: shards shifted by one row",
        llama(),
        SP["colwise"],
        COLWISE_LINEARS | ROWWISE_LINEARS,
        partial(patch.object, parameters, "own_part", _shifted_part),
        loss_exact=False,
        is_telling=False,
    ),
    Fault(
        "colwise linear that gives replicate: gradient summed though whole",
        MlpConfig(),
        MLP_WHOLE,
        frozenset({"head.weight", "head.bias", "blocks.1.ffn.up.weight", "blocks.1.ffn.up.bias"}),
        _backward(collectives._AllGather, _summed_though_whole),
        says="2 times the unsharded one",
    ),
    Fault(
        "rowwise linear: gradient of the output not gathered",
        llama(),
        SP["colwise"],
        ROWWISE_LINEARS,
        _backward(collectives._ReduceScatter, _own_part_only),
    ),
    Fault(
        "rowwise linear that takes replicate: gradient of the input not gathered",
        MlpConfig(),
        MLP_REPLICATE,
        frozenset({"blocks.0.ffn.up.weight", "embedding.weight"}),
        _backward(collectives._Split, _own_part_only),
        is_telling=False,
    ),
    Fault(
        "rowwise linear: a bias's parts not summed",
        MlpConfig(),
        MLP_1,
        # a LayerNorm's bias is a part too
        frozenset(f"blocks.{block}.{name}.bias" for block in (0, 1) for name in ("ffn.down", "norm")),
        partial(patch.object, parameters.PartialGradients, "__init__", _without_biases),
        only=True,
    ),
    Fault(
        "replicated embedding of positions: parts not summed",
        gpt(tied=True),
        builtin_plan("rowwise", family=Family.GPT),
        frozenset({"pos_embeddings.weight"}),
        partial(patch.object, parameters.PartialGradients, "__init__", _without_positions),
        only=True,
        is_telling=False,
    ),
    Fault(
        "replicated embedding of positions: each rank takes the first ones",
        gpt(),
        builtin_plan("rowwise", family=Family.GPT),
        frozenset({"pos_embeddings.weight"}),
        partial(patch.object, replicated.ReplicatedTable, "look_up", _first_ids),
        loss_exact=False,
    ),
    Fault(
        "colwise linear of a fused QKV: a head's query, key and value taken apart",
        gpt(),
        builtin_plan("rowwise", family=Family.GPT),
        frozenset(f"layers.{layer}.attention.wqkv.{kind}" for layer in (0, 1) for kind in ("weight", "bias")),
        partial(patch.object, parameters, "own_part", _fused_rows_shifted),
        loss_exact=False,
    ),
    Fault(
        "sequence_parallel norm: gradient summed twice",
        llama(),
        SP["colwise"],
        NORMS,
        partial(patch.object, parameters, "sum_now", _sum_twice),
        only=True,
        says="2 times the unsharded one",
    ),
    Fault(
        "sequence_parallel norm: taken for replicate",
        llama(),
        _with_norms(SP["rowwise"], StyleName.REPLICATE),
        NORMS,
        only=True,
        is_telling=False,
    ),
    Fault(
        "replicate norm: taken for sequence_parallel",
        llama(),
        _with_norms(NO_SP["rowwise"], StyleName.SEQUENCE_PARALLEL),
        NORMS,
        only=True,
        says="2 times the unsharded one: summed where every rank had the whole",
    ),
    Fault(
        "sequence_parallel norm: no gradient arrives",
        llama(),
        SP["rowwise"],
        NORMS,
        partial(patch.object, own_forward, "local_weight", _detached),
        only=True,
        says="no gradient arrives on some rank",
    ),
    Fault(
        "gather_input: gradient cut though partial",
        llama(),
        SP["rowwise"],
        TABLE | NORMS,
        _backward(collectives._AllGather, _cut_though_partial),
    ),
    Fault(
        "loss: label ownership off by one",
        llama(),
        SP["rowwise"],
        frozenset({"output.weight"}),
        partial(patch.object, loss._VocabParallelSum, "forward", staticmethod(_label_off_by_one)),
        loss_exact=False,
    ),
    Fault(
        "loss: softmax over the own part only",
        llama(),
        SP["rowwise"],
        frozenset({"output.weight"}),
        _backward(loss._VocabParallelSum, _softmax_of_own_part),
        is_telling=False,
    ),
    Fault(
        "the group's own reduce-scatter: without a sum",
        llama(),
        replace(SP["rowwise"], reduce_scatter=ReduceScatter.BACKEND),
        TABLE,
        partial(
            patch.object,
            exchanges,
            "reduce_scatter_into",
            lambda out, blocks, group: out.copy_(blocks[: out.numel()]),
        ),
        loss_exact=False,
        is_telling=False,
    ),
)


def _unclipped(gradients: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=next(iter(gradients)).device)


# which part of the answer (see style_workers.run) each of these faults must spoil
PART_FAULTS: dict[str, tuple[str, Planting]] = {
    "a reduce-scatter doesn't sum": (
        "laws",
        partial(patch.object, collectives, "scatter_sum_now", _own_block_unsummed),
    ),
    "every rank counts replicated gradients": (
        "clip",
        partial(patch.object, clipping, "_counts_here", lambda gradient, mesh: True),
    ),
    "ignored labels count": (
        "steps dp=2",
        partial(
            patch.object,
            train,
            "count_valid",
            lambda labels: torch.tensor(labels.numel(), device=labels.device),
        ),
    ),
    "data-parallel gradients aren't summed": (
        "steps dp=2",
        partial(patch.object, GradientSums, "sum", _nothing),
    ),
    "nothing is clipped": ("steps tp=2", partial(patch.object, train, "clip_gradients", _unclipped)),
    "interleaved rows are saved as they are kept": (
        "state_dict",
        partial(patch.object, checkpoints, "keep_in_order", _nothing),
    ),
    "digests don't see": ("ranks", partial(patch.object, ranks, "digest", lambda tensor: int(tensor.sum()))),
}
