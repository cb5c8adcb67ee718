"""`shardwise train` as a user runs it: killed, stopped, resumed, on other meshes, on bad input. What a run
that nothing disturbs gives, all must give, to the last bit where the mesh is the same."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from shardwise.cli.main import _run
from shardwise.core.mesh import Mesh
from shardwise.core.training import Ended, StepRecord, Training
from shardwise.files.document import read_document
from shardwise.files.step_log import read_steps
from tests.e2e.command import PATIENCE_S, children_of, ranks_of, shardwise, start, wait_until

MODEL = "llama3-debug?n_layers=2,hidden=32,n_heads=4,n_kv_heads=2,ffn_hidden=64,vocab_size=512"
MESH = "fsdp=2,tp=2"
ON_TWO = "fsdp=2"  # a rank that is an interpreter of its own takes three seconds of a core to begin
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


def answer(out: Path) -> Training:
    return read_document((out / "train.json").read_bytes(), Training)


def weights(out: Path, steps: int = STEPS) -> dict[str, bytes]:
    """Every tensor of the last checkpoint, as it lies on disk."""
    folder = out / "checkpoints" / f"step-{steps}"
    return {
        f"{file.name} {name}": value.tobytes()
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


Run = Callable[[str], Path]
on_two_or_four = pytest.mark.parametrize("mesh", [ON_TWO, pytest.param(MESH, marks=pytest.mark.full)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What nothing disturbs, on a mesh."""

    @cache
    def run_on(mesh: str) -> Path:
        out = tmp_path_factory.mktemp("train") / "undisturbed"
        ended = shardwise(*asked(out, mesh=mesh))
        assert ended.returncode == 0, ended.stderr
        return out

    return run_on


@on_two_or_four
def test_a_run_learns_and_says_how_it_went(undisturbed: Run, mesh: str) -> None:
    out = undisturbed(mesh)
    records = read_steps(out)
    assert [each.step for each in records] == list(range(1, STEPS + 1))
    assert [each.position for each in records] == [8 * step for step in range(1, STEPS + 1)]
    ends = [each.ended_at or 0.0 for each in records]
    assert ends == sorted(ends)
    assert 0 < time.time() - ends[-1] < 600
    assert [each.step for each in records if each.validation_loss is not None] == [20, 40, 60]
    assert records[-1].validation_loss is not None
    assert records[-1].validation_loss < records[0].loss - 0.1
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["step-50", "step-60"]


KILLS = [
    pytest.param(2, STEPS, ON_TWO, True, id="2 in 60 steps"),
    pytest.param(2, STEPS, ON_TWO, False, id="2 in 60 steps, interpreters"),
    pytest.param(20, 200, MESH, True, id="20 in 200", marks=pytest.mark.timeout(1800)),
]


@pytest.mark.full  # one in a save: where a rank hangs, too
@pytest.mark.parametrize(("kills", "steps", "mesh", "warm"), KILLS)
def test_ranks_that_are_killed_at_any_moment_change_no_bit(
    kills: int, steps: int, mesh: str, warm: bool, undisturbed: Run, tmp_path: Path
) -> None:
    n_ranks = Mesh.parse(mesh).world_size
    if steps == STEPS:
        whole = undisturbed(mesh)
    else:
        whole = tmp_path / "undisturbed"
        assert shardwise(*asked(whole, mesh=mesh, steps=steps)).returncode == 0
    out, chance = tmp_path / "killed", random.Random(kills)
    # the last one may wait 20 steps for a save, and must not meet ranks that have reported already
    moments = sorted(chance.sample(range(2, steps - 30), kills))
    running = start(*asked(out, "--restarts", str(kills), mesh=mesh, steps=steps), cwd=tmp_path, warm=warm)
    try:
        for number, moment in enumerate(moments):
            wait_until(lambda moment=moment: steps_done(out) >= moment)  # type: ignore[misc]
            if number % 2:
                wait_for_a_save(running, out, moment)
            wait_until(lambda: len(ranks_of(running)) == n_ranks)
            time.sleep(chance.random() * 0.1)
            ranks = ranks_of(running)
            ranks[number % n_ranks].kill()
            wait_until(lambda ranks=ranks: not {*ranks}.intersection(ranks_of(running)))  # type: ignore[misc]
        _, stderr = running.communicate(timeout=PATIENCE_S * 3)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 0, stderr
    assert len(answer(out).restarts) == kills
    assert what_it_learnt(read_steps(out)) == what_it_learnt(read_steps(whole))
    assert weights(out, steps) == weights(whole, steps)


