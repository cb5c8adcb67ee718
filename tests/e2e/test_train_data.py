"""What `shardwise train` reads: written tokens with masked documents, on any number of ranks, and damaged
ones."""

import json
import random
from pathlib import Path

import pytest

from shardwise.core.training import StepRecord
from shardwise.files.step_log import read_steps
from tests.e2e.command import shardwise

MODEL = "llama3-debug?n_layers=1,hidden=32,n_heads=4,n_kv_heads=2,ffn_hidden=64,vocab_size=256"
ASKED = ("--model", MODEL, "--batch", "8", "--seq", "32", "--dtype", "float64", "--no-verify")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tokens of documents of very different lengths."""
    chance = random.Random(0)
    with (tmp_path / "a.jsonl").open("w") as lines:
        for _ in range(300):
            words = chance.choices(["red", "green", "blue", "one", "two"], k=chance.choice((1, 2, 40)))
            lines.write(json.dumps({"text": " ".join(words)}) + "\n")
    asked = ("tokens", "a.jsonl", "--vocab-size", "256", "--shard-tokens", "5000", "--out", "t")
    assert shardwise(*asked, cwd=tmp_path).returncode == 0
    return tmp_path / "t"


def trained(folder: Path, mesh: str, *more: str) -> list[StepRecord]:
    every = ("--steps", "4", "--validate-every", "2", "--held-out", "5", "--mesh", mesh)
    ended = shardwise("train", *ASKED, *every, "--text", "t", "--out", mesh, *more, cwd=folder.parent)
    assert ended.returncode == 0, ended.stderr
    return list(read_steps(folder.parent / mesh))


def test_masked_documents_teach_the_same_on_any_mesh(folder: Path) -> None:
    """Ranks and micro-batches have unequally many labels, and five held-out sequences fill no batch."""
    alone = trained(folder, "tp=1", "--documents", "masked")
    shared = trained(folder, "fsdp=2", "--documents", "masked", "--accumulation", "2")
    packed = trained(folder, "dp=1")
    assert [each.position for each in alone] == [each.position for each in shared] == [8, 16, 24, 32]
    for one, other in zip(alone, shared, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-12)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-10)
        assert other.validation_loss == (
            None if one.validation_loss is None else pytest.approx(one.validation_loss, rel=1e-12)
        )
    assert alone[1].validation_loss is not None
    assert packed[0].loss != pytest.approx(alone[0].loss, rel=1e-6)


def test_a_shard_that_is_damaged_ends_the_run_in_one_line_that_names_the_byte(folder: Path) -> None:
    shard = folder / "shard-00001.bin"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    asked = ("train", *ASKED, "--steps", "40", "--mesh", "tp=1", "--text", "t", "--out", "run")
    ended = shardwise(*asked, cwd=folder.parent)
    assert ended.returncode == 2
    line = ended.stderr.splitlines()[-1]
    assert line.startswith(f'shardwise: "{shard}" is damaged: id 65535 at byte ')
    assert line.endswith("Copy the file again, or write the folder anew.")
