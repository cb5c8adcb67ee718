"""What the ranks of test_user_loop.py run: a model of our own (the example's) and its loop, FSDP2 above,
checkpoints around.

Every rank computes the unsharded run whole and compares with it; a case returns the differences
(Differences), or words. Every launch runs many cases, one after the other on all ranks, and returns them by
name.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import shardwise
from examples.train_your_model import PLAN, Writer
from shardwise.core.errors import ShardwiseError
from shardwise.core.mesh import Mesh
from shardwise.core.plan import Plan
from shardwise.launch import RankContext
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.parallel.loss import IGNORED, count_valid
from shardwise.step.build import build_model, device_mesh
from shardwise.step.clipping import clip_gradients
from shardwise.step.train import TrainStep

EVEN, UNEVEN = 256, 257
EMBEDDINGS = ("rowwise", "colwise", "routed", "replicated", "routed-interleaved")
UNDER_FSDP = EMBEDDINGS[:-1]
SEQ = 16
BATCH = 4
# small enough to bite at every step
MAX_NORM = 0.1


@dataclass(frozen=True, slots=True)
class Weights:
    """One unsharded checkpoint: which writer, filled from which seed."""

    vocabulary: int
    tied: bool
    seed: int = 1

    def __str__(self) -> str:
        return f"{self.vocabulary}{'-tied' if self.tied else ''}"


CHECKPOINTS = (Weights(EVEN, False), Weights(UNEVEN, False), Weights(UNEVEN, True))


def is_telling(embedding: str, weights: Weights) -> bool:
    """Whether `make test` tries this way to embed with these weights: rowwise with all, each other with tied
    or with untied ones."""
    return embedding == "rowwise" or weights.tied == (embedding in ("routed", "replicated"))


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launch runs: the telling pairs of embedding and weights and all that isn't of pairs, or the
    other pairs."""

    folder: str
    telling: bool

    def pairs(
        self, embeddings: Sequence[str], checkpoints: Sequence[Weights]
    ) -> Iterator[tuple[str, Weights]]:
        for embedding, weights in product(embeddings, checkpoints):
            if is_telling(embedding, weights) == self.telling:
                yield embedding, weights


@dataclass(frozen=True, slots=True)
class Differences:
    """Largest relative differences from the unsharded run, over the steps and over the final parameters; and
    how many gradients were not placed as their parameter was (PyTorch's optimizers would still take them,
    with a collective each)."""

    loss: float
    norm: float
    parameters: float
    misplaced: int


@dataclass(frozen=True, slots=True)
class Loop:
    """How a user may write a loop. count_valid: labels that don't count are spread unevenly, so losses are
    normalised by the whole batch's count and FSDP2 sums; otherwise each part takes its own mean and FSDP2
    averages. held_back: FSDP2 reduces in the last micro-batch only."""

    steps: int = 3
    first: int = 0
    micro_batches: int = 1
    count_valid: bool = False
    own_clipping: bool = False
    held_back: bool = False
    fused: bool | None = None
    foreach: bool | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]
    misplaced: int = 0


def writer(weights: Weights) -> Writer:
    """The unsharded model, in float64."""
    torch.manual_seed(weights.seed)
    model = Writer(weights.vocabulary, hidden=16, heads=4, n_blocks=1, longest=32).double()
    if weights.tied:
        model.head.weight = model.words.weight
    return model


def plan(embedding: str) -> Plan:
    style, _, ownership = embedding.partition("-")
    value = f'{{ style = "{style}", ownership = "{ownership}" }}' if ownership else f'"{style}"'
    return Plan.from_toml(PLAN.replace('"words" = "rowwise"', f'"words" = {value}'))


def sharded(weights: Weights, embedding: str, mesh: DeviceMesh) -> Writer:
    """Tensor parallel, and under FSDP2 where the mesh has such an axis."""
    model = writer(weights)
    shardwise.parallelize(model, plan(embedding), mesh)
    return under_fsdp(model, mesh)


def under_fsdp(model: Writer, mesh: DeviceMesh) -> Writer:
    if "fsdp" in (mesh.mesh_dim_names or ()):
        for block in model.blocks:
            fully_shard(block, mesh=mesh["fsdp"])
        fully_shard(model, mesh=mesh["fsdp"])
    return model


