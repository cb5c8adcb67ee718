"""Small models that shard themselves wrongly, each so that one fault makes many gradients wrong; and beside
some of them the same, mended."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WIDTH = 16


class Net(nn.Module):
    """What is looked at, between a table and a head, on a way past it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(40, WIDTH), inner, nn.Linear(WIDTH, 40, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        logits: Tensor = self.head(x + self.inner(x))
        return logits


def _cut(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    whole = module.get_parameter(name).detach()
    setattr(module, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(dim)])))


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def _whole_of_parts(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same tensor on every rank, whose gradient is summed."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


class Sum(torch.autograd.Function):
    """The ranks' sum. The gradient is whole on every rank; `again` sums it once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, again: bool) -> Tensor:
        ctx.group, ctx.again = group, again
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].clone()
        if ctx.again:
            dist.all_reduce(gradient, group=ctx.group)
        return gradient, None, None


# ------------------------------------------------------------------------------------------------ a router


class Mixture(nn.Module):
    """Experts, all computed, of which each rank has a part; a whole router weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4, bias=False)
        self.into = nn.Parameter(torch.randn(4, WIDTH, 24) / 4)
        self.back = nn.Parameter(torch.randn(4, 24, WIDTH) / 5)
        self.mesh: DeviceMesh | None = None
        self.sums_scores = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        weights = self.router(x).softmax(-1)
        if self.mesh is None:
            return self._experts(x, weights, self.into, self.back)
        weights = _whole_of_parts(weights, self.mesh) if self.sums_scores else weights
        into, back = _local(self.into), _local(self.back)
        part = self._experts(_whole_of_parts(x, self.mesh), weights, into, back)
        return Sum.apply(part, self.mesh.get_group(), False)  # type: ignore[no-any-return]

    @staticmethod
    def _experts(x: Tensor, weights: Tensor, into: Tensor, back: Tensor) -> Tensor:
        hidden = torch.einsum("bsh,ehf->bsef", x, into).relu()
        return torch.einsum("bsef,efh,bse->bsh", hidden, back, weights)


def router(mesh: DeviceMesh | None = None, sums_scores: bool = False) -> nn.Module:
    mixture = Mixture()
    if mesh is not None:
        _cut(mixture, "into", 2, mesh)
        _cut(mixture, "back", 1, mesh)
        mixture.mesh, mixture.sums_scores = mesh, sums_scores
    return Net(mixture)


def router_summed(mesh: DeviceMesh | None = None) -> nn.Module:
    return router(mesh, sums_scores=True)


# ------------------------------------------------------------------------------- a key that all heads share


class Latent(nn.Module):
    """Attention whose `squeeze` gives a latent, and a part of the key that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.squeeze = nn.Linear(WIDTH, 32, bias=False), nn.Linear(WIDTH, 12, bias=False)
        self.unfold, self.out = nn.Linear(8, 32, bias=False), nn.Linear(16, WIDTH, bias=False)
        self.mesh: DeviceMesh | None = None

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        latent, shared = self.squeeze(x).split([8, 4], -1)
        shared = _whole_of_parts(shared, self.mesh) if self.mesh is not None else shared
        k, v = self.unfold(latent).unflatten(-1, (-1, 8)).transpose(1, 2).split(4, -1)
        k = torch.cat([k, shared.unsqueeze(1).expand(-1, k.shape[1], -1, -1)], -1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def shared_key(mesh: DeviceMesh | None = None, sums: bool = False) -> nn.Module:
    latent = Latent()
    model = Net(latent)
    if mesh is not None:
        styles: Any = {f"inner.{name}": ColwiseParallel() for name in ("query", "unfold")}
        parallelize_module(model, mesh, styles | {"inner.out": RowwiseParallel()})
        if sums:
            latent.mesh = mesh
    return model


def shared_key_summed(mesh: DeviceMesh | None = None) -> nn.Module:
    return shared_key(mesh, sums=True)


# ---------------------------------------------------------------------------- sums, and what is added to them


class Pair(nn.Module):
    """A colwise and a rowwise layer by hand. adds: where the second one's bias is added: "before" the sum by
    every rank, "inside" the matmul by each a share, "after"; or "past": what goes past is added before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.mesh: DeviceMesh | None = None
        self.adds, self.sums_again = "after", False

    def forward(self, x: Tensor) -> Tensor:
        taken = self.norm(x)
        if self.mesh is None:
            return self.down(torch.tanh(self.up(taken))) + taken  # type: ignore[no-any-return]
        up, bias, down = _local(self.up.weight), _local(self.up.bias), _local(self.down.weight)
        share = self.down.bias / self.mesh.size() if self.adds == "inside" else None
        part = F.linear(torch.tanh(F.linear(_whole_of_parts(taken, self.mesh), up, bias)), down, share)
        part = part + self.down.bias if self.adds == "before" else part
        part = part + taken if self.adds == "past" else part
        whole: Tensor = Sum.apply(part, self.mesh.get_group(), self.sums_again)
        whole = whole + self.down.bias if self.adds in ("past", "after") else whole
        return whole + taken if self.adds != "past" else whole


