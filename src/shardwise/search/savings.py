"""What other styles of a candidate could save at most: so that they are traced only where they could win.

a look-up     all that it takes, both ways a whole block its exchanges and copies, and what its matmuls
take over the device's best rate; less what it adds: with whole sequences, and where it attends, every rank
multiplies all of it (tp times the FLOPs), with cut ones else the gradients of whole weights are summed over
tp in each micro-batch, and what a head makes is gathered, for the model gives logits of whole sequences"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from shardwise.core.collective import CollectiveKind, wire_bytes
from shardwise.core.layer_name import any_layer, is_inside, repeats
from shardwise.core.machine import Machine
from shardwise.core.mesh import TENSOR_AXIS, Mesh
from shardwise.core.plan import StyleName
from shardwise.core.prediction import Setup, Term
from shardwise.core.program import BACKWARDS, FORWARDS, Collective, Op, OpKind, Phase, Program
from shardwise.core.search import CUT, SEQUENCE, WHOLE, Group
from shardwise.predict.costs import collective_s
from shardwise.predict.groups import group_of
from shardwise.predict.work import TERMS, Work, work_of
from shardwise.search.bounds import NO_WORK, Less, Part
from shardwise.search.needs import made_bytes


@dataclass(frozen=True, slots=True)
class _Saved:
    """Seconds of a micro-batch: of the device in order, and of the host, at most; what summing gradients of
    whole weights adds, however few the tokens; and of a forward that runs again."""

    device_s: float
    host_s: float
    summed_s: float = 0.0
    again: Part = NO_WORK


class Savings:
    """Of one piece's Program, whose groups have their default styles. What a pass takes is the longer of
    device and host, so what another style saves of the shorter counts for nothing."""

    def __init__(
        self, program: Program, machine: Machine, setup: Setup, groups: Sequence[Group], *, is_cut: bool
    ) -> None:
        """is_cut: the sequence, between blocks."""
        self._program, self._machine, self._setup, self._is_cut = program, machine, setup, is_cut
        work = work_of(program, machine, setup).without(setup.without)
        work = work.where(work.in_phases(*FORWARDS, *BACKWARDS))
        modules = [any_layer(item.module) for item in work.items]
        self._all = _Saved(float(work.device_s.sum()), float(work.host_s.sum()))
        self._together = work.together
        self._by_group: dict[str, _Saved] = {}
        for group in groups:
            own = np.array([is_inside(module, (group.name,)) for module in modules], np.bool_)
            rows = own[work.template] if len(modules) else np.zeros(0, np.bool_)
            if group.name != SEQUENCE and len(group.options) > 1:
                self._by_group[group.name] = self._of(group, work.where(rows))

    def less(self, context: int) -> Less:
        """If all groups took the best other style that they may have, with so many context ranks."""
        tokens = Mesh(self._program.axes).context / context  # of those that were traced
        layers = ends = again = NO_WORK
        for name, saved in self._by_group.items():
            device_s, host_s = max(0.0, saved.device_s * tokens - saved.summed_s), max(0.0, saved.host_s)
            if repeats(name):
                layers += self._part(device_s, host_s)
                again += self._part(saved.again.device_s * tokens, saved.again.host_s)
            else:
                ends += self._part(device_s, host_s)
        return Less(layers, ends, again)

    def _part(self, device_s: float, host_s: float) -> Part:
        return Part(device_s + host_s) if self._together else Part(device_s, host_s)

    def is_worth(self, group: Group) -> bool:
        """Whether another style of the group could save anything, whatever the others take."""
        if group.name not in self._by_group:
            return False
        own = self._by_group[group.name]
        most = [max(0.0, saved.device_s - saved.summed_s) for saved in self._by_group.values()]
        is_device_longer = self._all.device_s - sum(most) >= self._all.host_s
        if is_device_longer and not self._together:
            return own.device_s > own.summed_s
        return own.device_s > own.summed_s or own.host_s > 0

    def more_bytes(self, styles: Sequence[tuple[str, str]]) -> float:
        """Of states that a rank holds more with other styles, where these leave whole what the default
        cuts: FSDP's shards count as in the traced piece."""
        kept = {name for name, option in styles if option in (WHOLE, StyleName.REPLICATED)}
        total = 0.0
        for each in self._program.holdings:
            if is_inside(any_layer(each.module), kept):
                own = each.parameter_bytes + each.gradient_bytes + each.optimizer_bytes
                total += _whole_bytes(each.shape, each.local_shape, own) / self._parts - own
        return max(0.0, total)

    @cached_property
    def _parts(self) -> int:
        """Into how many parts FSDP cuts a parameter."""
        traced = Mesh(self._program.axes)
        return prod(map(traced.size, traced.shard_axes))

    def _of(self, group: Group, rows: Work) -> _Saved:
        forward = rows.where(rows.in_phases(Phase.FORWARD))
        if WHOLE not in group.options and CUT not in group.options:
            device_s, host_s = float(rows.device_s.sum()), float(rows.host_s.sum())
            return _Saved(
                device_s, host_s, again=Part(float(forward.device_s.sum()), float(forward.host_s.sum()))
            )
        is_alone = self._is_alone(rows)
        summed_s = self._summed_s(group) if is_alone else 0.0
        gathered_s = self._gathered_s(forward) if is_alone and not repeats(group.name) else 0.0
        again = Part(max(0.0, self._of_device(forward, _only_moves)), self._of_host(forward))
        device_s = self._of_device(rows, _is_exchange) - gathered_s
        return _Saved(device_s, self._of_host(rows), summed_s, again)

    def _of_device(self, rows: Work, falls_away: Callable[[Op | Collective], bool]) -> float:
        """What falls away of a block, and what its matmuls take over the best rate."""
        away = _chosen(rows, falls_away)
        matmuls = rows.term == TERMS.index(Term.MATMUL)
        times = 1 if self._is_alone(rows) else Mesh(self._program.axes).tp
        flops = np.array([item.flops if isinstance(item, Op) else 0 for item in rows.items], np.float64)
        least_s = times * float(flops[rows.template[matmuls]].sum()) / self._best_flops()
        return float(rows.device_s[away].sum()) + float(rows.device_s[matmuls].sum()) - least_s

    def _is_alone(self, rows: Work) -> bool:
        """Whether a rank that has all of a block runs it on its own part of the sequence."""
        return self._is_cut and not (rows.term == TERMS.index(Term.ATTENTION)).any()

    def _of_host(self, rows: Work) -> float:
        """Issuing all but matmuls and attention."""
        own = [TERMS.index(term) for term in (Term.MATMUL, Term.ATTENTION)]
        return float(rows.host_s[~np.isin(rows.term, own)].sum())

    def _best_flops(self) -> float:
        """FLOP/s of its best tile, in the dtype that it multiplies in."""
        names = (self._setup.matmul_dtype, self._program.settings.computed_dtype)
        rates = [self._machine.matmul(name) for name in names if name is not None]
        known = [rate for rate in rates if rate is not None] or [rate for _, rate in self._machine.matmuls]
        return max(rate.peak_flops * max((tile.share for tile in rate.tiles), default=1.0) for rate in known)

    def _summed_s(self, group: Group) -> float:
        """All-reducing the gradients of the group's whole weights over tp."""
        held = [each for each in self._program.holdings if is_inside(any_layer(each.module), (group.name,))]
        n_bytes = sum(_whole_bytes(each.shape, each.local_shape, each.parameter_bytes) for each in held)
        return self._exchange_s(CollectiveKind.ALL_REDUCE, n_bytes)

    def _gathered_s(self, forward: Work) -> float:
        """All-gathering what the last matmul of a head makes, of which each rank would have its part of the
        sequence."""
        matmuls = np.flatnonzero(forward.term == TERMS.index(Term.MATMUL))
        if not len(matmuls):
            return 0.0
        last = forward.items[forward.template[matmuls[-1]]]
        assert isinstance(last, Op)
        return self._exchange_s(CollectiveKind.ALL_GATHER, made_bytes(last) * Mesh(self._program.axes).tp)

    def _exchange_s(self, kind: CollectiveKind, n_bytes: int) -> float:
        """Over tp."""
        ranks = group_of(TENSOR_AXIS, self._program, self._setup)
        if ranks.size == 1:
            return 0.0
        return collective_s(self._machine, kind, wire_bytes(kind, n_bytes, ranks.size), n_bytes, ranks)


def _is_exchange(item: Op | Collective) -> bool:
    """Exchanges over tp, and what only moves or adds."""
    return isinstance(item, Collective) or _only_moves(item)


def _only_moves(item: Op | Collective) -> bool:
    return isinstance(item, Op) and item.kind in (OpKind.COPY, OpKind.FILL)


def _chosen(rows: Work, chosen: Callable[[Op | Collective], bool]) -> NDArray[np.bool_]:
    """Which rows are of such items."""
    return np.array([chosen(item) for item in rows.items], np.bool_)[rows.template]


def _whole_bytes(shape: Sequence[int], local: Sequence[int], local_bytes: int) -> int:
    """Of a parameter as every tp rank would hold it; FSDP's shards count as they are."""
    share = 1.0
    for whole, own in zip(shape, local, strict=True):
        share *= whole / own if own else 1.0
    return int(local_bytes * share)
