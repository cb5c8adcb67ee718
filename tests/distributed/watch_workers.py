"""What the ranks of test_watch.py run: small models of every kind of sharding under watch(), right ones and
ones with a planted fault. A case returns what was told on this rank, or the error that it ended in."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shardwise
from shardwise.core.drift import Drift
from shardwise.core.errors import ShardwiseError
from shardwise.launch import RankContext

VOCAB = 40
PLAN = """
[rules]
"table" = { style = "rowwise", output = "replicate" }
"norm" = "replicate"
"up" = "colwise"
"down" = "rowwise"
"head" = { style = "colwise", output = "replicate" }
"""
Told = list[str] | str
Case = Callable[[], Told]


class Net(nn.Module):
    """ids [B, S] -> logits [B, S, V]."""

    def __init__(self, dropout: float = 0.0, *, with_statistics: bool = False) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(VOCAB, 12), nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, VOCAB, bias=False)
        self.drop = nn.Dropout(dropout)
        self.statistics = nn.BatchNorm1d(12) if with_statistics else nn.Identity()
        self.register_buffer("scale", torch.linspace(1, 2, 12))

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH = self.norm(self.table(ids_BS)) * self.scale
        x_BSH = self.statistics(x_BSH.flatten(0, 1)).view_as(x_BSH)
        logits_BSV: Tensor = self.head(x_BSH + self.drop(self.down(self.up(x_BSH).relu())))
        return logits_BSV


def net(seed: int = 0, **kinds: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**kinds)


def ids_of(seed: int) -> Tensor:
    return torch.randint(VOCAB, (4, 16), generator=torch.Generator().manual_seed(seed))


def mesh_of(*axes: str) -> DeviceMesh:
    sizes = (dist.get_world_size(),) if len(axes) == 1 else (2, 2)
    return init_device_mesh("cpu", sizes, mesh_dim_names=axes)


def native(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return shardwise.parallelize(model, shardwise.Plan.from_toml(PLAN), mesh)


def by_torch(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model, mesh=mesh)
    return model


def train(
    model: nn.Module,
    steps: int,
    *,
    seed_of: Callable[[int], int] = lambda step: step,
    before: Callable[[int], None] = lambda _: None,
    by_hand: bool = False,
    forwards: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """before: told each step, from 1, ahead of its forward. by_hand: sums gradients over all ranks."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(1, steps + 1):
        before(step)
        for _ in range(forwards):
            ids = ids_of(seed_of(step))
            loss = shardwise.loss_of(model)(model(ids), ids.roll(-1, 1))
            loss.backward()
        if by_hand:
            for parameter in model.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def flip(tensor: Tensor, at: int = 3) -> None:
    """The lowest bit of one number."""
    local(tensor).view(-1).view(torch.int32)[at] ^= 1


