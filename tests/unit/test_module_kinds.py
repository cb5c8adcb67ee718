"""What a module is, decided by what it does; and reasons that hang on it, for modules whose names say
nothing."""

import pytest
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Replicate
from shardwise.core.plan import AnyPlan, Plan, Rule, Style, StyleName, TheirPlan
from shardwise.core.program import Phase
from shardwise.core.rule import ModuleKind
from shardwise.explain.explain import explain
from shardwise.models.source import find_model
from shardwise.parallel.kinds import kind_of
from shardwise.trace.trace import trace


class Words(nn.Embedding):
    """A table of the user's own class."""


class OwnNorm(nn.Module):
    """As transformers writes them: no subclass of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.ones_(nn.Linear(1, 8).weight.flatten()))


class Some(nn.Module):
    """Called as transformers calls its experts."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden


class Net(nn.Module):
    """Its table is called lookup, and its linear layer embedder."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup, self.embedder, self.head = (
            nn.Embedding(32, 8),
            nn.Linear(8, 8, bias=False),
            nn.Linear(8, 32),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedder(self.lookup(ids)))  # type: ignore[no-any-return]


def plain() -> nn.Module:
    return Net()


def sharded(mesh: DeviceMesh | None = None) -> nn.Module:
    """By the user's own hands: nobody tells Shardwise a rule."""
    model = Net()
    if mesh is not None:
        rowwise = RowwiseParallel(input_layouts=TorchReplicate(), output_layouts=TorchReplicate())
        parallelize_module(model, mesh, {"lookup": rowwise, "embedder": rowwise})
    return model


PLAN = Plan(
    "lookup-rowwise",
    (
        Rule("lookup", Style(StyleName.ROWWISE, output=Replicate())),
        Rule("embedder", Style(StyleName.ROWWISE, input=Replicate())),
        Rule("head", Style(StyleName.REPLICATE)),
    ),
)


@pytest.mark.parametrize(
    ("factory", "plan"), [("plain", PLAN), ("sharded", TheirPlan.OWN)], ids=["a rule", "no rule"]
)
def test_a_table_is_told_as_a_table_whatever_it_is_called(factory: str, plan: AnyPlan) -> None:
    model = find_model(f"{__name__}:{factory}")
    told = {
        group.module: group.reason
        for group in explain(trace(model, plan, Mesh.parse("tp=2"), StepSettings(2, 4))).collectives
        if group.phase is Phase.FORWARD and "needs" not in group.reason
    }
    assert "Each rank looked up the ids of its own rows" in told["lookup"]
    assert "Each rank multiplied its slice of the features" in told["embedder"]


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (Words(4, 2), ModuleKind.EMBEDDING),
        (nn.Linear(2, 2), ModuleKind.LINEAR),
        (nn.RMSNorm(2), ModuleKind.NORM),
        (Some(), ModuleKind.EXPERTS),
        (nn.LayerNorm(2), ModuleKind.NORM),
        (OwnNorm(), ModuleKind.NORM),
        (Net(), ModuleKind.CONTAINER),
        (nn.Sequential(nn.Linear(2, 2)), ModuleKind.CONTAINER),
        (nn.GELU(), ModuleKind.OTHER),
        (nn.Conv1d(2, 2, 1), ModuleKind.OTHER),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_module_is_what_it_does(module: nn.Module, kind: ModuleKind) -> None:
    assert kind_of(module) is kind