def wait_for_a_save(running: subprocess.Popen[str], out: Path, step: int) -> None:
    """Until one is being written, which is short; or, where none was caught, until two should have been."""
    while running.poll() is None and steps_done(out) < step + 20:
        if any(out.glob("checkpoints/*.partial")):
            return
        time.sleep(0.002)


def steps_done(out: Path) -> int:
    records = read_steps(out)
    return records[-1].step if records else 0


@pytest.mark.parametrize(
    ("asks", "mesh", "warm"),
    [
        pytest.param(signal.SIGTERM, ON_TWO, True, id="SIGTERM"),
        pytest.param(signal.SIGTERM, ON_TWO, False, id="SIGTERM, interpreters", marks=pytest.mark.full),
        pytest.param(signal.SIGINT, ON_TWO, True, id="SIGINT", marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, MESH, True, id="SIGTERM on four", marks=pytest.mark.full),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_never_had(
    asks: signal.Signals, mesh: str, warm: bool, undisturbed: Run, tmp_path: Path
) -> None:
    out, whole = tmp_path / "stopped", undisturbed(mesh)
    running = start(*asked(out, mesh=mesh), cwd=tmp_path, warm=warm)
    wait_until(lambda: len(read_steps(out)) > 4 or running.poll() is not None)
    everyone = children_of(running)
    running.send_signal(asks)
    stdout, stderr = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 4, stderr
    assert "Stopped as asked after step" in stdout
    assert not any(each.is_running() and each.status() != "zombie" for each in everyone)
    stopped_at = read_steps(out)[-1].step
    assert stopped_at < STEPS
    assert (out / "checkpoints" / f"step-{stopped_at}").is_dir()
    again = shardwise(*asked(out, "--resume", mesh=mesh))
    assert again.returncode == 0, again.stderr
    assert f"from step {stopped_at} on" in again.stdout
    assert what_it_learnt(read_steps(out)) == what_it_learnt(read_steps(whole))
    assert weights(out) == weights(whole)


ELSEWHERE = [
    (ON_TWO, "tp=2"),
    *(pytest.param(MESH, to, marks=pytest.mark.full) for to in ("tp=4", "fsdp=4", "tp=1", "pp=2,cp=2")),
]


@pytest.fixture(scope="module")
def in_float64(tmp_path_factory: pytest.TempPathFactory) -> Run:
    @cache
    def run_on(mesh: str) -> Path:
        out = tmp_path_factory.mktemp("train") / "float64"
        ended = shardwise(*asked(out, *MOVABLE, mesh=mesh, steps=20))
        assert ended.returncode == 0, ended.stderr
        return out

    return run_on


MOVABLE = ("--model", MODEL.replace("n_kv_heads=2", "n_kv_heads=4"), "--dtype", "float64", "--keep", "9")


@pytest.mark.parametrize(("first", "mesh"), ELSEWHERE)
def test_another_mesh_goes_on_with_the_same_sequences_and_losses(
    first: str, mesh: str, in_float64: Run, tmp_path: Path
) -> None:
    out, whole = tmp_path / "moved", in_float64(first)
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "step-20")
    moved = shardwise(*asked(out, *MOVABLE, "--resume", mesh=mesh, steps=20))
    assert moved.returncode == 0, moved.stderr
    assert f"mesh was {Mesh.parse(first)}, is {mesh}" in moved.stdout
    before, after = read_steps(whole), read_steps(out)
    assert [each.position for each in after] == [each.position for each in before]
    for one, other in zip(before, after, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-12)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-10)
    assert after[-1].validation_loss == pytest.approx(before[-1].validation_loss, rel=1e-12)


@pytest.mark.parametrize("mesh", [MESH, pytest.param("pp=2,dp=2", marks=pytest.mark.full)])
def test_a_number_that_is_not_finite_stops_before_the_update_and_says_where_it_began(
    mesh: str, tmp_path: Path
) -> None:
    out = tmp_path / "explodes"
    ended = shardwise(*asked(out, "--learning-rate", "1e25", "--save-every", "1", mesh=mesh))
    assert ended.returncode == 3
    said = ended.stderr.splitlines()[-1]
    assert re.match(r"shardwise: step 2: the (loss|gradient norm) is (nan|inf)\. ", said), said
    where = r"(layers\.\d|tok_embeddings|output)[\w.]* on rank \d is the first whose \w+ isn't( finite)?\. "
    assert re.search(where + "Nothing was updated; the last checkpoint is as it was", said), said
    assert [each.step for each in read_steps(out)] == [1]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-1"]


