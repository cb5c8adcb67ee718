"""Small programs, word for word: what a change does to them is read as a diff. `make golden` accepts it."""

import difflib

import pytest

from tests.golden.programs import HERE, PROGRAMS, Small


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.path.stem)
def test_a_small_program_is_the_one_on_file(program: Small) -> None:
    expected, found = program.path.read_text().splitlines(), program.text().splitlines()
    difference = list(difflib.unified_diff(expected, found, program.path.name, "now", lineterm="", n=1))
    assert not difference, "\n".join(
        [*difference[:60], "If this is what you want: make golden, and read its diff."]
    )


def test_no_text_is_left_over() -> None:
    assert set(HERE.glob("*.txt")) == {program.path for program in PROGRAMS}