def global_batch(step: int, vocabulary: int, *, ignored: bool) -> tuple[Tensor, Tensor]:
    """Ids and labels [B, S]; where some are to be ignored, each sequence has another number of them."""
    generator = torch.Generator().manual_seed(100 + step)
    ids_BS, labels_BS = torch.randint(0, vocabulary, (2, BATCH, SEQ), generator=generator)
    if ignored:
        for sequence in range(BATCH):
            labels_BS[sequence, : 3 * sequence] = IGNORED
    return ids_BS, labels_BS


def optimizer_of(model: nn.Module, loop: Loop) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=loop.fused, foreach=loop.foreach)


def train(
    model: Writer, loop: Loop, mesh: DeviceMesh | None = None, optimizer: torch.optim.AdamW | None = None
) -> Trained:
    """A user's own loop: sharded over mesh, or on one process."""
    group = mesh.get_group("fsdp") if mesh is not None and "fsdp" in (mesh.mesh_dim_names or ()) else None
    n_parts, part = (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
    optimizer = optimizer or optimizer_of(model, loop)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units if loop.count_valid else ():
        unit.set_gradient_divide_factor(1.0)
    loss_function = shardwise.loss_of(model)
    losses, norms, misplaced = [], [], 0
    for step in range(loop.first, loop.first + loop.steps):
        ids_BS, labels_BS = global_batch(step, model.words.num_embeddings, ignored=loop.count_valid)
        valid = count_valid(labels_BS) if loop.count_valid else None
        total = torch.zeros((), dtype=torch.float64)
        micro_batches = [
            whole.chunk(n_parts)[part].chunk(loop.micro_batches) for whole in (ids_BS, labels_BS)
        ]
        for index, (ids, labels) in enumerate(zip(*micro_batches, strict=True)):
            for unit in units if loop.held_back else ():
                unit.set_requires_gradient_sync(index == loop.micro_batches - 1)
            loss = loss_function(model(ids), labels, valid)
            loss = loss if loop.count_valid else loss / loop.micro_batches
            loss.backward()
            total += loss.detach()
        misplaced += n_misplaced(model)
        if loop.own_clipping:
            norm = clip_gradients(model.parameters(), MAX_NORM)
        else:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if group is not None:
            dist.all_reduce(total, group=group)
        losses.append(total.item() / (1 if loop.count_valid else n_parts))
        norms.append(whole_tensor(norm).item())
    return Trained(losses, norms, whole_parameters(model), misplaced)


def n_misplaced(model: nn.Module) -> int:
    pairs = [
        (parameter, parameter.grad) for parameter in model.parameters() if isinstance(parameter, DTensor)
    ]
    return sum(
        not isinstance(gradient, DTensor) or gradient.placements != parameter.placements
        for parameter, gradient in pairs
    )


def whole_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """From state_dict(), so that interleaved rows are in the order of their ids."""
    return {name: whole_tensor(value).clone() for name, value in model.state_dict().items()}


def differences(got: Trained, want: Trained) -> Differences:
    def largest(pairs: list[tuple[float, float]]) -> float:
        return max(abs(g - w) / abs(w) if math.isfinite(g) else math.inf for g, w in pairs)

    assert got.parameters.keys() == want.parameters.keys()
    assert min(want.norms) > MAX_NORM  # or clipping would be left out
    norms = [
        (
            torch.linalg.norm(got.parameters[name] - want.parameters[name]),
            torch.linalg.norm(want.parameters[name]),
        )
        for name in want.parameters
    ]
    return Differences(
        largest(list(zip(got.losses, want.losses, strict=True))),
        largest(list(zip(got.norms, want.norms, strict=True))),
        max((difference / size).nan_to_num(nan=math.inf).item() for difference, size in norms),
        got.misplaced,
    )


def compare(weights: Weights, embedding: str, loop: Loop, mesh: DeviceMesh) -> Differences:
    reference = train(
        writer(weights), replace(loop, micro_batches=1, own_clipping=False, fused=None, foreach=None)
    )
    return differences(train(sharded(weights, embedding, mesh), loop, mesh), reference)


def through_checkpoint(folder: Path, weights: Weights, embedding: str, mesh: DeviceMesh, name: str) -> bool:
    """Loads the unsharded checkpoint, says whether the model then computes what the unsharded one does, and
    writes its own."""
    model = sharded(replace(weights, seed=2), embedding, mesh)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder / f"whole-{weights}")
    model.load_state_dict(state)
    dcp.save(model.state_dict(), checkpoint_id=folder / name)
    return computes_the_same(model, writer(weights))