@on_two_or_four
def test_a_rank_that_hangs_is_named_with_where_the_others_wait_and_it_and_one_killed_in_a_save_change_no_bit(
    undisturbed: Run, mesh: str, tmp_path: Path
) -> None:
    out, n_ranks = tmp_path / "hangs", Mesh.parse(mesh).world_size
    hung = n_ranks // 2
    # one restart since the last checkpoint, and two all together
    options = ("--timeout", "10", "--restarts", "1")
    running = start(*asked(out, *options, mesh=mesh), cwd=tmp_path, warm=True)
    try:
        wait_until(lambda: steps_done(out) >= 12 and len(ranks_of(running)) == n_ranks)
        hanging = ranks_of(running)[hung]
        hanging.suspend()
        wait_until(lambda: not hanging.is_running())
        wait_until(lambda: steps_done(out) >= 35 and len(ranks_of(running)) == n_ranks)
        wait_for_a_save(running, out, 35)
        ranks_of(running)[hung - 1].kill()
        stdout, stderr = running.communicate(timeout=PATIENCE_S)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 0, stderr
    assert not hanging.is_running()
    assert "nothing was heard from any rank for 10 s" in stdout.replace("\n  ", " ")
    told = " ".join(stdout.split())
    assert re.search(rf"rank {hung}: stopped by SIGSTOP, last at \"step \d+: [a-z ]+\"", told), told
    # one that waits for what it began before is in no collective
    where = r"(in \w+(, module [\w.]+)?|step \d+: [a-z ]+)"
    assert re.search(where + r", not done: \w+ of \w+\[[\d,]*\], number \d+ of group", told), told
    assert len(answer(out).restarts) == 2
    assert what_it_learnt(read_steps(out)) == what_it_learnt(read_steps(undisturbed(mesh)))
    assert weights(out) == weights(undisturbed(mesh))


