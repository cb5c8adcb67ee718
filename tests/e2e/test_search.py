"""`shardwise search` as a user types it, from the model to files for a framework."""

import ast
import json
import signal
import tomllib
from pathlib import Path

import pytest

from shardwise.core.search import Search
from shardwise.files.document import read_document
from tests.e2e.command import PATIENCE_S, gone, ranks_of, shardwise, start, wait_until
from tests.matrix import FULL

MODEL = "llama3-debug?n_layers=2,vocab_size=256"
SMALL = ("--model", MODEL, "--devices", "2", "--seq", "64", "--batch", "4", "--random-ids")
# one plan, and one more without the sequence cut
TWO = ("tp=2", "micro-batch=2", "recompute=none", "tok_embeddings=rowwise", "output=cut")
BLOCKS = ("layers.*.attention=cut", "layers.*.feed_forward=cut")
FIXED = tuple(word for each in (*TWO, *BLOCKS) for word in ("--fix", each))


def test_the_best_and_its_runner_up_are_verified_and_written_for_a_framework(tmp_path: Path) -> None:
    """And what the search wrote is a case that export takes, from its folder and from another."""
    asked = ("search", *SMALL, *FIXED, "--export", "pytorch", "--top", "2", "--out", "found")
    own = ("--compiled", "--overlap-tensor", "--without", "launch")
    ended = shardwise(*asked, *own, "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = read_document(ended.stdout.encode(), Search).found
    assert [each.proof is not None and each.proof.verdict.value for each in found] == ["right", "right"]
    for index, each in enumerate(found, 1):
        folder = tmp_path / "found" / f"export-{index}"
        (file,) = folder.iterdir()
        ast.parse(file.read_text())
        assert each.export is not None
        assert file.read_text().startswith(f"# Made by: shardwise export plan-{index}.toml --as pytorch ")
        assert (tmp_path / "found" / f"plan-{index}.toml").read_text() == each.plan
    config = ("--config", str(tmp_path / "found" / "case-1.toml"))
    ended = shardwise("predict", *config, "--json", cwd=tmp_path)
    (again,) = json.loads(ended.stdout)["predictions"]
    assert again["step_s"] == pytest.approx(found[0].step_s, rel=1e-12)
    for where, here in ((tmp_path, config), (tmp_path / "found", ("--config", "case-1.toml"))):
        ended = shardwise("export", *here, "--as", "toml", "--out", "mine", cwd=where)
        assert ended.returncode == 0, ended.stderr
        assert tomllib.loads((where / "mine" / "plan.toml").read_text())["rules"]
        assert tomllib.loads((where / "mine" / "case.toml").read_text())["model"] == MODEL


def test_an_export_without_a_folder_is_refused_before_anything_is_searched() -> None:
    ended = shardwise("search", *SMALL, "--export", "hf")
    assert ended.returncode == 2
    assert ended.stderr.strip().endswith("--export hf: needs a folder for its files. Add --out FOLDER.")


@FULL
def test_ctrl_c_during_the_proof_gives_the_plan_and_says_that_it_was_not_verified(tmp_path: Path) -> None:
    running = start("search", *SMALL, *FIXED, "--top", "1", cwd=tmp_path)
    wait_until(lambda: running.poll() is not None or len(ranks_of(running)) == 2)
    ranks = ranks_of(running)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=PATIENCE_S)
    assert (running.returncode, len(ranks)) == (0, 2), stderr
    assert gone(ranks)
    assert "Best in this space" in stdout
    assert "NOT VERIFIED: its proof was stopped by Ctrl-C" in " ".join(stdout.split())
