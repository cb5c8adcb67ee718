"""What the ranks of test_own_modules.py run beside proofs: checkpoints, FSDP2 above, recomputed layers,
dropout."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from shardwise.launch import RankContext
from shardwise.parallel.apply import loss_of, parallelize
from shardwise.parallel.parameters import fill
from shardwise.step.train import recompute_in
from tests.distributed.own_modules import VOCAB
from tests.distributed.own_modules_cases import BY_CASE, Case

KEPT_IN_PIECES = (
    "query, key and value in one weight, by sizes",
    "gate and up in one weight, by chunk",
    "Conv1D",
    "Conv1D in pieces",
    "one weight, of which each rank has a part of some pieces and all of others",
    "fewer key and value heads than ranks",
)
OVER_OTHERS = (
    *KEPT_IN_PIECES[:3],
    "parameters of a module that holds others",
    "a module that is left whole",
    "a table that scales",
    "adapters",
    KEPT_IN_PIECES[4],
)

# in `make test`: a transposed weight in pieces, pieces of which ranks have parts, heads that ranks share
TELLING = {*KEPT_IN_PIECES[3:], *OVER_OTHERS[3:6]}

AT_TP_2 = ("dp=2,tp=2", "fsdp=2,tp=2")


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose checkpoints are tried: its model by a seed, and the same under its plan for a mesh."""

    name: str
    unsharded: Callable[[int], nn.Module]
    sharded: Callable[[DeviceMesh, int], nn.Module]


def subject_of(case: Case) -> Subject:
    return Subject(case.name, partial(unsharded, case), partial(sharded, case))


