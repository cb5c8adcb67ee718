"""What the ranks of test_checkpoints.py run."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.core.mesh import Mesh
from shardwise.launch import RankContext
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep
from shardwise.train.checkpoints import Checkpoints
from tests.distributed.checkpoint_cases import CASES, MOMENTS, Case, folder_of, known, saved, taken_from

CPU = torch.device("cpu")
STEP = 7


def built(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    """With known numbers in all of its state."""
    mesh = device_mesh(Mesh.parse(case.mesh), "cpu")
    model = build_model(
        case.source,
        case.any_plan(),
        mesh,
        dtype=torch.float64,
        device=CPU,
        seed=3,
        pipeline=case.pipeline,
        on_parameter=known,
    )
    optimizer = TrainStep(model, mesh=mesh).optimizer
    with torch.no_grad():
        for parameter in model.parameters():
            moments = {key: parameter.detach() * a + b for key, (a, b) in MOMENTS.items()}
            optimizer.state[parameter] = {"step": torch.tensor(float(STEP)), **moments}
    return model, optimizer


def locals_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, _local(parameter)
        for key, value in optimizer.state[parameter].items():
            yield f"{key} of {name}", _local(value)


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def run(context: RankContext, payload: bytes) -> bytes:
    """payload: whether of the telling cases or the rest, and a folder. Every case is saved, and then taken up
    by the next one of its model: names of what isn't as it was, by case; the lines that ranks were told then;
    and, with the telling ones, of a save that fails on one rank."""
    telling, text = json.loads(payload)
    folder, made = Path(text), {}
    cases = [case for case in CASES if case.is_telling is telling]
    for case in cases:
        context.note(f"saves {case.name}")
        made[case] = model, optimizer = built(case)
        checkpoints = Checkpoints(folder_of(folder, case), mesh=Mesh.parse(case.mesh))
        checkpoints.save(STEP, model, optimizer, saved(STEP), wait=True)
        assert not checkpoints.lines()
    answer, lines = {}, {}
    for case in cases:
        context.note(f"takes up {case.name}")
        model, optimizer = made.pop(case)
        expected = {name: local.clone() for name, local in locals_of(model, optimizer)}
        for _, local in locals_of(model, optimizer):
            local.zero_()
        optimizer.state.clear()
        checkpoints = Checkpoints(folder_of(folder, taken_from(case)), mesh=Mesh.parse(case.mesh))
        found = checkpoints.newest()
        assert checkpoints.restore(found, model, optimizer) == saved(STEP)
        answer[case.name] = [
            name for name, local in locals_of(model, optimizer) if not torch.equal(local, expected.pop(name))
        ]
        answer[case.name] += list(expected)
        lines[case.name] = list(checkpoints.lines())
    if not telling:
        return json.dumps([answer, lines]).encode()
    context.note("saves where one rank can't")
    full = _where_one_rank_can_t(folder / "full", context.rank)
    context.note("saves where one rank has another folder")
    full += _where_one_rank_is_elsewhere(folder / "elsewhere", context.rank)
    context.note("goes on where dropout is on")
    return json.dumps([answer, lines, full, _goes_on(folder / "dropout")]).encode()


def _where_one_rank_is_elsewhere(folder: Path, rank: int) -> list[object]:
    """What ranks are told where rank 3 sees none of what the others do."""
    model, optimizer = built(CASES[0])
    checkpoints = Checkpoints(folder / "another host" if rank == 3 else folder)
    checkpoints.save(1, model, optimizer, saved(1), wait=True)
    return [*checkpoints.lines(), checkpoints.newest().path]


def _goes_on(folder: Path) -> dict[str, list[list[float]]]:
    """Losses and a weight of four steps: of a run, and of one that goes on after the second step from what
    the first saved there."""
    case = Case("hf:gpt2", "fsdp=2,tp=2", "made")
    mesh = device_mesh(Mesh.parse(case.mesh), "cpu")

    def steps(step: TrainStep, numbers: range) -> Iterator[list[float]]:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            ids_BS = torch.randint(1, 64, (4, 9), generator=generator)
            result = step(list(Portion.on(mesh).cut(ids_BS[:, :-1], ids_BS[:, 1:])))
            weight = _local(next(step.model.parameters())).sum()
            yield [result.loss.item(), result.gradient_norm.item(), weight.item()]

    answer = {}
    for name in ("undisturbed", "continued"):
        torch.manual_seed(len(name))
        model = build_model(
            case.source, case.any_plan(), mesh, dtype=torch.float32, device=CPU, seed=len(name)
        )
        step, checkpoints = TrainStep(model, mesh=mesh), Checkpoints(folder, mesh=Mesh.parse(case.mesh))
        if name == "undisturbed":
            before = list(steps(step, range(2)))
            checkpoints.save(2, model, step.optimizer, saved(2))
        else:
            checkpoints.restore(checkpoints.newest(), model, step.optimizer)
        answer[name] = [*before, *steps(step, range(2, 4))]
        checkpoints.finish()
    return answer


def _where_one_rank_can_t(folder: Path, rank: int) -> list[object]:
    """What ranks are told of a save that rank 2 can't write, of the one before it and of the one after."""
    model, optimizer = built(CASES[0])
    checkpoints = Checkpoints(folder)
    found: list[object] = []
    for step in (1, 2, 3):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if (step, rank) == (2, 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        checkpoints.save(step, model, optimizer, saved(step))
        outcome = checkpoints.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert outcome is not None
        newest = checkpoints.newest().path
        assert newest is not None
        found += [outcome.published, newest.name, *checkpoints.lines()]
    return found
