"""A path in a case file is one from its folder: what a command wrote there is found from any folder."""

import json
import tomllib
from pathlib import Path

import pytest

from shardwise.cli.main import _run
from shardwise.core.case import SHARED, Case
from shardwise.core.errors import ModelError
from shardwise.core.named_path import case_for_file, for_file, from_file, split
from shardwise.models.source import find_model
from shardwise.predict.machines import machine_text

SMALL = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
ASKED = {asked.key: asked for asked in SHARED}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a configuration and a machine file."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "machine.toml").write_text(machine_text("h100-sxm-80gb"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("model", "hf:qwen3?num_hidden_layers=2", None),
        ("model", "llama3-debug", None),
        ("model", "hf:mine/a?b=2", ("hf:", "mine/a", "?b=2")),
        ("model", "hf:config.json", ("hf:", "config.json", "")),
        ("plans", "rowwise", None),
        ("plans", "mine.toml", ("", "mine.toml", "")),
        ("machine", "h100-sxm-80gb", None),
        ("text", "notes", ("", "notes", "")),
        ("dtype", "a/b.toml", None),
    ],
)
def test_what_is_known_by_a_name_is_no_path(key: str, value: str, parts: object) -> None:
    assert split(ASKED[key], value) == parts


def test_a_path_goes_to_a_file_and_comes_back(here: Path) -> None:
    case = Case.of(model="hf:./mine?num_hidden_layers=1", mesh="tp=2", plans=["rowwise", "gone.toml"])
    there = case_for_file(case, Path("out/deep"))
    assert (there.model, there.plans) == ("hf:../../mine?num_hidden_layers=1", case.plans)
    assert for_file(ASKED["machine"], "machine.toml", Path("out")) == "../machine.toml"
    assert for_file(ASKED["machine"], str(here / "machine.toml"), Path("out")) == str(here / "machine.toml")
    assert for_file(ASKED["model"], "hf:./mine", Path()) == "hf:./mine"
    (here / "out").mkdir()
    assert from_file(ASKED["machine"], "../machine.toml", Path("out")) == "out/../machine.toml"
    assert from_file(ASKED["machine"], "machine.toml", Path("out")) == "machine.toml"  # as old files mean it


PREDICT = ("--model", "hf:./mine", "--machine", "machine.toml", "--seq", "16")


def predicted(capsys: pytest.CaptureFixture[str], *words: str) -> list[float]:
    """The steps' seconds."""
    assert _run(["predict", *words, "--json"]) == 0
    return [each["step_s"] for each in json.loads(capsys.readouterr().out)["predictions"]]


def test_a_case_that_predict_wrote_gives_the_same_numbers_from_its_folder(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = predicted(capsys, *PREDICT, "--mesh", "tp=2", "--out", "out")
    case = tomllib.loads((here / "out" / "case.toml").read_text())
    assert (case["model"], case["machine"]) == ("hf:../mine", "../machine.toml")
    for folder, config in ((here / "out", "case.toml"), (here / "mine", "../out/case.toml")):
        monkeypatch.chdir(folder)
        assert predicted(capsys, "--config", config) == first


def test_what_export_wrote_as_toml_is_taken_in_its_folder(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("export", "unsharded", *PREDICT, "--mesh", "fsdp=2", "--as", "toml", "--out", "out", "--json")
    assert _run([*asked]) == 0
    case = tomllib.loads((here / "out" / "case.toml").read_text())
    assert (case["model"], case["machine"]) == ("hf:../mine", "../machine.toml")
    monkeypatch.chdir(here / "out")
    capsys.readouterr()
    assert predicted(capsys, "--config", "case.toml")


@pytest.mark.full
def test_what_search_wrote_is_taken_in_its_folder(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word for each in ("tp=2", "micro-batch=1", "recompute=none") for word in ("--fix", each)]
    asked = (*PREDICT, "--devices", "2", "--batch", "2", "--random-ids", "--top", "1", "--no-verify")
    assert _run(["search", *asked, *words, "--out", "out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    page = (here / "out" / "search.md").read_text()
    assert "shardwise verify plan-1.toml --model hf:../mine --mesh tp=2" in page
    monkeypatch.chdir(here / "out")
    (again,) = predicted(capsys, "--config", "case-1.toml")
    assert again == pytest.approx(found["found"][0]["step_s"], rel=1e-12)


def test_a_folder_without_a_slash_is_told_how_to_be_named(here: Path) -> None:
    with pytest.raises(
        ModelError, match=r"isn't known in .*\. For the folder of that name write hf:\./mine\."
    ):
        find_model("hf:mine")