def unsharded(case: Case, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return shaken(case.model().double())


def shaken(model: nn.Module) -> nn.Module:
    """No weight is what a model begins with."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model


def meshes_of_four() -> dict[str, DeviceMesh]:
    return {
        "tp=4": init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)),
        "dp=2,tp=2": init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")),
        "fsdp=2,tp=2": init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp")),
    }


def sharded(case: Case, mesh: DeviceMesh, seed: int = 1) -> nn.Module:
    return parallelize(unsharded(case, seed), case.plan(), mesh)


def with_fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for unit in (*model.blocks, model):  # type: ignore[misc]
        fully_shard(unit, mesh=mesh["fsdp"])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same(got: nn.Module, want: nn.Module) -> bool:
    """Every rank's parts, bit for bit."""
    pairs = zip(got.parameters(), want.parameters(), strict=True)
    return all(torch.equal(local(a), local(b)) for a, b in pairs)


def checkpoints(
    subject: Subject, meshes: dict[str, DeviceMesh], folder: Path, names: tuple[str, ...] = AT_TP_2
) -> dict[str, bool]:
    """Written at tp 2, with and without FSDP: is it the model's own, and does it load at tp 4, at tp 2 and
    unsharded, each bit for bit?"""
    plain = subject.unsharded(1).state_dict()
    found = {}
    for name in names:
        mesh = meshes[name]

        def build(seed: int, mesh: DeviceMesh = mesh, name: str = name) -> nn.Module:
            model = subject.sharded(mesh, seed)
            return with_fsdp(model, mesh) if name.startswith("fsdp") else model

        model = build(1)
        state = model.state_dict()
        found[f"{name}: is the model's own"] = all(
            torch.equal(whole(state[key]), plain[key]) for key in plain
        )
        path = folder / f"{subject.name}-{name}".replace(" ", "-").replace(":", "-")
        dcp.save(state, checkpoint_id=path)
        for what, other, want in (
            ("tp=4", subject.sharded(meshes["tp=4"], 2), subject.sharded(meshes["tp=4"], 1)),
            ("as it was", build(2), model),
            ("unsharded", subject.unsharded(2), subject.unsharded(1)),
        ):
            target = other.state_dict()
            dcp.load(target, checkpoint_id=path)
            other.load_state_dict(target)
            found[f"{name}: loads {what}"] = same(other, want)
        from_plain = build(2)
        from_plain.load_state_dict(plain)
        found[f"{name}: takes whole tensors"] = same(from_plain, model)
    return found


def gradients(model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> dict[str, Tensor | None]:
    loss_of(model)(model(ids_BS), labels_BS, valid=labels_BS.numel()).backward()
    return {name: None if p.grad is None else whole(p.grad) for name, p in model.named_parameters()}


def difference(got: dict[str, Tensor | None], want: dict[str, Tensor | None], case: Case, tp: int) -> float:
    """The largest, relative to each gradient. What is in pieces is compared as a set of rows."""
    worst = 0.0
    for name, expected in want.items():
        found = got[name]
        if expected is None or found is None:
            assert expected is found, name
            continue
        norm = float(expected.norm())
        worst = max(worst, abs(float(found.norm()) - norm) / norm)
        if tuple(found.sum(0).shape) and case.name not in KEPT_IN_PIECES:
            worst = max(worst, float((found - expected).norm()) / norm)
    return worst


def above(case: Case, mesh: DeviceMesh, *, recompute: bool) -> float:
    """Under FSDP2 on another axis than tp, or with recomputed layers: gradients beside the unsharded ones."""
    generator = torch.Generator().manual_seed(5)
    ids_BS = torch.randint(0, VOCAB, (2, 8), generator=generator)
    labels_BS = torch.randint(0, VOCAB, (2, 8), generator=generator)
    want = gradients(unsharded(case), ids_BS, labels_BS)
    model = sharded(case, mesh)
    if recompute:
        recompute_in(model.blocks)  # type: ignore[arg-type]
        return difference(gradients(model, ids_BS, labels_BS), want, case, 2)
    with_fsdp(model, mesh)
    part = mesh.get_local_rank("fsdp")
    own_ids, own_labels = ids_BS[part : part + 1], labels_BS[part : part + 1]
    loss_of(model)(model(own_ids), own_labels, valid=labels_BS.numel()).backward()
    got = {name: None if p.grad is None else whole(p.grad) for name, p in model.named_parameters()}
    return difference(got, want, case, 2)


class Dropped(nn.Module):
    """Dropout of what every rank holds whole, and of what is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.dropout = nn.Dropout(0.5), 0.5
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, self.dropout, self.training)
        return self.down(self.inside(self.up(x)))  # type: ignore[no-any-return]


def dropout(context: RankContext, mesh: DeviceMesh) -> dict[str, bool]:
    """Ranks are seeded differently. Do they drop alike, anew each time, and leave their own stream alone?"""
    from shardwise.core.plan import Plan, Rule, Style, StyleName

    rules = (Rule("up", Style(StyleName.COLWISE)), Rule("down", Style(StyleName.ROWWISE)))
    torch.manual_seed(3)
    model = parallelize(Dropped(), Plan("dropout", rules), mesh)
    torch.manual_seed(100 + context.rank)
    before = torch.get_rng_state()
    x = torch.ones(2, 8, 16)
    first, second = model(x), model(x)
    kept = torch.equal(before, torch.get_rng_state())
    everyone = [torch.empty_like(first) for _ in range(context.world_size)]
    dist.all_gather(everyone, first.detach())
    return {
        "alike": all(torch.equal(each, first) for each in everyone),
        "anew": not torch.equal(first, second),
        "alone": kept,
        "none in evaluation": torch.equal(model.eval()(x), model(x)),
    }


def filled_from_meta(case: Case, mesh: DeviceMesh) -> bool:
    """A model that is built on meta, sharded, then filled: as one that is sharded with its weights."""
    from shardwise.parallel.apply import applied_to

    values = unsharded(case).state_dict()
    with torch.device("meta"):
        model = case.model().double()
    parallelize(model, case.plan(), mesh)
    fill(model, lambda name, _: values[name], applied_to(model).row_order)
    return same(model, sharded(case, mesh))


def run(context: RankContext, payload: bytes) -> bytes:
    """On four ranks, of the telling cases or the rest. payload: that, and a folder for checkpoints."""
    telling, folder = json.loads(payload)
    meshes = meshes_of_four()
    answer: dict[str, Any] = {}
    for name in (each for each in KEPT_IN_PIECES if (each in TELLING) is telling):
        context.note(name)
        subject = subject_of(BY_CASE[name])
        answer[f"checkpoint {name}"] = checkpoints(subject, meshes, Path(folder))
        answer[f"filled {name}"] = filled_from_meta(BY_CASE[name], meshes["dp=2,tp=2"])
    for name in (each for each in OVER_OTHERS if (each in TELLING) is telling):
        context.note(name)
        answer[f"fsdp {name}"] = above(BY_CASE[name], meshes["fsdp=2,tp=2"], recompute=False)
        answer[f"recompute {name}"] = above(BY_CASE[name], meshes["dp=2,tp=2"], recompute=True)
    if telling:
        answer["dropout"] = dropout(context, meshes["tp=4"])
    return json.dumps(answer).encode()
