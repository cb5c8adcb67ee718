"""trace() of what a model calls that has no schema, and of buffers that are cut."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shardwise.core import placement
from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveKind
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.program import Collective, MemoryKind, Op, OpKind, Phase, Program
from shardwise.models.factory import FactoryModel
from shardwise.models.self_sharded import Changing, SelfSharded
from shardwise.trace.higher_order import FLEX, FLEX_BACKWARD, MASKED
from shardwise.trace.trace import trace
from tests.distributed.flex_models import HEAD, HIDDEN, VOCAB, Attending, flex_by_heads

BATCH, SEQ = 2, 256
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def traced(make: Callable[..., nn.Module | SelfSharded], tp: int = 1, device: str = "cpu") -> Program:
    takes = frozenset({"mesh"} if tp > 1 else ())
    plan = TheirPlan.OWN if tp > 1 else TheirPlan.UNSHARDED
    source = FactoryModel("own:model", make, takes, False)
    return trace(source, plan, Mesh((("tp", tp),)), StepSettings(BATCH, SEQ), device=device)


def attention_of(program: Program) -> dict[str, Op]:
    found = [item for item in program.items() if isinstance(item, Op) and item.kind is OpKind.ATTENTION]
    return {op.name: op for op in found}


@pytest.mark.parametrize("tp", [1, 2])
def test_flex_attention_is_one_kernel_that_keeps_no_scores(tp: int) -> None:
    program = traced(flex_by_heads, tp, "cuda")
    ops, heads = attention_of(program), HIDDEN // HEAD // tp
    assert ops.keys() == {FLEX, FLEX_BACKWARD}
    assert [op.phase for op in ops.values()] == [Phase.FORWARD, Phase.BACKWARD]
    assert {op.module for op in ops.values()} == {"attention"}
    pairs = BATCH * heads * SEQ * SEQ
    # two matmuls in the forward and five in the backward, half of whose pairs the mask leaves
    assert ops[FLEX].flops == 2 * 2 * pairs * HEAD // 2
    assert ops[FLEX_BACKWARD].flops == 5 * 2 * pairs * HEAD // 2
    shape = (BATCH, heads, SEQ, HEAD)
    assert [spec.shape for spec in ops[FLEX].inputs[:3]] == [shape] * 3
    assert [spec.shape for spec in ops[FLEX_BACKWARD].inputs[:5]] == [shape] * 5
    assert [spec.shape for spec in ops[FLEX_BACKWARD].outputs] == [shape] * 3
    assert MASKED in program.notes


def test_without_a_mask_all_pairs_are_met() -> None:
    program = traced(lambda: Attending(masked=False))
    assert attention_of(program)[FLEX].flops == 2 * 2 * BATCH * HIDDEN // HEAD * SEQ * SEQ * HEAD


class Scaled(nn.Module):
    """A buffer that is cut as its sharded model's tensors are."""

    scale: Tensor

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        self.register_buffer("scale", torch.ones(HIDDEN))
        self.mesh = mesh
        if mesh is not None:
            self.scale = distribute_tensor(self.scale, mesh, [Shard(0)])

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden_BSH: Tensor = self.embed(ids_BS)
        if self.mesh is None:
            scaled = hidden_BSH * self.scale
        else:
            whole = DTensor.from_local(hidden_BSH, self.mesh, [Replicate()])
            cut = whole.redistribute(placements=[Shard(2)]) * self.scale
            assert isinstance(cut, DTensor)
            scaled = cut.full_tensor()
        logits: Tensor = self.head(scaled)
        return logits


def scaled(mesh: DeviceMesh | None = None) -> nn.Module:
    return Scaled(mesh["tp"] if mesh is not None else None)


def test_a_buffer_that_is_a_dtensor_stays_one_and_takes_its_part() -> None:
    whole, sharded = dict(traced(scaled).resident), dict(traced(scaled, 2).resident)
    assert whole[MemoryKind.BUFFER] == 4 * HIDDEN
    assert sharded[MemoryKind.BUFFER] == 4 * HIDDEN // 2


def gathered(part: Tensor, mesh: DeviceMesh) -> Tensor:
    whole = [torch.empty_like(part) for _ in range(mesh.size())]
    dist.all_gather(whole, part.contiguous(), group=mesh.get_group())
    return torch.cat(whole, 1)


class Gathered(nn.Module):
    """Gathers half of its sequence by a call of its own, as a framework's collectives do."""

    gather = staticmethod(gathered)

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        self.mesh = mesh

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden_BSH: Tensor = self.embed(ids_BS)
        if self.mesh is not None:
            hidden_BSH = self.gather(hidden_BSH.detach().chunk(2, 1)[0], self.mesh)
        logits: Tensor = self.head(hidden_BSH)
        return logits


@pytest.mark.parametrize("is_told", [False, True])
def test_what_a_framework_s_own_collective_turns_into_what_it_may_tell(is_told: bool) -> None:
    def make(mesh: DeviceMesh | None = None) -> SelfSharded:
        model = Gathered(mesh["tp"] if mesh is not None else None)
        return SelfSharded(model, changes=telling if is_told else None)

    @contextmanager
    def telling(changing: Changing) -> Iterator[None]:
        def told(part: Tensor, mesh: DeviceMesh) -> Tensor:
            with changing(placement.Shard(1), placement.Replicate()):
                return gathered(part, mesh)

        with patch.object(Gathered, "gather", staticmethod(told)):
            yield

    (gather,) = (
        each
        for each in traced(make, 2).items()
        if isinstance(each, Collective) and each.call.kind is CollectiveKind.ALL_GATHER
    )
    expected = (placement.Shard(1), placement.Replicate()) if is_told else (None, None)
    assert (gather.before, gather.after) == expected