def computes_the_same(model: Writer, unsharded: Writer) -> bool:
    ids_BS, labels_BS = global_batch(0, unsharded.words.num_embeddings, ignored=False)
    with torch.no_grad():
        loss, want = (shardwise.loss_of(m)(m(ids_BS), labels_BS) for m in (model, unsharded))
    return bool(torch.isclose(loss, want, rtol=1e-12))


def from_whole_tensors(weights: Weights, embedding: str, mesh: DeviceMesh, *, assign: bool = False) -> bool:
    """load_state_dict() with plain whole tensors: every parameter comes back bit for bit, the caller's dict
    is as it was, and it computes."""
    model, unsharded = sharded(replace(weights, seed=2), embedding, mesh), writer(weights)
    given = unsharded.state_dict()
    model.load_state_dict(given, assign=assign)
    if assign and weights.tied:
        model.head.weight = model.words.weight
    back = whole_parameters(model)
    same = all(torch.equal(back[name], value) for name, value in unsharded.state_dict().items())
    return (
        same
        and not any(isinstance(value, DTensor) for value in given.values())
        and computes_the_same(model, unsharded)
    )


def said(act: Callable[[], object]) -> str:
    """The error that act raises, as `Kind: text`."""
    try:
        act()
    except (ShardwiseError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def resumed(folder: Path, embedding: str, mesh: DeviceMesh, *, from_one_process: bool) -> Differences:
    """Two steps, a checkpoint of model and optimizer, two more steps in a fresh model; against four steps in
    one go. The first two, and those in one go, are one process's, or these ranks' own."""
    weights, loop = CHECKPOINTS[1], Loop(steps=4)
    path = folder / f"resumed-{embedding}-{mesh.size()}-{from_one_process}"
    on = None if from_one_process else mesh

    def fresh() -> Writer:
        return writer(weights) if on is None else sharded(weights, embedding, on)

    straight = train(fresh(), loop, on)
    model = fresh()
    optimizer = optimizer_of(model, loop)
    first = train(model, replace(loop, steps=2), on, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    if on is not None or dist.get_rank() == 0:
        with warnings.catch_warnings(action="ignore"):  # that no process group takes part is meant
            dcp.save(
                {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path, no_dist=on is None
            )
    dist.barrier()

    model = sharded(replace(weights, seed=2), embedding, mesh)
    optimizer = optimizer_of(model, loop)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    rest = train(model, replace(loop, first=2, steps=2), mesh, optimizer)
    both = Trained(
        first.losses + rest.losses,
        first.norms + rest.norms,
        rest.parameters,
        first.misplaced + rest.misplaced,
    )
    return differences(both, straight)


def from_meta(folder: Path, weights: Weights, embedding: str, mesh: DeviceMesh) -> Differences:
    """Built without memory, sharded, given empty memory, loaded, trained."""
    with torch.device("meta"):
        model = writer(weights)
    shardwise.parallelize(model, plan(embedding), mesh)
    under_fsdp(model, mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder / f"whole-{weights}")
    model.load_state_dict(state)
    return differences(train(model, Loop(), mesh), train(writer(weights), Loop()))


def after(change: Callable[[Writer], object], mesh: DeviceMesh) -> Differences:
    """Trains after something was done to the sharded model that replaces or swaps its parameters, or hides
    them from autograd for a while."""
    weights = CHECKPOINTS[1]
    model = sharded(weights, "rowwise", mesh)
    change(model)
    return differences(train(model, Loop(), mesh), train(writer(weights), Loop()))


def there_and_back(model: Writer) -> None:
    """Weights are float32 numbers at first, so this loses nothing; Module.to() swaps what is inside the
    parameters."""
    model.float()
    model(global_batch(0, UNEVEN, ignored=False)[0])
    model.double()


def unfrozen(mesh: DeviceMesh) -> Differences:
    """Sharded and run while no parameter asks for a gradient, then trained."""
    model = writer(CHECKPOINTS[1]).requires_grad_(False)
    shardwise.parallelize(model, plan("rowwise"), mesh)
    model(global_batch(0, UNEVEN, ignored=False)[0])
    model.requires_grad_(True)
    return differences(train(model, Loop(), mesh), train(writer(CHECKPOINTS[1]), Loop()))


def recomputed(model: Writer, *, reentrant: bool) -> None:
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=reentrant)


def gradients_asked_for(model: Writer) -> None:
    """torch.autograd.grad passes by the same hooks, and must neither take nor leave a `.grad`."""
    ids_BS, labels_BS = global_batch(0, UNEVEN, ignored=False)
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    torch.autograd.grad(
        shardwise.loss_of(model)(model(ids_BS), labels_BS), [model.norm.weight, model.places.weight]
    )
    assert torch.equal(model.norm.weight.grad, torch.ones_like(model.norm.weight))
    assert model.places.weight.grad is None
    model.zero_grad()


def reloaded_by_assignment(model: Writer) -> None:
    model.load_state_dict(writer(CHECKPOINTS[1]).state_dict(), assign=True)


def gradients_beside_fsdp_units() -> Differences:
    """Where FSDP2 has the blocks, and the rest of the model is tensor parallel alone: one backward, its
    gradients as `parameters`."""

    def gradients(model: Writer) -> dict[str, Tensor]:
        ids_BS, labels_BS = global_batch(0, UNEVEN, ignored=False)
        shardwise.loss_of(model)(model(ids_BS), labels_BS).backward()
        return {
            name: whole_tensor(parameter.grad)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "tp"))
    with torch.device("meta"):
        model = writer(CHECKPOINTS[1])
    shardwise.parallelize(model, plan("rowwise"), mesh)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["fsdp"])
    model.to_empty(device="cpu").load_state_dict(writer(CHECKPOINTS[1]).state_dict())
    got, want = gradients(model), gradients(writer(CHECKPOINTS[1]))
    assert got.keys() == want.keys()
    worst = max(float(torch.dist(got[name], want[name]) / torch.linalg.norm(want[name])) for name in want)
    return Differences(0.0, 0.0, worst, n_misplaced(model))


