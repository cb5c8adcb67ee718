"""A folder that --out can't be is refused before the work, whatever the verb."""

from pathlib import Path

import pytest

from shardwise.cli.main import _run, verbs
from shardwise.core.errors import OptionError
from shardwise.files.run_folder import check_free

RUNS = [name for name, what in verbs().items() if what.out and name not in ("tokens", "launcher", "export")]
NOTHING = {
    "diff": ("diff", "there-is-none"),
    "export": ("export", "rowwise", "--as", "toml", "--model", "there-is-none"),
}
"""What ends at once where it is begun at all."""


def said(capsys: pytest.CaptureFixture[str], verb: str, out: Path) -> str:
    words = NOTHING.get(verb, (verb, "--model", "there-is-none"))
    assert _run([*words, "--out", str(out)]) == 2
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("verb", RUNS)
def test_a_folder_that_holds_a_run_is_refused_before_the_work(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text("{}")
    told = f"shardwise: --out {tmp_path}: holds a run already. Choose another folder, or remove it."
    assert said(capsys, verb, tmp_path) == told


@pytest.mark.parametrize("verb", [*RUNS, "export"])
def test_a_plain_file_is_refused_before_the_work(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    told = f"shardwise: --out {file}: {file} is no folder. Choose a folder that can be written."
    assert said(capsys, verb, file) == told


def test_nor_is_a_folder_under_a_plain_file_or_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for out in (tmp_path / "file" / "new", tmp_path / "link"):
        with pytest.raises(OptionError, match="is no folder"):
            check_free(out)
    check_free(tmp_path / "new" / "newer")
