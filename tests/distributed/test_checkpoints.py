"""Checkpoints of four real ranks: what is on disk is the model's own, and another mesh or plan takes it up
bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from shardwise.core.mesh import Mesh
from shardwise.launch import run_ranks
from tests.distributed.checkpoint_cases import CASES, MOMENTS, Case, folder_of, known, taken_from
from tests.distributed.checkpoint_workers import STEP

WORKERS = "tests.distributed.checkpoint_workers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[Any]:
    results = run_ranks(
        f"{WORKERS}:run", str(folder).encode(), world_size=4, device_type="cpu", timeout_s=300
    )
    return [json.loads(result) for result in results]


def whole_tensors(step: Path) -> dict[str, Tensor]:
    """As docs/checkpoints.md reads one, without Shardwise."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "U8": torch.uint8, "I64": torch.int64}
    found = {}
    for name, entry in json.loads((step / "index.json").read_text()).items():
        whole = (
            torch.full(entry["shape"], -7, dtype=dtypes[entry["dtype"]])
            if entry["dtype"] != "U8"
            else (torch.zeros(entry["shape"], dtype=torch.uint8))
        )
        for part in entry["parts"]:
            rows = [
                np.concatenate([np.arange(a, a + n * s, s) for a, n, s in runs]) for runs in part["place"]
            ]
            with safe_open(step / f"rank-{part['file']}.safetensors", "pt") as file:
                whole[np.ix_(*rows)] = file.get_tensor(name)
        found[name] = whole
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_saved_tensor_is_whole_and_in_the_model_s_own_order(
    case: Case, folder: Path, answers: list[Any]
) -> None:
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_another_mesh_or_plan_takes_the_state_up_bit_for_bit(case: Case, answers: list[Any]) -> None:
    for answer, *_ in answers:
        assert answer[case.name] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_random_numbers_on_another_mesh_are_drawn_anew_which_is_told(case: Case, answers: list[Any]) -> None:
    before, now = Mesh.parse(taken_from(case).mesh), Mesh.parse(case.mesh)
    expected = (
        f"step-{STEP} was saved on mesh {before}, and this is mesh {now}: random numbers are drawn "
        f"anew, from the seed and step {STEP}."
    )
    for _, lines, *_ in answers:
        assert lines[case.name] == ([] if before == now else [expected])


def test_a_save_that_fails_on_one_rank_is_told_on_all_and_the_next_one_works(
    folder: Path, answers: list[Any]
) -> None:
    partial = folder / "full" / "step-2.partial"
    line = (
        f"The checkpoint of step 2 wasn't saved: rank 2 can't write {partial}: File too large. "
        "Earlier ones stay."
    )
    for _, _, found, _ in answers:
        assert found == [True, "step-1", False, "step-1", line, True, "step-3"]


def test_a_run_with_dropout_goes_on_bit_for_bit(answers: list[Any]) -> None:
    for *_, runs in answers:
        assert runs["continued"] == runs["undisturbed"]
        assert len(runs["continued"]) == 4
