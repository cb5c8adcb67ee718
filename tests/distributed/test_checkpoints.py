"""Checkpoints of four real ranks: what is on disk is the model's own, and another mesh or plan takes it up
bit for bit."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.core.mesh import Mesh
from shardwise.launch import run_ranks
from shardwise.train.checkpoints import Checkpoints
from tests.distributed.checkpoint_cases import CASES, MOMENTS, Case, folder_of, known, saved, taken_from
from tests.distributed.checkpoint_workers import STEP
from tests.matrix import thinned

WORKERS = "tests.distributed.checkpoint_workers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


Answers = Callable[[bool], list[Any]]
each_case = pytest.mark.parametrize(
    "case", thinned(CASES, lambda case: case.is_telling), ids=lambda case: case.name
)


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    """What each rank says of the telling cases and of all else, or of the rest of the cases."""

    @cache
    def found(telling: bool) -> list[Any]:
        payload = json.dumps([telling, str(folder)]).encode()
        results = run_ranks(f"{WORKERS}:run", payload, world_size=4, device_type="cpu", timeout_s=300)
        return [json.loads(result) for result in results]

    return found


def whole_tensors(step: Path) -> dict[str, Tensor]:
    """As docs/checkpoints.md reads one without Shardwise."""
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    code = next(part for part in page.split("```")[1::2] if "def tensors" in part)
    names: dict[str, Any] = {}
    exec(code.removeprefix("python"), names)
    return dict(names["tensors"](step))


@each_case
def test_a_saved_tensor_is_whole_and_in_the_model_s_own_order(
    case: Case, folder: Path, answers: Answers
) -> None:
    answers(case.is_telling)
    found = whole_tensors(folder_of(folder, case) / f"step-{STEP}")
    model = case.source.build(dtype=torch.float64, device="cpu")
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in found if name.startswith("model/")]
    for name, parameter in model.named_parameters():
        whole = parameter.detach()
        known(name, whole)
        assert torch.equal(found[f"model/{name}"], whole), name
        for key, (times, plus) in MOMENTS.items():
            assert torch.equal(found[f"optimizer/{name}/{key}"], whole * times + plus), (name, key)
        assert found[f"optimizer/{name}/step"] == STEP
    assert {name.split("/")[1] for name in found if name.startswith("model/")} >= set(names)


@each_case
def test_one_process_takes_up_what_four_ranks_saved(case: Case, folder: Path, answers: Answers) -> None:
    answers(case.is_telling)
    model = case.source.build(dtype=torch.float64, device="cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(folder_of(folder, case))
    assert checkpoints.restore(checkpoints.newest(), model, optimizer) == saved(STEP)
    assert len(checkpoints.lines()) == 1
    for name, parameter in model.named_parameters():
        whole = torch.empty_like(parameter.detach())
        known(name, whole)
        assert torch.equal(parameter, whole), name
        for key, (times, plus) in MOMENTS.items():
            assert torch.equal(optimizer.state[parameter][key], whole * times + plus), (name, key)
        assert optimizer.state[parameter]["step"] == STEP


@each_case
def test_another_mesh_or_plan_takes_the_state_up_bit_for_bit(case: Case, answers: Answers) -> None:
    for answer, *_ in answers(case.is_telling):
        assert answer[case.name] == []


@each_case
def test_random_numbers_on_another_mesh_are_drawn_anew_which_is_told(case: Case, answers: Answers) -> None:
    before, now = Mesh.parse(taken_from(case).mesh), Mesh.parse(case.mesh)
    expected = (
        f"step-{STEP} was saved on mesh {before}, and this is mesh {now}: random numbers are drawn "
        f"anew, from the seed and step {STEP}."
    )
    for _, lines, *_ in answers(case.is_telling):
        assert lines[case.name] == ([] if before == now else [expected])


def test_a_save_that_fails_on_one_rank_is_told_on_all_and_the_next_one_works(
    folder: Path, answers: Answers
) -> None:
    partial = folder / "full" / "step-2.partial"
    line = (
        f"The checkpoint of step 2 wasn't saved: rank 2 can't write {partial}: File too large. "
        "Earlier ones stay."
    )
    for _, _, found, _ in answers(True):
        assert found[:-2] == [True, "step-1", False, "step-1", line, True, "step-3"]


def test_a_folder_that_hosts_don_t_share_is_told(folder: Path, answers: Answers) -> None:
    partial = folder / "elsewhere" / "another host" / "step-1.partial"
    for _, _, found, _ in answers(True):
        assert found[-2:] == [
            f"The checkpoint of step 1 wasn't saved: rank 3 doesn't see {partial}, which rank 0 has made: "
            "use a folder that all hosts share. Earlier ones stay.",
            None,
        ]


def test_a_run_with_dropout_goes_on_bit_for_bit(answers: Answers) -> None:
    for *_, runs in answers(True):
        assert runs["continued"] == runs["undisturbed"]
        assert len(runs["continued"]) == 4
