"""Small programs, word for word: what a change does to them is read as a diff. `make golden` accepts it."""

import difflib
from pathlib import Path

import pytest

from tests.golden import programs
from tests.golden.programs import BASE, HERE, PROGRAMS, Small


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name.removesuffix(".txt"))
def test_a_small_program_is_the_one_on_file(program: Small) -> None:
    expected, now = program.path().read_text().splitlines(), program.text().splitlines()
    difference = list(difflib.unified_diff(expected, now, str(program.path()), "now", lineterm="", n=1))
    assert not difference, "\n".join(
        [*difference[:60], "If this is what you want: make golden, and read its diff."]
    )


def test_no_text_is_left_over() -> None:
    names = {program.name for program in PROGRAMS}
    assert {path.name for path in HERE.glob("*.txt")} == names
    for path in HERE.glob("*/*.txt"):  # a version's own
        assert path.name in names
        assert path.read_text() != (HERE / path.name).read_text()


def test_a_version_of_torch_has_a_text_of_its_own_only_where_it_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "HERE", tmp_path)
    program = PROGRAMS[0]
    assert program.accept("one", BASE) == program.path(BASE) == tmp_path / program.name
    assert program.accept("one", "9.9") is None
    assert program.path("9.9") == tmp_path / program.name
    assert program.accept("another", "9.9") == program.path("9.9") == tmp_path / "9.9" / program.name
    assert program.path(BASE).read_text() == "one"
    assert program.accept("one", "9.9") is None
    assert program.path("9.9") == tmp_path / program.name
