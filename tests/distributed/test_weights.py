"""Weights from and to Hugging Face on four ranks: what transformers wrote is trained on, and transformers
reads what is written then."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.launch import run_ranks
from tests.distributed.weights_workers import FILE_BYTES, MODELS, STEPS, TELLING, ids_of, source_of
from tests.matrix import thinned

pytest.importorskip("transformers")
CLOSE = 1e-10


def pretrained(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, local_files_only=True, experts_implementation="eager"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With weights of each model as transformers writes them."""
    folder = tmp_path_factory.mktemp("weights")
    for number, name in enumerate(MODELS):
        torch.manual_seed(number)
        model: Any = source_of(name).build(dtype=torch.float64, device="cpu")
        del model.forward  # as transformers has it
        model.save_pretrained(folder / f"{name} in", max_shard_size=FILE_BYTES)
    return folder


Answers = Callable[[str], list[dict[str, Any]]]
each_model = pytest.mark.parametrize("name", thinned(MODELS, lambda name: name in TELLING))


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    """What each rank says, in the launch that a model is in: with the telling ones, or the rest."""

    @cache
    def found(telling: bool) -> list[dict[str, Any]]:
        names = [name for name in MODELS if (name in TELLING) is telling]
        results = run_ranks(
            "tests.distributed.weights_workers:run",
            json.dumps([str(folder), names]).encode(),
            world_size=4,
            device_type="cpu",
            timeout_s=300,
        )
        return [json.loads(result) for result in results]

    return lambda name: found(name in TELLING)


def loss_of(model: nn.Module, ids_BS: Tensor) -> Tensor:
    logits = model(ids_BS[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids_BS[:, 1:].flatten())


@each_model
def test_training_begins_with_the_weights_of_the_folder(name: str, folder: Path, answers: Answers) -> None:
    first = loss_of(pretrained(folder / f"{name} in"), ids_of(0)).item()
    for answer in answers(name):
        assert answer[name]["unused"] == []
        assert answer[name]["losses"][0] == pytest.approx(first, rel=CLOSE)


@each_model
def test_transformers_reads_the_trained_weights_and_gives_our_logits(
    name: str, folder: Path, answers: Answers
) -> None:
    model = pretrained(folder / f"{name} out")
    ids_BS = ids_of(STEPS)
    after, whole_BSV = loss_of(model, ids_BS).item(), model(ids_BS[:, :-1]).logits
    for rank, answer in enumerate(answers(name)):
        assert answer[name]["after"] == pytest.approx(after, rel=CLOSE)
        assert answer[name]["after"] != pytest.approx(answer[name]["losses"][0], rel=1e-3)
        if answer[name]["logits"] is None:
            continue  # a stage has none
        logits = torch.tensor(answer[name]["logits"], dtype=torch.float64)
        shard = whole_BSV.chunk(2)[rank // 2]
        if logits.shape[-1] < shard.shape[-1]:
            shard = shard.chunk(2, -1)[rank % 2]
        assert logits.shape == shard.shape
        assert torch.allclose(logits, shard, rtol=CLOSE, atol=CLOSE)


@each_model
def test_what_is_written_has_transformers_own_names_files_and_shapes(
    name: str, folder: Path, answers: Answers
) -> None:
    index = "model.safetensors.index.json"
    before, after = (json.loads((folder / f"{name} {way}" / index).read_text()) for way in ("in", "out"))
    assert sorted(before["weight_map"]) == sorted(after["weight_map"])
    assert before["metadata"]["total_size"] == after["metadata"]["total_size"]
    assert len(set(after["weight_map"].values())) > 2
    assert all(
        (folder / f"{name} out" / file).stat().st_size < 2 * FILE_BYTES
        for file in after["weight_map"].values()
    )
    assert not (folder / f"{name} out.partial").exists()