def flipped_after(model: nn.Module, name: str, step: int, on: int) -> Callable[[int], None]:
    """Flips a bit once this step is done, on one rank."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def before(now: int) -> None:
        if now == step + 1 and dist.get_rank() == on:
            flip(tensors[name])

    return before


@contextmanager
def telling(model: nn.Module, every: int = 4, **options: Any) -> Iterator[list[str]]:
    """Watches the model; what is told comes into the list."""
    told: list[str] = []

    def take(drift: Drift) -> None:
        told.append(str(drift))

    with shardwise.watch(model, every=every, on_difference=take, **options):
        yield told


# ------------------------------------------------------------------------------------ two ranks


def a_native_plan() -> Told:
    model = native(net(), mesh_of("tp"))
    with telling(model) as told:
        train(model, 6)
    return told


def native_with_another_seed_on_each_rank() -> Told:
    model = native(net(dist.get_rank()), mesh_of("tp"))
    with shardwise.watch(model):
        train(model, 1)
    return "trained"


def native_with_other_ids_on_each_rank() -> Told:
    model = native(net(), mesh_of("tp"))
    with shardwise.watch(model):
        train(model, 1, seed_of=lambda step: step + dist.get_rank())
    return "trained"


def native_with_dropout_seeded_apart() -> Told:
    """parallelize() has its ranks draw alike."""
    model = native(net(dropout=0.5), mesh_of("tp"))
    torch.manual_seed(dist.get_rank())
    with telling(model) as told:
        train(model, 6)
    return told


def a_flipped_bit() -> Told:
    model = native(net(), mesh_of("tp"))
    with telling(model, every=4) as told:
        train(model, 9, before=flipped_after(model, "norm.weight", step=2, on=1))
    return told


def torchs_styles() -> Told:
    model = by_torch(net(), mesh_of("tp"))
    with telling(model) as told:
        train(model, 6)
    return told


def torchs_styles_with_plain_weights_apart() -> Told:
    model = net()
    with torch.no_grad():
        model.table.weight.add_(dist.get_rank())
    with telling(by_torch(model, mesh_of("model"))) as told:
        train(model, 2)
    return told


def torchs_styles_with_dropout_seeded_apart() -> Told:
    model = by_torch(net(dropout=0.5), mesh_of("tp"))
    torch.manual_seed(dist.get_rank())
    with telling(model) as told:
        train(model, 2)
    return told


def torchs_styles_with_dropout_seeded_alike() -> Told:
    model = by_torch(net(dropout=0.5), mesh_of("tp"))
    with telling(model) as told:
        train(model, 6)
    return told


def ddp_with_running_statistics() -> Told:
    """Each rank's are of its own tokens, and right."""
    model = DistributedDataParallel(net(with_statistics=True), broadcast_buffers=False)
    with telling(model) as told:
        train(model, 9, seed_of=lambda step: 2 * step + dist.get_rank())
    return told


def ddp_with_a_flipped_bit_in_a_buffer() -> Told:
    model = DistributedDataParallel(net(with_statistics=True), broadcast_buffers=False)
    with telling(model) as told:
        train(
            model,
            5,
            seed_of=lambda step: 2 * step + dist.get_rank(),
            before=flipped_after(model, "module.scale", step=2, on=0),
        )
    return told


def plain_modules_by_hand() -> Told:
    model = net()
    with telling(model) as told:
        train(model, 6, seed_of=lambda step: 2 * step + dist.get_rank(), by_hand=True)
    return told


def plain_modules_whose_gradients_nobody_sums() -> Told:
    model = net()
    with telling(model, every=2) as told:
        train(model, 3, seed_of=lambda step: 2 * step + dist.get_rank())
    return told


def plain_modules_said_to_be_parts() -> Told:
    model = net(dist.get_rank())
    with telling(model, replicated=()) as told:
        train(model, 3, seed_of=lambda step: 2 * step + dist.get_rank())
    return told


def fsdp_alone() -> Told:
    model = sharded(net(), mesh_of("fsdp"))
    with telling(model, every=1) as told:
        train(model, 3, seed_of=lambda step: 2 * step + dist.get_rank())
    return told