def train_step(plan_name: str, mesh_text: str) -> Differences:
    """shardwise's own step on Llama: clipping, micro-batches, labels that don't count; over the axes of a
    mesh such as "fsdp=2,tp=2"."""
    spec = ModelSpec("tiny", LlamaConfig(UNEVEN, 16, 2, 4, 2, 32), "for tests")
    mesh = device_mesh(Mesh.parse(mesh_text), "cpu")
    outer = mesh[(mesh.mesh_dim_names or ())[0]]

    def run(plan: Plan | None, micro_batches: int) -> Trained:
        on = mesh if plan is not None else None
        model = build_model(spec, plan, on, dtype=torch.float64, device=torch.device("cpu"), seed=3)
        step = TrainStep(model, mesh=on, learning_rate=1e-2, max_norm=MAX_NORM)
        losses, norms = [], []
        for index in range(3):
            ids_BS, labels_BS = global_batch(index, UNEVEN, ignored=True)
            if plan is not None:
                ids_BS, labels_BS = (
                    whole.chunk(outer.size())[outer.get_local_rank()] for whole in (ids_BS, labels_BS)
                )
            result = step(list(zip(ids_BS.chunk(micro_batches), labels_BS.chunk(micro_batches), strict=True)))
            losses.append(result.loss.item())
            norms.append(result.gradient_norm.item())
        return Trained(losses, norms, whole_parameters(model))

    return differences(run(builtin_plan(plan_name), 2), run(None, 1))


