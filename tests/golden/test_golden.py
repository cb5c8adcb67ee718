"""Small programs, word for word: what a change does to them is read as a diff. `make golden` accepts it."""

import difflib

import pytest

from tests.golden.programs import DEVICES, HERE, PLANS, path_of, text_of


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", PLANS)
def test_a_small_program_is_the_one_on_file(plan: str, device: str) -> None:
    path = path_of(plan, device)
    expected, found = path.read_text().splitlines(), text_of(plan, device).splitlines()
    difference = list(difflib.unified_diff(expected, found, path.name, "now", lineterm="", n=1))
    assert not difference, "\n".join([*difference[:60], "If this is what you want: make golden, and read its diff."])


def test_no_text_is_left_over() -> None:
    assert set(HERE.glob("*.txt")) == {path_of(plan, device) for plan in PLANS for device in DEVICES}
