"""A user's own model and a Hugging Face one, built for a step under each kind of plan; what ranks do in
test_any_model.py."""

from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardwise.core.mesh import Mesh
from shardwise.core.plan import AnyPlan, Plan, TheirPlan
from shardwise.launch import RankContext
from shardwise.models.source import ModelSource, find_model
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep

HUGGING_FACE = (
    "hf:llama?num_hidden_layers=2,hidden_size=16,intermediate_size=32,num_attention_heads=4,"
    "num_key_value_heads=2,vocab_size=300"
)
# gate and up are one weight, each cut by itself
EXPERTS = HUGGING_FACE.replace("llama", "mixtral") + ",num_local_experts=4"
FACTORY = f"{__name__}:blocks"
CPU = torch.device("cpu")
PLAN = Plan.from_toml("""
name = "mine"
[rules]
"words" = { style = "rowwise", output = "replicate" }
"body.*.norm" = "replicate"
"body.*.up" = "colwise"
"body.*.down" = "rowwise"
"head" = "colwise"
""")


class Block(nn.Module):
    """Its table is computed, and no checkpoint has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.table: Tensor
        self.register_buffer("table", torch.linspace(0.5, 2.0, 16), persistent=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        y: Tensor = x_BSH + self.down(torch.relu(self.up(self.norm(x_BSH) * self.table)))
        return y


class Blocks(nn.Module):
    """Its own initialisation makes the head's weights three times as large as nn.Linear does."""

    def __init__(self, vocab_size: int = 300) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, 16)
        self.body = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, vocab_size, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(3)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x = self.words(ids_BS)
        for block in self.body:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def blocks(mesh: DeviceMesh | None = None) -> nn.Module:
    """Sharded by PyTorch's styles where there is a mesh."""
    model = Blocks()
    if mesh is not None:
        styles = {"body.*.up": ColwiseParallel(), "body.*.down": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], styles)
    return model


def few_words() -> nn.Module:
    return Blocks(vocab_size=40)


@dataclass(frozen=True, slots=True)
class Trained:
    """losses, norms: of each step. gap: how far any parameter is off the unsharded model's afterwards."""

    losses: list[float]
    norms: list[float]
    gap: float = 0.0


CASES: tuple[tuple[str, AnyPlan, str], ...] = (
    (FACTORY, PLAN, "tp=2"),
    (FACTORY, TheirPlan.OWN, "tp=2"),
    (FACTORY, PLAN, "fsdp=2,tp=1"),
    (HUGGING_FACE, TheirPlan.HF, "tp=2"),
    (HUGGING_FACE, TheirPlan.HF, "fsdp=2,tp=1"),
    (EXPERTS, TheirPlan.HF, "tp=2"),
    (HUGGING_FACE, TheirPlan.UNSHARDED, "dp=2,tp=1"),
)


def train(context: RankContext, payload: bytes) -> bytes:
    """Of each case: (unsharded, sharded), after a few steps."""
    found = []
    for model, plan, mesh in CASES:
        source = find_model(model)
        whole, values = _trained(source, None, None)
        sharded, others = _trained(source, plan, device_mesh(Mesh.parse(mesh), "cpu"))
        gap = max(float((others[name] - value).abs().max()) for name, value in values.items())
        found.append((whole, replace(sharded, gap=gap)))
    return msgspec.json.encode(found)


def _trained(
    source: ModelSource, plan: AnyPlan | None, mesh: DeviceMesh | None
) -> tuple[Trained, dict[str, Tensor]]:
    """And the parameters afterwards, whole."""
    model = build_model(source, plan, mesh, dtype=torch.float64, device=CPU, seed=3)
    portion = Portion.on(mesh) if mesh is not None else Portion()
    step = TrainStep(model, mesh=mesh, learning_rate=1e-2, max_norm=0.5)
    generator = torch.Generator().manual_seed(0)
    losses, norms = [], []
    for _ in range(3):
        ids_BS = torch.randint(8, 300, (4, 9), generator=generator)
        result = step(portion.cut(ids_BS[:, :-1], ids_BS[:, 1:]))
        losses.append(result.loss.item())
        norms.append(result.gradient_norm.item())
    return Trained(losses, norms), {name: _whole(each) for name, each in model.named_parameters()}


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach().clone()
