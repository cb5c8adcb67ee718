"""Experts shared out over an axis, each rank some of them, in their order: which tokens go where, and back.

Tokens are sent once for each expert that the router chose. A rank learns how many it gets by an all-to-all of
counts, [experts of a rank] for each rank. Bytes of what rank r sends, forward: H x assignments of r's tokens
to experts of other ranks, to them; and H x assignments of other ranks' tokens to r's experts, back to them;
and the same in the backward, the other way round. The most that can be: all of the rank's own assignments go
to others, and all those of the others come to it.

Where nobody knows what the router chose (models/routing.py), each expert gets equally many, or each of the
first rank's so many times as many as is assumed.

Shape suffixes: N own tokens, K choices of a token, A own assignments (N x K), R assignments that come here, E
experts, L experts of a rank, T ranks of the axis, H hidden.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardwise.core.collective import Origin
from shardwise.models.routing import ends_of, is_balanced_by_assumption, shared_out
from shardwise.parallel.axis import Axis
from shardwise.parallel.exchanges import swap_rows_now
from shardwise.parallel.route import Route

CALL = ("hidden", "top_k_index", "top_k_weights")
"""What experts are called with, in this order: [N, H], [N, K], [N, K]; what comes is [N, H]."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertRoute:
    """The route of one rank's tokens. expert: of each row that comes, its expert's place among the rank's,
    [R]. loads: how many come to each of them. is_assumed: whether that is balanced since nobody knows."""

    route: Route
    expert: Tensor
    loads: tuple[int, ...]
    is_assumed: bool


def takes_tokens_of_experts(module: nn.Module) -> bool:
    """Whether its forward is called as experts are: three inputs, the second and third by the names of what
    they are (top_k_index or router_indices; top_k_weights or routing_weights). Its class says so too, where a
    plan has put another forward in its place."""
    of_class = list(inspect.signature(type(module).forward).parameters)[1:]
    return any(
        len(names) == len(CALL) and "ind" in names[1] and "weights" in names[2]
        for names in (list(inspect.signature(module.forward).parameters), of_class)
    )


def number_of_experts(module: nn.Module) -> int | None:
    """How many a module's own weights have, along their first dim; None where they have several numbers, or
    none."""
    found = {parameter.shape[0] if parameter.dim() else 0 for parameter in module.parameters(recurse=False)}
    return found.pop() if len(found) == 1 else None


def route_to_experts(index_NK: Tensor, experts: int, axis: Axis, origin: Origin) -> ExpertRoute:
    """The route of this rank, which learns from all others of the axis how many tokens they send; all must
    call. index: the experts' numbers; `experts` is none."""
    n_ranks, n_own = axis.size, experts // axis.size
    sorted_A, order_A = index_NK.flatten().sort(stable=True)
    counts_E = ends_of(sorted_A, experts).diff(prepend=sorted_A.new_zeros(1, dtype=torch.int32))
    even = [n_own] * n_ranks
    why = "Each rank learns how many tokens come to each of its experts."
    counts_TL = swap_rows_now(counts_E, even, even, axis, origin, reason=why)
    is_assumed = is_balanced_by_assumption(index_NK)
    if is_assumed:
        sends = shared_out(index_NK.numel(), experts, n_ranks)
        receives = sends[axis.rank * n_own :][:n_own] * n_ranks
    else:
        both = torch.cat((counts_E, counts_TL)).tolist()  # one wait for the device
        sends, receives = both[:experts], both[experts:]
    expert_TL = torch.arange(n_own, device=counts_TL.device).repeat(n_ranks)
    route = Route(
        send_rows=(order_A // index_NK.shape[1])[: sum(sends)],
        send_splits=_by_rank(sends, n_own),
        receive_splits=_by_rank(receives, n_own),
        expand=order_A.argsort().clamp(max=sum(sends)).view_as(index_NK),
    )
    expert_R = expert_TL.repeat_interleave(counts_TL, output_size=sum(receives))
    return ExpertRoute(route, expert_R, tuple(sum(receives[own::n_own]) for own in range(n_own)), is_assumed)


def route_within(index_NK: Tensor, experts: int, axis: Axis) -> ExpertRoute:
    """The route where every rank of the axis has the same tokens: each takes those of its own experts, and
    nothing travels."""
    n_own = experts // axis.size
    sorted_A, order_A = index_NK.flatten().sort(stable=True)
    first = axis.rank * n_own
    is_assumed = is_balanced_by_assumption(index_NK)
    if is_assumed:
        counts = shared_out(index_NK.numel(), experts, axis.size)
    else:
        ends = ends_of(sorted_A, experts)
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    start, own = sum(counts[:first]), counts[first : first + n_own]
    place_NK = order_A.argsort().view_as(index_NK) - start
    is_own_NK = (place_NK >= 0) & (place_NK < sum(own))
    route = Route(
        send_rows=(order_A // index_NK.shape[1])[start : start + sum(own)],
        send_splits=(sum(own),),
        receive_splits=(sum(own),),
        expand=place_NK.where(is_own_NK, sum(own)),
    )
    return ExpertRoute(route, sorted_A[start : start + sum(own)] - first, tuple(own), is_assumed)


def combined(rows_AH: Tensor, expand_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """What experts made of each assignment that was sent, weighted and summed over a token's choices: [N, H].
    A place behind the last row is a row of zeros."""
    with_none = torch.cat((rows_AH, rows_AH.new_zeros(1, rows_AH.shape[1])))
    out_NKH = with_none[expand_NK] * weights_NK.unsqueeze(-1)
    return out_NKH.sum(1).to(rows_AH.dtype)


def _by_rank(counts: list[int], n_own: int) -> tuple[int, ...]:
    return tuple(sum(counts[start : start + n_own]) for start in range(0, len(counts), n_own))
