"""The case of torchtitan's issue 785, `--config llama3_8b_tp8`, in every verb: it runs, or one line says what
this machine lacks. Options beside it make it small where a whole answer would take long."""

from pathlib import Path

import psutil
import pytest

from tests.e2e.command import Ended, shardwise
from tests.matrix import FULL

CASE = ("--config", "llama3_8b_tp8")
SMALL = ("--seq", "64", "--random-ids")


def asked(verb: str, *args: str, cwd: Path) -> Ended:
    ended = shardwise(verb, *args, *CASE, cwd=cwd)
    assert "Traceback" not in ended.stderr
    return ended


@pytest.mark.parametrize(
    ("verb", "args", "told"),
    [
        ("explain", (*SMALL, "--json"), '"plan": "rowwise@dtensor"'),
        ("predict", (*SMALL, "colwise@dtensor"), "colwise@dtensor"),
        ("predict", (*SMALL, "--look-up", "rowwise", "colwise"), "Fastest for 256 tokens: tp 8: "),
        ("plan", ("--toml",), '"tok_embeddings" = '),
        ("export", ("--as", "pytorch", "rowwise@dtensor"), "torch.randint(vocabulary, (4, 8192)"),
        ("verify", ("--static", "rowwise"), "llama3-8b"),
        ("launcher", ("--for", "torchrun"), "--config llama3_8b_tp8"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_needs_no_gpu_runs_here(verb: str, args: tuple[str, ...], told: str, tmp_path: Path) -> None:
    ended = asked(verb, *args, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert told in ended.stdout


def test_diff_predicts_the_case_beside_a_step(tmp_path: Path) -> None:
    """The step is a prediction's own, for want of eight GPUs: so both sides take equally long."""
    small = (*SMALL, "--model", "llama3-8b?n_layers=1")
    asked("predict", *small, "rowwise@dtensor", "--out", "run", cwd=tmp_path)
    ended = asked("diff", "run", "--predict", *small, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "rowwise@dtensor: a step was predicted at" in ended.stdout


@pytest.mark.parametrize("verb", ["compare", "train"])
def test_what_needs_the_gpus_says_before_step_1_how_much_memory_it_takes(verb: str, tmp_path: Path) -> None:
    if psutil.virtual_memory().available > 900 * 2**30:
        pytest.skip("this machine can hold it")
    ended = asked(verb, cwd=tmp_path)
    assert ended.returncode == 2
    (line,) = (line for line in ended.stderr.splitlines() if "reading text" not in line)
    assert line.startswith(
        'shardwise: llama3-8b under "rowwise@dtensor" on tp=8 needs at least 16.7 GiB per rank '
        "(parameters, gradients and AdamW state in float32; activations come on top)"
    )
    assert line.endswith("Use a smaller model, fewer plans, or a machine that holds it.")
    assert not list(tmp_path.iterdir())


@FULL  # search as such: test_search.py
def test_a_search_takes_the_case_s_step(tmp_path: Path) -> None:
    model = "llama3-debug?n_layers=2"
    small = ("--model", model, "--devices", "2", "--seq", "64", "--no-verify")
    fixed = ("tp=2", "recompute=full", "tok_embeddings=colwise", "sequence=cut", "output=cut")
    layers = ("layers.*.attention=cut", "layers.*.feed_forward=cut")
    fixes = (word for each in (*fixed, *layers) for word in ("--fix", each))
    ended = asked("search", *small, *fixes, "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert '"batch": 4' in ended.stdout
    assert '"dtype": "float32"' in ended.stdout