def refused_on_two_ranks(mesh: DeviceMesh) -> dict[str, str]:
    weights = CHECKPOINTS[1]
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "tp"))
    twice = sharded(weights, "rowwise", mesh)
    fsdp_first = writer(weights)
    fully_shard(fsdp_first, mesh=both["fsdp"])
    untied = sharded(CHECKPOINTS[2], "rowwise", mesh)
    untied.load_state_dict(writer(CHECKPOINTS[2]).state_dict(), assign=True)
    ids_BS, _ = global_batch(0, UNEVEN, ignored=False)
    wrong_size = writer(Weights(EVEN, False)).state_dict()
    return {
        "refused: twice": said(lambda: shardwise.parallelize(twice, plan("rowwise"), mesh)),
        "refused: after fully_shard": said(lambda: shardwise.parallelize(fsdp_first, plan("rowwise"), both)),
        "refused: no tp axis": said(
            lambda: shardwise.parallelize(writer(weights), plan("rowwise"), both["fsdp"])
        ),
        "refused: untied": said(lambda: untied(ids_BS)),
        "refused: wrong size": said(lambda: sharded(weights, "rowwise", mesh).load_state_dict(wrong_size)),
        "refused: wrong size, interleaved": said(
            lambda: sharded(weights, "routed-interleaved", mesh).load_state_dict(wrong_size)
        ),
    }


def refused_on_four_ranks(mesh: DeviceMesh) -> dict[str, str]:
    weights = CHECKPOINTS[1]
    # the tp part alone doesn't tell of the fsdp axis
    behind_its_back = writer(weights)
    shardwise.parallelize(behind_its_back, plan("routed-interleaved"), mesh["tp"])
    under_fsdp(behind_its_back, mesh)
    untouched = writer(weights)
    return {
        "refused: interleaved": said(
            lambda: shardwise.parallelize(untouched, plan("routed-interleaved"), mesh)
        ),
        "refused: empty shard": said(
            lambda: shardwise.parallelize(writer(Weights(1, False)), plan("rowwise"), mesh)
        ),
        "refused: interleaved state": said(lambda: behind_its_back.state_dict()),
        "refused: interleaved load": said(
            lambda: behind_its_back.load_state_dict(writer(weights).state_dict())
        ),
        "untouched after a refusal": str(
            not any(isinstance(parameter, DTensor) for parameter in untouched.parameters())
        ),
    }


def on_two_ranks(context: RankContext, payload: bytes) -> bytes:
    launch = Launch(**json.loads(payload))
    folder = Path(launch.folder)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    of_pairs: dict[str, Callable[[], object]] = {
        **{
            f"assigned {e} {w}": partial(from_whole_tensors, w, e, mesh, assign=True)
            for e, w in launch.pairs(EMBEDDINGS, CHECKPOINTS[1:])
        },
        **{
            f"meta {e} {w}": partial(from_meta, folder, w, e, mesh)
            for e, w in launch.pairs(EMBEDDINGS, CHECKPOINTS[1:])
        },
    }
    if not launch.telling:
        return _run(context, of_pairs | _rest_on_two_ranks(folder, mesh), {})
    return _run(context, of_pairs | _others_on_two_ranks(folder, mesh), refused_on_two_ranks(mesh))


