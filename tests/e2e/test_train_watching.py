"""What `shardwise train` tells of a run while it goes on: profiles, scalars, and where its time went."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shardwise.files.step_log import read_steps
from shardwise.predict.machines import machine_text
from tests.e2e.command import shardwise
from tests.e2e.test_train import MODEL, TINY
from tests.matrix import FULL

PHASES = ["backward", "clipping", "forward", "loss", "optimizer", "reducing gradients"]


def test_a_run_profiles_some_steps_and_writes_scalars(tmp_path: Path) -> None:
    out, here = tmp_path / "run", tmp_path / "here.toml"
    here.write_text(machine_text("h100-sxm-80gb").replace('device = "cuda"', 'device = "cpu"'))
    asked = ("--mesh", "fsdp=2", "--steps", "8", "--validate-every", "4", "--save-every", "0")
    watched = ("--profile-every", "3", "--keep-profiles", "1", "--tensorboard", "--slower", "0")
    machine = ("--machine", str(here))
    ended = shardwise("train", *TINY, *asked, *watched, *machine, "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    for step in (3, 6):
        (line,) = {each for each in ended.stdout.splitlines() if each.startswith(f"step {step}: ")}
        assert "% compute" in line
        assert "was late" in line
        assert f"shardwise diff {out}/profiles/step-{step}" in line
    (kept,) = (out / "profiles").iterdir()
    assert kept.name == "step-6"
    assert sorted(each.name for each in kept.iterdir()) == ["rank0.json.gz", "rank1.json.gz"]
    beside = f"Beside the prediction: shardwise diff {out}/predicted {kept}"
    assert beside in ended.stdout
    laid = shardwise(*beside.partition("shardwise ")[2].split(), "--json")
    assert laid.returncode == 0, laid.stderr
    assert {each["term"] for each in json.loads(laid.stdout)["terms"]} >= {"matmul", "waiting for launches"}
    records = read_steps(out)
    assert [each.step for each in records if each.beside == "the profiler"] == [2, 3, 4, 5, 6, 7, 8]
    assert all(sorted(each.phases_s or ()) == PHASES for each in records)
    assert all(sum((each.phases_s or {}).values()) <= 2 * each.seconds for each in records)
    assert {each.data_rank for each in records} <= {0, 1}
    scalars = EventAccumulator(str(out / "tensorboard"))
    scalars.Reload()
    assert [each.step for each in scalars.Scalars("loss/train")] == list(range(1, 9))
    assert [each.step for each in scalars.Scalars("loss/held_out")] == [4, 8]


def test_what_cannot_be_recorded_is_refused_in_a_line(tmp_path: Path) -> None:
    ended = shardwise("train", *TINY, "--profile-every", "1", "--out", str(tmp_path / "run"))
    assert ended.returncode == 2
    assert "--profile-every 1: the step before each recorded one warms the profiler up." in ended.stderr


# over tp the compiler breaks a layer at each collective, and is at work for long
@pytest.mark.parametrize(("mesh", "layers"), [("fsdp=2", 1), pytest.param("tp=2", 2, marks=FULL)])
def test_compiled_layers_learn_what_layers_learn_as_they_are_written(
    mesh: str, layers: int, tmp_path: Path
) -> None:
    model = ("--model", MODEL.replace("n_layers=2", f"n_layers={layers}"))
    runs = []
    for name, more in (("written", ()), ("compiled", ("--compile", "aot_eager"))):
        out = tmp_path / name
        asked = ("--mesh", mesh, "--steps", "4", "--dtype", "float64", "--validate-every", "2")
        ended = shardwise("train", *TINY, *model, *asked, *more, "--out", str(out))
        assert ended.returncode == 0, ended.stderr
        runs.append(read_steps(out))
    assert [len(each) for each in runs] == [4, 4]
    for what in ("loss", "gradient_norm", "validation_loss"):
        ours, theirs = ([getattr(each, what) or 0.0 for each in run] for run in runs)
        assert theirs == pytest.approx(ours, rel=1e-12, abs=0), what


def test_a_compiler_that_is_not_there_is_refused_in_a_line(tmp_path: Path) -> None:
    ended = shardwise("train", *TINY, "--compile", "gcc", "--out", str(tmp_path / "run"))
    assert ended.returncode == 2
    assert "--compile gcc: torch.compile has no such backend. Use " in ended.stderr
