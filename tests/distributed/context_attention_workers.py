"""Attention of queries to the keys of a sequence that ranks share, by each way, against one process's; what
ranks do in test_context_attention.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import msgspec
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from shardwise.core.collective import Origin
from shardwise.core.placement import Replicate, Shard
from shardwise.launch import RankContext
from shardwise.parallel.axis import Axis
from shardwise.parallel.context.asked import Asked
from shardwise.parallel.context.gather import gathered_attention
from shardwise.parallel.context.ring import ring_attention
from shardwise.parallel.recorder import CollectiveRecorder

ORIGIN = Origin("attention", None, Shard(2), Replicate())
WAYS = {"gather": gathered_attention, "ring": ring_attention}
BATCH, CHUNK = 2, 4


@dataclass(frozen=True, slots=True)
class Shape:
    """heads, key heads, width of keys, width of values."""

    heads: int
    key_heads: int
    width: int
    value_width: int


SHAPES = {"plain": Shape(4, 4, 8, 8), "grouped": Shape(4, 2, 8, 8), "other width": Shape(4, 2, 8, 4)}


@dataclass(frozen=True, slots=True)
class Sent:
    """kind, phase, how often, bytes that a rank sent."""

    kind: str
    phase: str
    count: int
    wire_bytes: float


@dataclass(frozen=True, slots=True)
class Answer:
    """errors: the largest of output and gradients, over the ranks, by case. sent: what each way exchanged."""

    errors: dict[str, float]
    sent: dict[str, list[Sent]]
    payload_bytes: int


def own(whole: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """A rank's chunks of a whole tensor."""
    chunks = whole.chunk(2 * ranks, dim)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]), dim)


def cases() -> Iterator[tuple[str, Shape, bool, bool]]:
    for (name, shape), is_causal, has_documents in product(SHAPES.items(), (True, False), (False, True)):
        words = ["causal" if is_causal else "all to all", "documents" if has_documents else ""]
        yield " ".join((name, *filter(None, words))), shape, is_causal, has_documents


def run(context: RankContext, _: bytes) -> bytes:
    ranks, rank = context.world_size, context.rank
    mesh = init_device_mesh(context.device.type, (ranks,), mesh_dim_names=("cp",))
    axis, seq = Axis.of(mesh, "cp"), 2 * ranks * CHUNK
    generator = torch.Generator().manual_seed(0)
    errors: dict[str, float] = {}
    for name, shape, is_causal, has_documents in cases():
        sizes = (
            (shape.heads, shape.width),
            (shape.key_heads, shape.width),
            (shape.key_heads, shape.value_width),
            (shape.heads, shape.value_width),
        )
        q, k, v, grad = (
            torch.randn(BATCH, heads, seq, width, dtype=torch.float64, generator=generator).to(context.device)
            for heads, width in sizes
        )
        documents = torch.randint(0, 3, (BATCH, seq), generator=generator).sort(dim=1).values
        seen = (documents[:, :, None] == documents[:, None, :])[:, None].to(context.device)
        seen = seen if has_documents else torch.ones_like(seen)
        seen = seen.tril() if is_causal else seen
        all_q, all_k, all_v = whole = [each.clone().requires_grad_() for each in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(
            all_q, all_k, all_v, attn_mask=seen, enable_gqa=True
        )
        expected.backward(grad)
        mask = None
        if has_documents:
            rows = own(seen, -2, rank, ranks)
            mask = torch.stack([own(rows, -1, other, ranks) for other in range(ranks)], -2)
        for way, attention in WAYS.items():
            own_q, own_k, own_v = leaves = [
                own(each, 2, rank, ranks).clone().requires_grad_() for each in (q, k, v)
            ]
            asked = Asked(axis, ORIGIN, shape.width**-0.5, is_causal, mask)
            out = attention(own_q, own_k, own_v, asked)
            out.backward(own(grad, 2, rank, ranks))
            pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(leaves, whole, strict=True))]
            errors[f"{name} by {way}"] = max(
                float((a - own(b, 2, rank, ranks)).abs().max())
                for a, b in pairs
                if a is not None and b is not None
            )
    sent, payload_bytes = _sent(axis)
    return msgspec.json.encode(Answer(errors, sent, payload_bytes))


def _sent(axis: Axis) -> tuple[dict[str, list[Sent]], int]:
    """What each way exchanges, in float32; and the bytes of all keys and values."""
    found = {}
    for way, attention in WAYS.items():
        q, k, v = (torch.randn(BATCH, heads, 2 * CHUNK, 8, requires_grad=True) for heads in (4, 2, 2))
        with CollectiveRecorder({str(axis.group.group_name): "cp"}) as recorder:
            attention(q, k, v, Asked(axis, ORIGIN, 1.0, True)).sum().backward()
        kinds = sorted({(str(call.kind), call.phase) for call in recorder.calls})
        found[way] = [
            Sent(kind, phase, len(own_calls), sum(call.wire_bytes for call in own_calls))
            for kind, phase in kinds
            if (own_calls := [c for c in recorder.calls if (str(c.kind), c.phase) == (kind, phase)])
        ]
    return found, 2 * k.numel() * k.element_size() * axis.size