def _rest_on_two_ranks(folder: Path, mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
    """What `make test-all` alone asks of two ranks, of all pairs."""
    pairs = list(product(EMBEDDINGS, CHECKPOINTS))
    return {
        **{
            f"checkpoint {e} {w}": partial(through_checkpoint, folder, w, e, mesh, f"tp2-{e}-{w}")
            for e, w in pairs
        },
        **{f"whole tensors {e} {w}": partial(from_whole_tensors, w, e, mesh) for e, w in pairs},
        **{
            f"resumed from one process {e}": partial(resumed, folder, e, mesh, from_one_process=True)
            for e in UNDER_FSDP
        },
    }


def _others_on_two_ranks(folder: Path, mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
    uneven, tied = CHECKPOINTS[1:]
    return {
        **{f"loop {e}": partial(compare, uneven, e, Loop(), mesh) for e in EMBEDDINGS},
        **{f"loop {e} tied": partial(compare, tied, e, Loop(own_clipping=True), mesh) for e in EMBEDDINGS},
        "loop fused": lambda: compare(uneven, "rowwise", Loop(fused=True), mesh),
        "loop foreach": lambda: compare(uneven, "rowwise", Loop(foreach=True), mesh),
        "loop one by one": lambda: compare(uneven, "rowwise", Loop(foreach=False), mesh),
        **{
            f"accumulate {e}": partial(compare, uneven, e, Loop(micro_batches=2), mesh)
            for e in ("rowwise", "replicated")
        },
        "accumulate counted": lambda: compare(
            uneven, "rowwise", Loop(micro_batches=4, count_valid=True), mesh
        ),
        **{
            f"resumed {e}": partial(resumed, folder, e, mesh, from_one_process=False)
            for e in ("rowwise", "routed-interleaved")
        },
        "after to another dtype and back": lambda: after(there_and_back, mesh),
        "after unfreezing": lambda: unfrozen(mesh),
        "after load_state_dict(assign=True)": lambda: after(reloaded_by_assignment, mesh),
        "after torch.autograd.grad": lambda: after(gradients_asked_for, mesh),
        "after reentrant checkpoints": lambda: after(lambda model: recomputed(model, reentrant=True), mesh),
        "after checkpoints": lambda: after(lambda model: recomputed(model, reentrant=False), mesh),
        "gradients beside FSDP units": gradients_beside_fsdp_units,
    }


def on_four_ranks(context: RankContext, payload: bytes) -> bytes:
    launch = Launch(**json.loads(payload))
    folder = Path(launch.folder)
    tp = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    even, uneven, tied = CHECKPOINTS
    of_pairs: dict[str, Callable[[], object]] = {
        **{
            f"averaged {e} {w}": partial(compare, w, e, Loop(), mesh)
            for e, w in launch.pairs(UNDER_FSDP, (even, tied))
        },
        **{
            f"summed {e} {w}": partial(compare, w, e, Loop(count_valid=True, own_clipping=True), mesh)
            for e, w in launch.pairs(UNDER_FSDP, (uneven, tied))
        },
        **{
            f"checkpoint {e} {w}": partial(through_checkpoint, folder, w, e, tp, f"tp4-{e}-{w}")
            for e, w in launch.pairs(EMBEDDINGS, CHECKPOINTS)
        },
        **{
            f"checkpoint fsdp {e} {w}": partial(through_checkpoint, folder, w, e, mesh, f"fsdp2-tp2-{e}-{w}")
            for e, w in launch.pairs(UNDER_FSDP, CHECKPOINTS)
        },
        **{
            f"whole tensors {e} {w}": partial(from_whole_tensors, w, e, mesh)
            for e, w in launch.pairs(UNDER_FSDP, CHECKPOINTS)
        },
    }
    if not launch.telling:
        return _run(context, of_pairs, {})
    return _run(context, of_pairs | _others_on_four_ranks(folder, mesh), refused_on_four_ranks(mesh))


def _others_on_four_ranks(folder: Path, mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
    uneven, tied = CHECKPOINTS[1:]
    held_back = Loop(micro_batches=2, held_back=True)
    return {
        "averaged, accumulated": lambda: compare(uneven, "rowwise", Loop(micro_batches=2), mesh),
        "averaged, held back": lambda: compare(uneven, "rowwise", held_back, mesh),
        "averaged, held back, replicated": lambda: compare(tied, "replicated", held_back, mesh),
        **{
            f"step {p} {m}": partial(train_step, p, m)
            for p in UNDER_FSDP
            for m in ("fsdp=2,tp=2", "dp=2,tp=2")
        },
        "step routed-interleaved dp=2,tp=2": lambda: train_step("routed-interleaved", "dp=2,tp=2"),
        "resumed rowwise": lambda: resumed(folder, "rowwise", mesh, from_one_process=False),
        **{
            f"resumed from one process {e}": partial(resumed, folder, e, mesh, from_one_process=True)
            for e in ("rowwise", "colwise")
        },
        **{f"meta {e} {tied}": partial(from_meta, folder, tied, e, mesh) for e in ("rowwise", "replicated")},
    }


def _run(context: RankContext, cases: dict[str, Callable[[], object]], results: dict[str, str]) -> bytes:
    outcomes: dict[str, object] = dict(results)
    warnings.simplefilter("error")  # as in pytest's own process
    for name, case in cases.items():
        context.note(name)
        outcome = case()
        outcomes[name] = asdict(outcome) if isinstance(outcome, Differences) else outcome
    return json.dumps(outcomes).encode()