@pytest.mark.full
def test_under_torchrun_a_killed_rank_changes_no_bit_either(undisturbed: Run, tmp_path: Path) -> None:
    """On four, with tp, test_train_hosts.py has it."""
    out = tmp_path / "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    running = subprocess.Popen(
        [*command, *meeting, "-m", "shardwise", *asked(out, mesh=ON_TWO)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        for moment in (15, 40):
            wait_until(lambda moment=moment: steps_done(out) >= moment)  # type: ignore[misc]
            wait_until(lambda: len(children_of(running)) == 2)
            workers = children_of(running)
            workers[moment % 2].kill()
            wait_until(lambda workers=workers: not {*workers}.intersection(children_of(running)))  # type: ignore[misc]
        _, stderr = running.communicate(timeout=PATIENCE_S)
    finally:
        left = children_of(running)
        running.kill()
        running.communicate()
        for each in left:  # torchrun leaves them behind where it is killed itself
            each.kill()
    assert running.returncode == 0, stderr
    whole = undisturbed(ON_TWO)
    assert what_it_learnt(read_steps(out)) == what_it_learnt(read_steps(whole))
    assert weights(out) == weights(whole)
    again = subprocess.run(
        [*command, *meeting, "-m", "shardwise", *asked(out, mesh=ON_TWO, steps=STEPS + 1)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert f"from step {STEPS} on" in again.stdout  # a job that is submitted again


def test_a_machine_of_another_kind_says_nothing_of_the_run_and_that_is_told(tmp_path: Path) -> None:
    ended = shardwise(*asked(tmp_path / "run", "--machine", "h100-sxm-80gb", steps=2, mesh="tp=2"))
    assert ended.returncode == 0, ended.stderr
    told = " ".join(ended.stdout.split())
    assert "h100-sxm-80gb is a machine for cuda, and this runs on cpu." in told
    assert answer(tmp_path / "run").predicted_s is None


def test_a_run_ends_at_the_loss_that_was_asked_or_says_that_it_was_not_reached(tmp_path: Path) -> None:
    until = ("--validate-every", "5", "--until")
    ends = shardwise(*asked(tmp_path / "ends", *until, "6.1", mesh=ON_TWO))
    assert ends.returncode == 0, ends.stderr
    losses = [each.validation_loss for each in read_steps(tmp_path / "ends") if each.validation_loss]
    assert losses[-1] <= 6.1 < losses[0]
    assert answer(tmp_path / "ends").steps > read_steps(tmp_path / "ends")[-1].step
    never = shardwise(*asked(tmp_path / "never", *until, "1", mesh=ON_TWO, steps=10))
    assert never.returncode == 1
    assert "and 1 was asked." in never.stdout


REFUSED = [
    (("--seq", "32"), "--resume: --seq was 16, is 32. A run that goes on keeps it:"),
    (("--seed", "3"), "--resume: --seed was 0, is 3. A run that goes on keeps it:"),
    (("--held-out", "4"), "--resume: --held-out was 8, is 4. A run that goes on keeps it:"),
    (("--random-ids",), "--resume: the text is another one than the checkpoint's"),
]


def test_a_run_that_goes_on_keeps_what_its_position_and_weights_mean(
    undisturbed: Run, tmp_path: Path
) -> None:
    whole = undisturbed(ON_TWO)
    for more, said in REFUSED:
        ended = shardwise(*asked(whole, "--resume", *more, mesh=ON_TWO, steps=80))
        assert ended.returncode == 2
        assert ended.stderr.splitlines()[-1].startswith(f"shardwise: {said}")
    fewer = shardwise(*asked(whole, "--resume", mesh=ON_TWO, steps=30))
    assert fewer.returncode == 2
    assert "--steps 30: the checkpoint is of step 60 already." in fewer.stderr
    missing = shardwise(*asked(tmp_path / "none", "--resume"))
    assert missing.returncode == 2
    assert "holds no run to go on with" in missing.stderr
    taken = shardwise(*asked(whole, mesh=ON_TWO))
    assert taken.returncode == 2
    assert "holds a run already" in taken.stderr


def test_a_run_without_a_whole_checkpoint_is_not_begun_again_over_its_steps(
    undisturbed: Run, tmp_path: Path
) -> None:
    out = tmp_path / "damaged"
    shutil.copytree(undisturbed(ON_TWO), out)
    (out / "checkpoints" / "step-50" / "manifest.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-60")
    before = files_of(out)
    ended = shardwise(*asked(out, "--resume", mesh=ON_TWO, steps=30))
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        f"shardwise: --resume: {out.resolve() / 'checkpoints'} has no whole checkpoint (step-50: has no "
        "manifest.json: nothing that Shardwise published), and steps.jsonl beside it has lines to step 60, "
        "which a run from step 1 on would overwrite. Put a checkpoint back, or begin a new run with another "
        "--out and without --resume. No file was changed."
    )
    assert files_of(out) == before


@pytest.mark.full
def test_a_run_that_recorded_nothing_begins_and_says_so(undisturbed: Run, tmp_path: Path) -> None:
    out = tmp_path / "nothing"
    out.mkdir()
    shutil.copy(undisturbed(ON_TWO) / "settings.json", out)
    ended = shardwise(*asked(out, "--resume", mesh=ON_TWO, steps=4))
    assert ended.returncode == 0, ended.stderr
    assert f"{out.resolve() / 'checkpoints'} has no whole checkpoint: begins at step 1" in ended.stdout
    assert [each.step for each in read_steps(out)] == [1, 2, 3, 4]


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_plan_whose_gradients_are_wrong_is_not_trained(tmp_path: Path) -> None:
    plan = tmp_path / "wrong.toml"
    right = shardwise("plans", "rowwise").stdout
    norm = '"layers.*.attention_norm" = "sequence_parallel"'
    assert norm in right
    plan.write_text(right.replace(norm, norm.replace("sequence_parallel", "replicate")))
    proving = tuple(each for each in TINY if each != "--no-verify")
    ended = shardwise("train", str(plan), *proving, "--mesh", "tp=2", "--out", str(tmp_path / "run"))
    assert ended.returncode == 1, ended.stderr
    assert "Nothing was trained" in ended.stdout
    assert "attention_norm.weight" in ended.stdout
    assert not (tmp_path / "run").exists()


def test_a_run_whose_reader_is_gone_trains_on_and_writes_all_of_it(tmp_path: Path) -> None:
    out = tmp_path / "unread"
    steps = ("--steps", "3", "--validate-every", "0")
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as nobody, redirect_stdout(nobody), redirect_stderr(nobody):
        assert _run(["train", *TINY, *steps, "--mesh", "tp=1", "--out", str(out)]) == 0
    assert [each.step for each in read_steps(out)] == [1, 2, 3]
    assert answer(out).ended is Ended.DONE
    assert (out / "train.html").is_file()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-3"]
