"""What each differentiable collective says of its gradient, and one rank alone. On real ranks:
tests/distributed/test_styles.py."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwise.core.collective import Origin
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.plan import ReduceScatter
from shardwise.core.rule import RuleRef
from shardwise.parallel import collectives
from shardwise.parallel.axis import Axis

ORIGIN = Origin("output", RuleRef("output", "colwise"), Shard(1), Replicate())
X = torch.arange(24.0).view(4, 6)


@pytest.fixture
def one_rank() -> Iterator[Axis]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield Axis.of(init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)), "tp")
    dist.destroy_process_group()


Call = Callable[[Tensor, Axis, Placement], Tensor]
CALLS: dict[str, tuple[Call, str]] = {
    "all_gather": (
        lambda x, axis, grad: collectives.all_gather(
            x, 0, axis, full_size=4, grad_placement=grad, origin=ORIGIN
        ),
        "Partial, Replicate",
    ),
    "reduce_scatter": (
        lambda x, axis, grad: collectives.reduce_scatter(x, 0, axis, grad_placement=grad, origin=ORIGIN),
        "Shard(0)",
    ),
    "all_reduce": (
        lambda x, axis, grad: collectives.all_reduce(x, axis, grad_placement=grad, origin=ORIGIN),
        "Replicate",
    ),
    "fan_out": (
        lambda x, axis, grad: collectives.fan_out(x, axis, grad_placement=grad, origin=ORIGIN),
        "Partial",
    ),
    "split": (
        lambda x, axis, grad: collectives.split(x, 1, axis, grad_placement=grad, origin=ORIGIN),
        "Shard(1)",
    ),
    "all_to_all": (
        lambda x, axis, grad: collectives.all_to_all(
            x, 1, 0, axis, full_size=4, grad_placement=grad, origin=ORIGIN
        ),
        "Shard(1)",
    ),
    "exchange_rows": (
        lambda x, axis, grad: collectives.exchange_rows(
            x, (4,), (4,), axis, grad_placement=grad, origin=ORIGIN
        ),
        "Shard(0)",
    ),
}
PLACEMENTS: tuple[Placement, ...] = (Partial(), Replicate(), Shard(0), Shard(1), Shard(2), Shard(-1))


@pytest.mark.parametrize("name", CALLS)
def test_a_collective_refuses_a_gradient_that_it_cannot_have(one_rank: Axis, name: str) -> None:
    call, allowed = CALLS[name]
    for placement in PLACEMENTS:
        if str(placement) in allowed.split(", "):
            assert torch.equal(call(X, one_rank, placement), X)
            continue
        with pytest.raises(
            ValueError, match=f"^{re.escape(f'{name}: grad_placement is {placement}. Allowed: {allowed}.')}$"
        ):
            call(X, one_rank, placement)


@pytest.mark.parametrize("name", CALLS)
def test_one_rank_gets_its_own_back_forward_and_backward(one_rank: Axis, name: str) -> None:
    call, allowed = CALLS[name]
    placement = next(p for p in PLACEMENTS if str(p) in allowed.split(", "))
    x = X.clone().requires_grad_()
    y = call(x, one_rank, placement)
    y.backward(X + 1)
    assert torch.equal(y, X)
    assert x.grad is not None
    assert torch.equal(x.grad, X + 1)


def test_a_reduce_scatter_is_pairwise_where_the_plan_says_so(one_rank: Axis) -> None:
    found = {mode: Axis.of(one_rank.mesh, "tp", mode).pairwise_reduce_scatter for mode in ReduceScatter}
    # the fake group isn't gloo
    assert found == {ReduceScatter.AUTO: False, ReduceScatter.BACKEND: False, ReduceScatter.PAIRWISE: True}
