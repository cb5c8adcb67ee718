"""Example calls of every op that has a rule, and what its rule says of each (see op_example.Example)."""

from typing import Any

import torch
import torch.nn.functional as F

from tests.unit.op_example import Example, Ids, Mask, Places, Table

aten = torch.ops.aten
BAND = torch.tensor([2, 3, 4, 5])  # known numbers, one after the other
ROWS = torch.tensor([6, 16], dtype=torch.int32)
SPREAD = torch.tensor([0, 3, 5, 1])


def _rearranging() -> list[Example]:
    return [
        # views: split, merged, in between, over several dims, ones
        Example(lambda x, shape: x.view(shape), ((4, 24),), "f(ff)", (4, 4, 6)),
        Example(lambda x, shape: x.view(shape), ((2, 4, 6),), "fff", (2, 24)),
        Example(lambda x, shape: x.view(shape), ((4, 6, 8),), "ff(ff)", (24, 2, 4)),
        Example(lambda x, shape: x.view(shape), ((8, 12),), "(ff)(ff)", (4, 2, 2, 6)),
        Example(lambda x, shape: x.view(shape), ((4, 12),), "f(ff)", (8, 6)),
        Example(lambda x, shape: x.view(shape), ((4, 1, 6),), "f-f", (1, 4, 6, 1)),
        Example(lambda x: x.reshape(x.shape[0], -1), ((4, 2, 6),), "fff"),
        Example(lambda x: x.transpose(0, 1).reshape(-1), ((4, 6),), "ff"),  # copies: _unsafe_view
        Example(lambda x, shape: aten._reshape_alias(x, shape, (shape[1], 1)), ((4, 24),), "ff", (4, 24)),
        Example(lambda x, shape: x.unflatten(-1, shape[1:]), ((4, 24),), "f(ff)", (4, 4, 6)),
        Example(lambda x: x.flatten(1), ((4, 2, 6),), "fff"),
        # pieces of a dim that is told apart, viewed again
        Example(
            lambda x, y, shape: torch.cat([x, y], 1).view(shape), ((4, 8), (4, 4)), "f(ff) f(ff)", (4, 6, 2)
        ),
        # order
        Example(lambda x: x.t(), ((4, 6),), "ff"),
        Example(lambda x: x.t(), ((6,),), "f"),
        Example(lambda x: x.clone().t_(), ((4, 6),), "ff"),
        Example(lambda x: x.transpose(-1, 0), ((4, 6, 8),), "fff"),
        Example(lambda x: x.clone().transpose_(1, 2), ((4, 6, 8),), "fff"),
        Example(lambda x: x.permute(2, 0, -2), ((4, 6, 8),), "fff"),
        Example(lambda x: x.mT, ((2, 4, 6),), "fff"),
        Example(lambda x: x.unsqueeze(-1), ((4, 6),), "ff"),
        Example(lambda x: x.unsqueeze(1), ((4, 6),), "ff"),
        Example(lambda x: x.clone().unsqueeze_(0), ((4, 6),), "ff"),
        Example(lambda x: x.squeeze(), ((4, 1, 6, 1),), "f-f-"),
        Example(lambda x: x.squeeze(-1), ((4, 1, 6, 1),), "f-f-"),
        Example(lambda x: x.squeeze(0), ((4, 6),), "ff"),
        Example(lambda x: x.squeeze((1, 3)), ((4, 1, 6, 1),), "f-f-"),
        Example(lambda x: x.clone().squeeze_(1), ((4, 1, 6),), "f-f"),
        Example(lambda x, shape: x.expand(shape), ((4, 1, 6),), "f-f", (4, 8, 6)),
        Example(lambda x, shape: x.expand(shape), ((4, 6),), "ff", (2, 4, 6)),
        Example(lambda x: x.expand(8, -1, -1), ((1, 4, 6),), "-ff"),
        Example(lambda x: x.repeat(1, 3), ((4, 6),), "ff"),
        Example(lambda x: x.repeat(2, 1, 2), ((4, 6),), "ff"),
    ]


