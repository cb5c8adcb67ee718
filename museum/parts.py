"""What exhibits are put together from: a tiny language model, linear layers cut over ranks, and collectives
with a backward. Plain PyTorch, and right: what is wrong stands in the exhibits."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

VOCAB, WIDTH, INNER, HEADS, HEAD = 40, 16, 32, 4, 4
IGNORED = -100
# by axis, the dim of ids and labels along which its ranks have parts
DEALT = {"dp": 0, "fsdp": 0, "ep": 0, "cp": 1}


class Small(nn.Module):
    """ids [B, S] -> logits [B, S, VOCAB]: a table, blocks on a residual stream, a norm, a head."""

    def __init__(self, *blocks: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSD = self.table(ids_BS)
        for block in self.blocks:
            x_BSD = x_BSD + block(x_BSD)
        logits_BSV: Tensor = self.head(self.norm(x_BSD))
        return logits_BSV


class Mlp(nn.Module):
    """norm, up, down."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = Column(WIDTH, INNER, bias=bias)
        self.down = Row(INNER, WIDTH, bias=bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(self.norm(x_BSD))))
        return out


class Attention(nn.Module):
    """Causal self-attention; a rank has as many heads as its q gives."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.q, self.k, self.v = (Column(WIDTH, HEADS * HEAD, bias=False) for _ in range(3))
        self.o = Row(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.norm(x_BSD)
        q_BNSH, k_BNSH, v_BNSH = (heads_of(layer(x_BSD)) for layer in (self.q, self.k, self.v))
        out: Tensor = self.o(attended(q_BNSH, k_BNSH, v_BNSH))
        return out


def heads_of(x_BSF: Tensor, width: int = HEAD) -> Tensor:
    """[B, S, n * width] -> [B, n, S, width]"""
    heads_BNSH: Tensor = x_BSF.unflatten(-1, (-1, width)).transpose(1, 2)
    return heads_BNSH


def attended(q_BNSH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, mask_ST: Tensor | None = None) -> Tensor:
    """[B, S, N * H]; causal without a mask, which says what each query may see."""
    causal = mask_ST is None
    out_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BNTH, v_BNTH, attn_mask=mask_ST, is_causal=causal)
    together_BSF: Tensor = out_BNSH.transpose(1, 2).flatten(2)
    return together_BSF


# ------------------------------------------------------------------------------------ layers over ranks


class Column(nn.Linear):
    """Its outputs are cut over the ranks of `group`, which all have its whole input."""

    group: ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return super().forward(x)
        return F.linear(Enter.apply(x, self.group), local(self.weight), local(self.bias))


class Row(nn.Linear):
    """Its inputs are cut over the ranks of `group`, which all get its whole output."""

    group: ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return super().forward(x)
        out: Tensor = Leave.apply(F.linear(x, local(self.weight)), self.group)
        return out if self.bias is None else out + self.bias


def shard(model: nn.Module, mesh: DeviceMesh, axis: str = "tp") -> None:
    """Cuts every Column and Row of the model over an axis."""
    for layer in model.modules():
        if isinstance(layer, Column | Row):
            layer.group = mesh.get_group(axis)
            cut(layer, "weight", mesh[axis], 0 if isinstance(layer, Column) else 1)
            if isinstance(layer, Column) and layer.bias is not None:
                cut(layer, "bias", mesh[axis], 0)


def cut(module: nn.Module, name: str, mesh: DeviceMesh, dim: int) -> None:
    """Makes a parameter a DTensor of which each rank holds a part along dim. mesh: of one axis."""
    whole = getattr(module, name).detach()
    setattr(module, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------- collectives and their backward


class Enter(torch.autograd.Function):
    """What all ranks have goes into a region where each computes a part: gradients are summed."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return summed(gradient, ctx.group), None


class Leave(torch.autograd.Function):
    """Parts become their sum, which all ranks have, and so its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        return summed(x, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradient, None


class Take(torch.autograd.Function):
    """This rank's part along dim of what all ranks have; the parts' gradients make the whole's."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.dim, ctx.group = dim, group
        return x.chunk(group.size(), dim)[group.rank()].contiguous()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return gathered(gradient, ctx.dim, ctx.group), None, None


class Give(torch.autograd.Function):
    """The parts along dim, put together on every rank. are_parts: whether what comes back is a part on each
    rank, and must be summed, or the same on all."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, dim: int, group: ProcessGroup, are_parts: bool
    ) -> Tensor:
        ctx.dim, ctx.group, ctx.are_parts = dim, group, are_parts
        return gathered(x, dim, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        whole = summed(gradient, ctx.group) if ctx.are_parts else gradient
        return whole.chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()].contiguous(), None, None, None


class Exchange(torch.autograd.Function):
    """All-to-all of equal parts along dim 0: part r goes to rank r. The gradient goes the same way back."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return exchanged(x, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return exchanged(gradient, ctx.group), None


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def gathered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return torch.cat(parts, dim)


def exchanged(x: Tensor, group: ProcessGroup) -> Tensor:
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.detach().contiguous(), group=group)
    return received


def sum_gradients(parameters: Iterable[Tensor], group: ProcessGroup, divide: float = 1.0) -> None:
    """After the backward: all-reduces what this rank has of each gradient."""
    for parameter in parameters:
        if parameter.grad is not None:
            own = local(parameter.grad)
            own.copy_(summed(own, group) / divide)


def sums_in_backward(parameter: Tensor, group: ProcessGroup, divide: float = 1.0) -> None:
    """The same as the gradient arrives."""
    parameter.register_hook(lambda gradient: summed(gradient, group) / divide)


# ---------------------------------------------------------------------------------------- whole steps


def loss_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """The sum over all labels that count."""
    return F.cross_entropy(
        logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def valid(labels_BS: Tensor) -> Tensor:
    """How many labels count."""
    return (labels_BS != IGNORED).sum()


def dealt(batch: tuple[Tensor, Tensor], mesh: DeviceMesh) -> tuple[Tensor, ...]:
    """This rank's part of a batch's ids and labels [B, S]: sequences along dp, fsdp and ep, tokens along cp;
    ranks along tp and pp have the same."""
    parts = batch
    for name in mesh.mesh_dim_names or ():
        if name in DEALT:
            size, place = mesh[name].size(), mesh.get_local_rank(name)
            parts = tuple(each.chunk(size, DEALT[name])[place] for each in parts)  # type: ignore[assignment]
    return parts


def over_ranks(number: Tensor, mesh: DeviceMesh | None, axis: str) -> Tensor:
    """The sum of the ranks' numbers along an axis."""
    return number.detach() if mesh is None else summed(number, mesh.get_group(axis))
