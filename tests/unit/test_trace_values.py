"""What a trace knows of whole numbers: those that sizes make are true, those that data makes stay unknown."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.case import StepSettings
from shardwise.core.errors import ModelError
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.program import Program
from shardwise.models.factory import FactoryModel
from shardwise.models.self_sharded import SelfSharded
from shardwise.trace.trace import trace

BATCH, SEQ, START = 2, 8, 5


class Reaching(nn.Module):
    """Its table of positions is as long as the largest position asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(32, 4), nn.Linear(4, 32)
        self.lengths: list[int] = []

    def positions(self, ids_BS: Tensor) -> Tensor:
        positions_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        positions_BS = positions_S.unsqueeze(0).expand(ids_BS.shape[0], -1)
        positions_BS = positions_BS + START
        positions_BS[:, -1] += 10
        return positions_BS

    def forward(self, ids_BS: Tensor) -> Tensor:
        positions_BS = self.positions(ids_BS)
        length = int(positions_BS.max().item()) + 1
        self.lengths.append(length)
        table = torch.arange(length, device=ids_BS.device)[positions_BS].unsqueeze(-1)
        logits: Tensor = self.head(self.words(ids_BS) * table)
        return logits


class ReachingByData(Reaching):
    def positions(self, ids_BS: Tensor) -> Tensor:
        positions_BS = super().positions(ids_BS)
        positions_BS += ids_BS
        return positions_BS


def traced(made: Any, plan: TheirPlan = TheirPlan.UNSHARDED, mesh: str = "tp=1") -> Program:
    source = FactoryModel("own:reaching", made, frozenset({"mesh"}), False)
    return trace(source, plan, Mesh.parse(mesh), StepSettings(BATCH, SEQ), device="cuda")


def test_a_number_that_sizes_make_is_the_true_one() -> None:
    model = Reaching()
    traced(lambda mesh=None: model)
    assert set(model.lengths) == {SEQ - 1 + START + 10 + 1}


def test_a_number_that_data_makes_is_not_known_also_where_it_is_written_into_positions() -> None:
    with pytest.raises(ModelError, match="The data decides what runs there"):
        traced(lambda mesh=None: ReachingByData())


def test_ranks_that_agree_on_what_all_have_are_taken_to_be_alike() -> None:
    agreed: list[Any] = []

    def after() -> None:
        present, most = torch.tensor([1, 0], device="cpu"), torch.tensor([3], device="cpu")
        dist.all_reduce(present)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        agreed.append((present.cpu().tolist(), most.tolist()))

    def made(mesh: DeviceMesh | None = None) -> SelfSharded:
        return SelfSharded(Reaching(), after_backward=after if mesh is not None else None)

    traced(made, TheirPlan.OWN, "tp=4")
    assert agreed == [([4, 0], [3])]
