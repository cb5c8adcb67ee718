"""`shardwise train` as a user runs it: killed, stopped, resumed, on other meshes, on bad input. What a run that
nothing disturbs gives, all must give, to the last bit where the mesh is the same."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from shardwise.core.training import StepRecord
from shardwise.files.step_log import read_steps
from tests.e2e.command import PATIENCE_S, ranks_of, shardwise, start, wait_until

MODEL = "llama3-debug?n_layers=2,hidden=32,n_heads=4,n_kv_heads=2,ffn_hidden=64,vocab_size=512"
MESH = "fsdp=2,tp=2"
STEPS = 60
TINY = (
    "--model",
    MODEL,
    "--learning-rate",
    "0.003",
    "--batch",
    "8",
    "--seq",
    "16",
    "--held-out",
    "8",
    "--no-verify",
)
LONG = {"STEPS": 200}


def asked(out: Path, *more: str, mesh: str = MESH, steps: int = STEPS) -> tuple[str, ...]:
    every = ("--steps", str(steps), "--save-every", "10", "--validate-every", "20", "--keep", "2")
    return ("train", *TINY, "--mesh", mesh, *every, "--out", str(out), *more)


def what_it_learnt(records: Sequence[StepRecord]) -> list[tuple[int, int, float, float, float | None]]:
    """All of a run's lines but for times and memory."""
    return [
        (each.step, each.position, each.loss, each.gradient_norm, each.validation_loss) for each in records
    ]


def weights(out: Path, steps: int = STEPS) -> dict[str, bytes]:
    """Every tensor of the last checkpoint, as it lies on disk."""
    folder = out / "checkpoints" / f"step-{steps}"
    return {
        f"{file.name} {name}": value.tobytes()
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "undisturbed"
    ended = shardwise(*asked(out))
    assert ended.returncode == 0, ended.stderr
    return out


def test_a_run_learns_and_says_how_it_went(undisturbed: Path) -> None:
    records = read_steps(undisturbed)
    assert [each.step for each in records] == list(range(1, STEPS + 1))
    assert [each.position for each in records] == [8 * step for step in range(1, STEPS + 1)]
    assert [each.step for each in records if each.validation_loss is not None] == [20, 40, 60]
    assert records[-1].validation_loss is not None
    assert records[-1].validation_loss < records[0].loss - 0.1
    kept = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert kept == ["step-50", "step-60"]


KILLS = [
    pytest.param(3, STEPS, id="3 of 60 steps"),
    pytest.param(20, 200, id="20 of 200", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("kills", "steps"), KILLS)
def test_ranks_that_are_killed_at_any_moment_change_no_bit(
    kills: int, steps: int, undisturbed: Path, tmp_path: Path
) -> None:
    whole = undisturbed
    if steps != STEPS:
        whole = tmp_path / "undisturbed"
        assert shardwise(*asked(whole, steps=steps)).returncode == 0
    out, chance = tmp_path / "killed", random.Random(kills)
    running = start(*asked(out, "--restarts", str(kills), steps=steps), cwd=tmp_path)
    killed = 0
    try:
        while killed < kills and running.poll() is None:
            at = chance.randrange(steps)
            seen = len(read_steps(out))
            wait_until(lambda: len(read_steps(out)) != seen or running.poll() is not None)
            time.sleep(chance.random() * 0.5)  # anywhere in a step, or in a save
            ranks = ranks_of(running)
            if len(ranks) == 4:
                ranks[at % 4].kill()
                killed += 1
                wait_until(lambda: not ranks_of(running)[:1] or running.poll() is not None)
        stdout, stderr = running.communicate(timeout=PATIENCE_S * 3)
    finally:
        running.kill()
    assert running.returncode == 0, stderr
    assert killed == kills
    assert stdout.count("was killed by SIGKILL") >= kills
    assert what_it_learnt(read_steps(out)) == what_it_learnt(read_steps(whole))
    assert weights(out, steps) == weights(whole, steps)