def _pair(mesh: DeviceMesh | None, adds: str, *, sums_again: bool = False) -> nn.Module:
    pair = Pair()
    if mesh is not None:
        for module, name, dim in ((pair.up, "weight", 0), (pair.up, "bias", 0), (pair.down, "weight", 1)):
            _cut(module, name, dim, mesh)
        pair.mesh, pair.adds, pair.sums_again = mesh, adds, sums_again
    return Net(pair)


def bias_on_every_rank(mesh: DeviceMesh | None = None) -> nn.Module:
    return _pair(mesh, "before")


def input_on_every_rank(mesh: DeviceMesh | None = None) -> nn.Module:
    return _pair(mesh, "past")


def sum_with_a_sum_behind(mesh: DeviceMesh | None = None) -> nn.Module:
    return _pair(mesh, "after", sums_again=True)


def bias_in_the_matmul(mesh: DeviceMesh | None = None) -> nn.Module:
    """Each rank adds its share, and gets the whole gradient."""
    model = _pair(mesh, "inside")
    if mesh is not None:
        model.get_parameter("inner.down.bias").register_hook(lambda each: each * mesh.size())
    return model


def pair(mesh: DeviceMesh | None = None) -> nn.Module:
    return _pair(mesh, "after")


def summed_after_each_backward(mesh: DeviceMesh | None = None) -> nn.Module:
    """Each rank has a part of the norm's gradient; after each backward they sum what has been accumulated."""
    model = pair(mesh)
    if mesh is not None:
        weight, n, group = model.get_parameter("inner.norm.weight"), mesh.size(), mesh.get_group()
        weight.register_hook(lambda each: each / n)
        weight.register_post_accumulate_grad_hook(lambda each: _sum_of(each.grad, group))
    return model


def _sum_of(gradient: Tensor | None, group: dist.ProcessGroup) -> None:
    dist.all_reduce(gradient, group=group)


# ------------------------------------------------------------------------------------- a norm of a part


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def norm_of_a_part(mesh: DeviceMesh | None = None) -> nn.Module:
    model = Net(nn.Sequential(nn.Linear(WIDTH, 32), Norm(32), nn.Linear(32, WIDTH)))
    if mesh is not None:
        parallelize_module(model, mesh, {"inner.0": ColwiseParallel(), "inner.2": RowwiseParallel()})
        _cut(model.get_submodule("inner.1"), "weight", 0, mesh)
    return model


# ---------------------------------------------------------------------------------- heads in parts and whole


class Heads(nn.Module):
    """Four query heads, two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, 16, bias=False), nn.Linear(WIDTH, 8, bias=False)
        self.v, self.o = nn.Linear(WIDTH, 8, bias=False), nn.Linear(16, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, 4)).transpose(1, 2) for each in (self.q, self.k, self.v))
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def whole_keys_under_cut_queries(mesh: DeviceMesh | None = None) -> nn.Module:
    model = Net(Heads())
    if mesh is not None:
        parallelize_module(model, mesh, {"inner.q": ColwiseParallel(), "inner.o": RowwiseParallel()})
    return model


def gradient_on_one_rank(mesh: DeviceMesh | None = None) -> nn.Module:
    """The table's gradient is zero on the last rank."""
    model = pair(mesh)
    if mesh is not None:
        is_last = mesh.get_local_rank() == mesh.size() - 1
        model.get_parameter("table.weight").register_hook(lambda each: 0 * each if is_last else each)
    return model