def _pieces() -> list[Example]:
    def at(*places: int, dim: int = 1) -> Places:
        return Places(0, dim, places)

    return [
        Example(lambda x, at: x[:, at[0] : at[1]], ((4, 12),), "f(fff)", places=at(4, 8)),
        Example(lambda x, at: x[:, at[0] :], ((4, 12),), "f(ff)", places=at(4)),
        Example(lambda x, at: x.narrow(1, at[0], at[1] - at[0]), ((4, 12),), "f(ff)", places=at(0, 8)),
        Example(lambda x: x[..., -4:], ((4, 4),), "ff"),
        Example(lambda x: x[:, ::2], ((4, 12),), "f(fb)"),
        Example(lambda x: x[:, 1:], ((4, 6),), "fb"),  # a single entry says nothing of pieces
        Example(lambda x: x[:, 2:4], (Table((4, 6)),), "fb"),
        Example(lambda x: x[:, 4:8], ((4, 12),), "f(fff)"),
        Example(lambda x: x[..., :-8], ((4, 12),), "f(ff)"),
        Example(lambda x: x[2], ((4, 6),), "bf"),
        Example(lambda x: x[:, -1], ((4, 6),), "fb"),
        Example(lambda x: x.select(-1, 0), ((4, 6),), "fb"),
        Example(lambda x, y: x.slice_scatter(y, 1, 2, 4), ((4, 6), (4, 2)), "fb fb"),
        Example(_split, ((4, 12),), "f(fff)", places=at(4, 6)),
        Example(lambda x: x.split(x.shape[1] // 3, 1), ((4, 12),), "f(fff)"),
        Example(lambda x: x.chunk(2, -1), ((4, 12),), "f(ff)"),
        Example(lambda x: torch.mul(*x.chunk(2, -1)), ((4, 12),), "f(ff)"),
        Example(lambda x: x.chunk(2, 0), ((4, 12),), "(ff)f"),
        Example(lambda x: torch.mul(*x.split(6, 1)), ((4, 12),), "f(ff)"),
        Example(lambda x: torch.mul(*x.split(x.shape[1] // 2, 1)), ((4, 12),), "f(ff)"),
        Example(lambda x: torch.mul(*aten.unsafe_split(x, x.shape[1] // 2, 1)), ((4, 8),), "f(ff)"),
        Example(
            lambda x, at: _split(x, at, aten.unsafe_split_with_sizes), ((4, 12),), "f(fff)", places=at(4, 6)
        ),
        # falcon's queries, its key and its value in one dim: by lists of one number
        Example(lambda x: (x[:, :, :-2] + x[:, :, [-2]]) * x[:, :, [-1]], ((2, 4, 10),), "fff"),
        Example(lambda x: x.split(3, 1), (Table((4, 6)),), "fb"),
        Example(lambda x: x.unbind(0), ((4, 6),), "bf"),
        Example(lambda x: x.unbind(-1), ((4, 2, 6),), "ffb"),
        Example(lambda x, y: torch.cat([x, y], 1), ((4, 6), (4, 8)), "ff ff"),
        Example(lambda x, y: torch.cat([x, y], -2), ((6, 4, 2), (6, 8, 2)), "fff fff"),
        Example(lambda x, y: torch.cat([x, y, x], 0), ((4, 6), (2, 6)), "ff ff"),
        Example(lambda x, y: torch.stack([x, y], 1), ((4, 6), (4, 6)), "ff ff"),
        Example(lambda x, y: torch.stack([x, y], -1), ((4, 6), (4, 6)), "ff ff"),
        Example(lambda x: x.unfold(1, 4, 2), ((6, 8),), "fb"),
        Example(lambda x: F.pad(x, (0, 0, 2, 4)), ((4, 6, 8),), "fff"),
        Example(lambda x: F.pad(x, (0, -2)), ((4, 6),), "fb"),
        Example(lambda x: x.diagonal(), ((4, 4),), "bb"),
        Example(lambda x: x.diagonal(0, -2, -1), ((4, 6, 6),), "fbb"),
    ]


def _split(x: torch.Tensor, at: tuple[int, ...], split: Any = torch.split) -> tuple[torch.Tensor, ...]:
    return tuple(split(x, [at[0], at[1] - at[0], x.shape[1] - at[1]], 1))


def _products() -> list[Example]:
    return [
        Example(lambda x, y: x @ y, ((4, 6), (6, 8)), "fs sf"),
        Example(lambda x, y: x.bmm(y), ((2, 4, 6), (2, 6, 8)), "ffs fsf"),
        Example(lambda x, y: x @ y, ((2, 4, 6), (6, 8)), "ffs sf"),
        Example(lambda x, y: x @ y, ((2, 4, 6, 8), (2, 4, 8, 10)), "fffs ffsf"),
        Example(lambda x, y: x @ y, ((2, 1, 6, 8), (4, 8, 10)), "f-fs fsf"),
        Example(F.linear, ((2, 4, 6), (8, 6)), "ffs fs"),
        Example(F.linear, ((4, 6), (8, 6), (8,)), "fs fs f"),  # addmm: the bias is added once
        Example(lambda b, x, y: torch.addmm(b, x, y, beta=2, alpha=3), ((4, 8), (4, 6), (6, 8)), "ff fs sf"),
        Example(torch.baddbmm, ((2, 4, 8), (2, 4, 6), (2, 6, 8)), "fff ffs fsf"),
        Example(lambda x, y: x @ y, ((4, 6), (6,)), "fs s"),
        Example(torch.addmv, ((4,), (4, 6), (6,)), "f fs s"),
        Example(torch.dot, ((6,), (6,)), "s s"),
        Example(
            lambda x, y: torch.einsum("bqhd,bkhd->bhqk", x, y), ((2, 4, 6, 8), (2, 10, 6, 8)), "fffs fffs"
        ),
        Example(_grouped, ((16, 16), (2, 16, 32)), "bs bsf"),
        Example(F.glu, ((4, 12),), "f(ff)"),
        Example(lambda x: F.glu(x, 0), ((4, 6),), "(ff)f"),
        # all that a linear layer does with fused dims
        Example(lambda x, w: F.linear(x.flatten(-2), w), ((2, 4, 6), (8, 24)), "fss f(ss)"),
    ]


def _grouped(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """In whole numbers, since it demands bfloat16."""
    x, weights = (x * 4).round().bfloat16(), (weights * 4).round().bfloat16()
    return aten._grouped_mm(x, weights, ROWS)  # type: ignore[no-any-return]


def _reduced() -> list[Example]:
    return [
        Example(lambda x: x.sum(1), ((4, 6, 8),), "fsf"),
        Example(lambda x: x.sum((0, -1), keepdim=True), ((4, 6, 8),), "sfs"),
        Example(lambda x: x.sum(), ((4, 6),), "ss"),
        Example(lambda x: x.mean(-1, keepdim=True), ((4, 6),), "fb"),
        Example(lambda x: x.amax(1), ((4, 6),), "fb"),
        Example(lambda x: x.amin((0, 1)), ((4, 6, 8),), "bbf"),
        Example(lambda x: x.max(1), ((4, 6),), "fb"),
        Example(lambda x: x.max(), ((4, 6),), "bb"),
        Example(lambda x: x.min(-1), ((4, 6),), "fb"),
        Example(torch.max, ((4, 6), (6,)), "ff f"),
        Example(torch.min, ((4, 6), (4, 1)), "ff f-"),
        Example(lambda x: x.argmax(-1), ((4, 6),), "fb"),
        Example(lambda x: x.argmin(), ((4, 6),), "bb"),
        Example(lambda x: x.median(1), ((4, 6),), "fb"),
        Example(lambda x: x.mode(1), ((4, 6),), "fb"),
        Example(lambda x: x.kthvalue(2, 1), ((4, 6),), "fb"),
        Example(lambda x: x.var(-1), ((4, 6),), "fb"),
        Example(lambda x: x.std(0), ((4, 6),), "bf"),
        Example(lambda x: torch.var_mean(x, 1, keepdim=True), ((4, 6),), "fb"),
        Example(lambda x: torch.std_mean(x, 1), ((4, 6),), "fb"),
        Example(lambda x: x.prod(1), ((4, 6),), "fb"),
        Example(lambda x: x.logsumexp(1), ((4, 6),), "fb"),
        Example(lambda x: torch.linalg.vector_norm(x, dim=-1), ((4, 6),), "fb"),
        Example(lambda x: aten.norm.ScalarOpt_dim(x, 2, [1], True), ((4, 6),), "fb"),
        Example(lambda x: torch.aminmax(x, dim=1), ((4, 6),), "fb"),
        Example(lambda x: torch.count_nonzero(x, 1), ((4, 6),), "fb"),
        Example(lambda x: torch.nansum(x, 1), ((4, 6),), "fb"),
        Example(lambda x: x.all(1), (Mask((4, 6)),), "fb"),
        Example(lambda x: x.any(), (Mask((4, 6)),), "bb"),
    ]


def _along() -> list[Example]:
    return [
        Example(lambda x: x.softmax(-1), ((2, 4, 6),), "ffb"),
        Example(lambda x: x.log_softmax(1), ((2, 4, 6),), "fbf"),
        Example(lambda x: aten._safe_softmax(x, -1), ((4, 6),), "fb"),
        Example(lambda x: x.cumsum(0), ((4, 6),), "bf"),
        Example(lambda x: x.clone().cumsum_(-1), ((4, 6),), "fb"),
        Example(lambda x: x.cumprod(1), ((4, 6),), "fb"),
        Example(lambda x: x.logcumsumexp(1), ((4, 6),), "fb"),
        Example(lambda x: x.cummax(1), ((4, 6),), "fb"),
        Example(lambda x: x.cummin(0), ((4, 6),), "bf"),
        Example(lambda x: x.flip(0, -1), ((4, 6, 8),), "bfb"),
        Example(lambda x: x.roll(1, 1), ((4, 6),), "fb"),
        Example(lambda x: x.roll(1), ((4, 6),), "bb"),
        Example(lambda x: x.tril(), ((2, 4, 6),), "fbb"),
        Example(lambda x: x.triu(1), ((4, 6),), "bb"),
        Example(lambda x: x.clone().tril_(), ((4, 6),), "bb"),
        Example(lambda x: x.clone().triu_(), ((4, 6),), "bb"),
        Example(lambda x, w, b: F.layer_norm(x, w.shape, w, b), ((4, 6, 8), (8,), (8,)), "ffb b b"),
        Example(lambda x: F.layer_norm(x, (6, 8)), ((4, 6, 8),), "fbb"),
        Example(lambda x, w, b: F.group_norm(x, 3, w, b), ((4, 6, 8), (6,), (6,)), "f(fb)b (fb) (fb)"),
        Example(lambda x: F.group_norm(x, 2), ((4, 6),), "f(fb)"),
    ]


def _by_data() -> list[Example]:
    ids = Ids((4, 6), 8)
    return [
        Example(lambda w, i: F.embedding(i, w), ((8, 10), ids), "bf ff"),
        Example(lambda x, i: x[i], ((8, 10), ids), "bf ff"),
        Example(lambda x, i: x[:, i], ((4, 8, 10), Ids((6,), 8)), "fbf f"),
        Example(lambda x, i, j: x[i, j], ((8, 8, 10), Ids((4, 1), 8), Ids((6,), 8)), "bbf f- f"),
        Example(lambda x, i, j: x[i, :, j], ((8, 10, 8), Ids((6,), 8), Ids((6,), 8)), "bfb f f"),
        Example(lambda x, i: aten._unsafe_index(x, [i]), ((8, 10), Ids((6,), 8)), "bf f"),
        Example(lambda x: x[:, BAND], ((4, 8),), "f(fff)"),
        Example(lambda x: x[:, [-4, -3, -2, -1]], ((4, 8),), "f(ff)"),
        Example(lambda x: x[:, [1, 0]], ((4, 8),), "fb"),
        Example(lambda x: x[:, SPREAD], ((4, 8),), "fb"),
        Example(lambda x, v, i: x.index_put((i,), v), ((8, 10), (6, 10), Ids((6,), 8)), "bf bf b"),
        Example(lambda x, v, i: x.clone().index_put_((i,), v), ((8, 10), (6, 10), Ids((6,), 8)), "bf bf b"),
        Example(lambda x, i: x.index_select(0, i), ((8, 10), Ids((6,), 8)), "bf f"),
        Example(lambda x, v, i: x.index_add(0, i, v), ((8, 10), (6, 10), Ids((6,), 8)), "bf bf b"),
        Example(lambda x, v, i: x.clone().index_add_(0, i, v), ((8, 10), (6, 10), Ids((6,), 8)), "bf bf b"),
        Example(lambda x, v: x.index_copy(0, SPREAD, v), ((8, 10), (4, 10)), "bf bf"),
        Example(lambda x, v: x.clone().index_copy_(0, SPREAD, v), ((8, 10), (4, 10)), "bf bf"),
        Example(lambda x: x.index_fill(1, SPREAD, 0.0), ((4, 8),), "fb"),
        Example(lambda x: x.clone().index_fill_(1, SPREAD, 0.0), ((4, 8),), "fb"),
        Example(lambda x, i: x.gather(1, i), ((4, 8), ids), "fb ff"),
        Example(lambda x, i: x.gather(-1, i), ((4, 8), Ids((2, 6), 8)), "bb bf"),
        Example(lambda x, v, i: x.scatter(1, i, v), ((4, 8), (4, 6), ids), "fb fb fb"),
        Example(lambda x, v, i: x.clone().scatter_(1, i, v), ((4, 8), (4, 6), ids), "fb fb fb"),
        Example(lambda x, v, i: x.scatter_add(1, i, v), ((4, 8), (4, 6), ids), "fb fb fb"),
        Example(lambda x, v, i: x.clone().scatter_add_(1, i, v), ((4, 8), (4, 6), ids), "fb fb fb"),
        Example(lambda x, v, i: x.scatter_reduce(1, i, v, "sum"), ((4, 8), (4, 6), ids), "fb fb fb"),
        Example(
            lambda x, v, i: x.clone().scatter_reduce_(1, i, v, "amax"), ((4, 8), (4, 6), ids), "fb fb fb"
        ),
        Example(lambda x: x.topk(2, -1), ((4, 6),), "fb"),
        Example(lambda x: x.topk(2, 0), ((4, 6),), "bf"),
        Example(lambda x: x.sort(1), ((4, 6),), "fb"),
        Example(lambda x: x.argsort(-1), ((4, 6),), "fb"),
        Example(lambda x: torch.view_as_complex(x), ((4, 2),), "fb"),
        Example(lambda x, y: torch.view_as_real(torch.complex(x, y)), ((4, 6), (4, 6)), "ff ff"),
    ]


def _windows() -> list[Example]:
    return [
        Example(F.conv1d, ((4, 6, 10), (8, 6, 2)), "fsb fsb"),
        Example(F.conv1d, ((4, 6, 10), (8, 6, 2), (8,)), "fsb fsb f"),
        Example(F.conv2d, ((4, 6, 8, 8), (10, 6, 3, 3)), "fsbb fsbb"),
        Example(
            lambda x, w, b: F.conv1d(x, w, b, padding=3, groups=x.shape[1]),
            ((4, 6, 10), (6, 1, 4), (6,)),
            "ffb f-b f",
        ),
        Example(lambda x, w: F.conv1d(x, w, groups=2), ((4, 6, 10), (8, 3, 2)), "fbb bbb"),
        Example(
            lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2), ((4, 6, 10), (6, 8, 2), (8,)), "fsb sfb f"
        ),
        Example(
            lambda a, b: torch.linalg.solve_triangular(a, b, upper=False), ((2, 4, 4), (2, 4, 6)), "fbb fbb"
        ),
        Example(lambda a: torch.linalg.inv(a), ((2, 4, 4),), "fbb"),
    ]


def _made() -> list[Example]:
    return [
        Example(lambda x, shape: x.new_zeros(shape), ((4, 6),), "ff", (2, 8)),
        Example(lambda x, shape: x.new_ones(shape), ((4, 6),), "ff", (2, 8)),
        Example(lambda x, shape: x.new_full(shape, 3.0), ((4, 6),), "ff", (2, 8)),
        Example(lambda x, shape: x.new_empty(shape).fill_(1), ((4, 6),), "ff", (2, 8)),
        Example(lambda x, shape: x.new_empty_strided(shape, (6, 1)).zero_(), ((4, 6),), "ff", (4, 6)),
        Example(lambda shape: torch.zeros(shape), (), "", (4, 6)),
        Example(lambda shape: torch.ones(shape), (), "", (4, 6)),
        Example(lambda shape: torch.full(shape, 2.0), (), "", (4, 6)),
        Example(lambda shape: torch.empty(shape).zero_(), (), "", (4, 6)),
        Example(lambda shape: torch.empty_strided(shape, (6, 1)).zero_(), (), "", (4, 6)),
        Example(torch.zeros_like, ((4, 6),), "ff"),
        Example(torch.ones_like, ((4, 6),), "ff"),
        Example(lambda x: torch.full_like(x, 2.0), ((4, 6),), "ff"),
        Example(lambda x: torch.empty_like(x).zero_(), ((4, 6),), "ff"),
        Example(lambda x: torch.rand_like(x).zero_(), ((4, 6),), "ff"),
        Example(lambda x: torch.randn_like(x).zero_(), ((4, 6),), "ff"),
        Example(lambda: torch.arange(8), (), ""),
        Example(lambda: torch.linspace(0, 1, 8), (), ""),
        Example(lambda: torch.eye(4), (), ""),
        Example(lambda: torch.rand(4, 6), (), ""),
        Example(lambda: torch.randn(4, 6), (), ""),
        Example(lambda: torch.randint(4, (4, 6)), (), ""),
        Example(lambda: torch.randperm(6), (), ""),
        Example(lambda: torch.tril_indices(4, 4), (), ""),
        Example(lambda: torch.triu_indices(4, 4), (), ""),
        Example(lambda: torch.scalar_tensor(3.0), (), ""),
        Example(lambda x: torch.bucketize(x, torch.tensor([0.2, 0.5])), ((4, 6),), "bb"),
        Example(lambda x, y: torch.searchsorted(x, y), ((4, 6), (4, 2)), "bb bb"),
        Example(lambda x: x.repeat_interleave(2, 1), ((4, 6),), "ff"),
        Example(lambda: torch.repeat_interleave(BAND), (), ""),
        Example(lambda: torch.bincount(BAND), (), ""),
        Example(lambda: torch.histc(BAND.float(), 4), (), ""),
        Example(lambda: torch.nonzero(BAND), (), ""),
        Example(lambda: torch.unique(BAND), (), ""),
        Example(lambda: torch.unique_consecutive(BAND), (), ""),
        Example(lambda: torch.argsort(SPREAD), (), ""),
        Example(lambda x: x * x.mean().item(), ((4, 6),), "bb"),
    ]


def _copied() -> list[Example]:
    return [
        Example(lambda x: x.to(torch.float32), ((4, 6),), "ff"),
        Example(lambda x: x.detach(), ((4, 6),), "ff"),
        Example(lambda x: aten.alias(x), ((4, 6),), "ff"),
        Example(lambda x: aten.lift_fresh(x), ((4, 6),), "ff"),
        Example(lambda x, y: x.clone().copy_(y), ((4, 6), (6,)), "ff f"),
        Example(lambda x: x.clone().fill_(2), ((4, 6),), "ff"),
        Example(lambda x: x.clone().zero_(), ((4, 6),), "ff"),
        Example(lambda x, y: x // y, ((4, 6), (4, 1)), "ff f-"),
        Example(lambda x: x // 0.25, ((4, 6),), "ff"),
        Example(lambda x: torch.isin(x, 0.5), ((4, 6),), "ff"),
        Example(lambda x: F.dropout(x, 0.0), ((4, 6),), "ff"),
        Example(lambda x: x.clone().bernoulli_(1.0), ((4, 6),), "ff"),
        Example(lambda x: torch.native_dropout(x, 0.0, True), ((4, 6),), "ff"),
        Example(lambda x: torch.ops.aten.rrelu_with_noise(x.abs(), torch.ones_like(x)), ((4, 6),), "ff"),
        Example(torch.polar, ((4, 6), (4, 6)), "ff ff"),
        Example(lambda x, y: torch.complex(x, y).conj().imag, ((4, 6), (4, 6)), "ff ff"),
        Example(lambda x: torch.div(x, 0.3, rounding_mode="floor"), ((4, 6),), "ff"),
        Example(lambda x: (x * 9).long(), ((4, 6),), "ff"),
        Example(lambda x, y: x[:, None] * y[None], ((4, 6), (8, 6)), "ff ff"),
        Example(lambda x, y, m: torch.where(m, x, y), ((4, 6), (4, 6), Mask((6,))), "ff ff f"),
        Example(lambda x, m: x.masked_fill(m, 0.0), ((2, 4, 6), Mask((4, 1))), "fff f-"),
        Example(lambda x, y: x.clone().mul_(y), ((4, 6), (6,)), "ff f"),
        Example(lambda x: (x * 2).neg().clone(), ((4, 6),), "ff"),
    ]


EXAMPLES = {
    "rearranging": _rearranging(),
    "pieces": _pieces(),
    "products": _products(),
    "reduced": _reduced(),
    "along": _along(),
    "by data": _by_data(),
    "windows": _windows(),
    "made": _made(),
    "copied": _copied(),
}