def warnings_of_each_thing_once() -> Told:
    model = native(net(dist.get_rank()), mesh_of("tp"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with shardwise.watch(model, every=1, on_difference="warn"):
            train(model, 3)
    return [str(each.message) for each in caught]


def after_close_nothing_is_looked_at() -> Told:
    model = native(net(), mesh_of("tp"))
    with telling(model, every=1) as told:
        pass
    flip(model.norm.weight, at=dist.get_rank())  # type: ignore[union-attr, arg-type]
    train(model, 2)
    return told


def forwards_that_train_nothing_are_no_steps() -> Told:
    model = native(net(), mesh_of("tp"))
    sentinel = shardwise.watch(model)
    with torch.no_grad():
        model(ids_of(0))
    model.eval()(ids_of(0))
    train(model.train(), 3)
    sentinel.close()
    return [str(sentinel.steps), str(sentinel)]


def steps_are_the_optimizers_where_it_is_given() -> Told:
    model = native(net(), mesh_of("tp"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with telling(model, every=2, optimizer=optimizer) as told:
        train(
            model, 3, forwards=2, optimizer=optimizer, before=flipped_after(model, "norm.bias", step=1, on=0)
        )
    return told


def a_check_by_hand() -> Told:
    model = native(net(), mesh_of("tp"))
    with telling(model) as told:
        model.get_submodule("down").get_parameter("bias").data.add_(dist.get_rank())
    sentinel = shardwise.watch(model)
    sentinel.check()
    return told


def an_axis_that_the_mesh_has_not() -> Told:
    with telling(native(net(), mesh_of("tp")), same_input="tensor") as told:
        return told


TWO = (
    a_native_plan,
    native_with_another_seed_on_each_rank,
    native_with_other_ids_on_each_rank,
    native_with_dropout_seeded_apart,
    a_flipped_bit,
    torchs_styles,
    torchs_styles_with_plain_weights_apart,
    torchs_styles_with_dropout_seeded_apart,
    torchs_styles_with_dropout_seeded_alike,
    ddp_with_running_statistics,
    ddp_with_a_flipped_bit_in_a_buffer,
    plain_modules_by_hand,
    plain_modules_whose_gradients_nobody_sums,
    plain_modules_said_to_be_parts,
    fsdp_alone,
    warnings_of_each_thing_once,
    after_close_nothing_is_looked_at,
    forwards_that_train_nothing_are_no_steps,
    steps_are_the_optimizers_where_it_is_given,
    a_check_by_hand,
    an_axis_that_the_mesh_has_not,
)

# ----------------------------------------------------------------------------------- four ranks


def part(mesh: DeviceMesh) -> Callable[[int], int]:
    return lambda step: 2 * step + mesh.get_local_rank(0)


def fsdp_and_tp() -> Told:
    mesh = mesh_of("fsdp", "tp")
    model = sharded(native(net(), mesh), mesh["fsdp"])
    with telling(model) as told:
        train(model, 6, seed_of=part(mesh))
    return told


def fsdp_and_tp_with_a_flipped_bit_in_a_shard() -> Told:
    mesh = mesh_of("fsdp", "tp")
    model = sharded(native(net(), mesh), mesh["fsdp"])
    with telling(model) as told:
        train(model, 5, seed_of=part(mesh), before=flipped_after(model, "norm.weight", step=1, on=3))
    return told


def fsdp_and_tp_with_ids_of_the_whole_mesh() -> Told:
    mesh = mesh_of("fsdp", "tp")
    model = sharded(native(net(), mesh), mesh["fsdp"])
    with telling(model) as told:
        train(model, 1, seed_of=lambda _: dist.get_rank())
    return told


def a_copy_of_each_shard() -> Told:
    """FSDP over both axes of a mesh: replicated over the first one."""
    mesh = mesh_of("copies", "shards")
    model = sharded(net(), mesh)
    with telling(model) as told:
        train(
            model,
            5,
            seed_of=lambda step: 4 * step + dist.get_rank(),
            before=flipped_after(model, "norm.bias", step=2, on=2),
        )
    return told


def styles_whose_other_axis_is_by_hand() -> Told:
    """Nobody sums over dp."""
    mesh = mesh_of("dp", "tp")
    model = by_torch(net(), mesh["tp"])
    with telling(model, every=1, mesh=mesh) as told:
        train(model, 2, seed_of=part(mesh))
    return told[:1]


def called_before_fully_shard() -> Told:
    mesh = mesh_of("dp", "tp")
    model = net()
    with telling(model, mesh=mesh) as told:
        by_torch(model, mesh["tp"])
        train(model, 1, seed_of=part(mesh))
    return told


FOUR = (
    fsdp_and_tp,
    fsdp_and_tp_with_a_flipped_bit_in_a_shard,
    fsdp_and_tp_with_ids_of_the_whole_mesh,
    a_copy_of_each_shard,
    styles_whose_other_axis_is_by_hand,
    called_before_fully_shard,
)


def run(context: RankContext, payload: bytes) -> bytes:
    """Entry of every rank."""
    found: dict[str, Told] = {}
    for case in TWO if context.world_size == 2 else FOUR:
        context.note(case.__name__)
        try:
            found[case.__name__] = case()
        except ShardwiseError as error:
            found[case.__name__] = f"{type(error).__name__}: {error}"
    return json.dumps(found).encode()


def on_gpus(context: RankContext, payload: bytes) -> bytes:
    """Entry of every rank on NCCL."""
    mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("tp",))
    model = native(net().cuda(), mesh)
    with telling(model, every=4) as told:
        train(model, 6, before=flipped_after(model, "norm.weight", step=2, on=1))
    return "\n".join(told).encode()
