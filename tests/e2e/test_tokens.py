"""`shardwise tokens`, and what it wrote as the text of other verbs."""

import json
import os
from pathlib import Path

import pytest

from tests.e2e.command import Ended, shardwise

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} {TEXT}"}) + "\n" for n in range(9)))
    asked = ("--vocab-size", "300", "--shard-tokens", "2000", "--out", "t")
    ended = shardwise("tokens", "a.jsonl", *asked, cwd=tmp_path)
    assert ended.returncode == 0
    assert "of 9 documents." in ended.stdout
    assert "Read them in any verb: --text t" in ended.stdout
    assert ended.stderr.splitlines()[0] == "shardwise: training a tokenizer of 300 ids on a.jsonl"
    return tmp_path / "t"


def one_line(ended: Ended, code: int = 2) -> str:
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (code, "", 1)
    return ended.stderr.strip().removeprefix("shardwise: ")


def test_a_check_says_whether_a_folder_is_whole(folder: Path) -> None:
    whole = shardwise("tokens", "--check", "t", "--json", cwd=folder.parent)
    assert whole.returncode == 0
    document = json.loads(whole.stdout)
    assert (document["checked"], document["problems"], document["schema_version"]) == (True, [], 1)
    assert document["text"]["documents"] == 9
    shard = folder / "shard-00001.bin"
    shard.write_bytes(b"\0\0" + shard.read_bytes()[2:])
    broken = shardwise("tokens", "--check", "t", cwd=folder.parent)
    assert broken.returncode == 1
    assert "It isn't whole: don't train on it." in broken.stdout
    assert "shard-00001.bin: its digest is" in broken.stdout
    page = shardwise("tokens", "--check", "t", "--format", "html", cwd=folder.parent)
    assert "shard-00001.bin: its digest is" in page.stdout


def test_written_tokens_are_the_text_of_other_verbs(folder: Path) -> None:
    """routed decides by the ids which rows it sends."""
    model = "llama3-debug?n_layers=1,vocab_size=512"
    told = ("explain", "routed", "--model", model, "--mesh", "tp=2", "--seq", "64", "--batch", "2")
    asked = (*told, "--json", "--text")
    by_tokens = shardwise(*asked, "t", cwd=folder.parent)
    by_text = shardwise(*asked, "a.jsonl", "--tokenizer", "t/tokenizer.json", cwd=folder.parent)
    assert by_tokens.returncode == by_text.returncode == 0
    sent = [json.loads(each.stdout)["wire_bytes"] for each in (by_tokens, by_text)]
    assert sent[0] == sent[1] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("a.jsonl", "--out", "u"),
            "tokens takes one of --tokenizer FILE, the model's own, and --vocab-size N",
        ),
        (("a.jsonl", "--vocab-size", "300"), "--out is missing. Name the folder to write, or a folder"),
        (("a.jsonl", "--vocab-size", "300", "--out", "t"), "--out t: is there already, and nothing"),
        (("--check", "t", "--out", "u"), "--check writes nothing. Leave out --out."),
        (("a.jsonl", "--check", "t"), "--check reads a folder that is written. Leave out the files."),
        (("--check", "none"), '"none/shardwise-tokens.json" doesn\'t exist. Copy the folder again whole'),
        (("b.jsonl", "--tokenizer", "t/tokenizer.json", "--out", "u"), 'text file "b.jsonl" doesn\'t exist.'),
        (
            ("a.jsonl", "--text-key", "body", "--tokenizer", "t/tokenizer.json", "--out", "u"),
            "\"a.jsonl\", line 1: there is no 'body'; it has text. Name what holds the text with --text-key.",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(folder: Path, args: tuple[str, ...], message: str) -> None:
    before = sorted(os.listdir(folder.parent))
    ended = shardwise("tokens", *args, cwd=folder.parent)
    said = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert said.startswith(f"shardwise: {message}")
    assert sorted(os.listdir(folder.parent)) == before


def test_a_folder_for_another_model_or_damaged_is_one_line(folder: Path) -> None:
    model = "llama3-debug?n_layers=1,vocab_size=256"
    asked = ("explain", "routed", "--model", model, "--mesh", "tp=2", "--text", "t")
    said = one_line(shardwise(*asked, cwd=folder.parent))
    assert said.startswith("t has token ids up to 289, and the model has vocab_size=256 (ids 0 to 255).")
    os.truncate(folder / "shard-00000.bin", 7)
    said = one_line(shardwise(*asked, cwd=folder.parent))
    assert said.startswith('"t/shard-00000.bin" has 7 bytes, and the manifest says 4000.')
