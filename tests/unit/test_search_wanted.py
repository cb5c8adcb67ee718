"""What is asked of a search by --fix and --forbid: what can't be is refused in one line that names it."""

import re

import pytest

from shardwise.core.errors import OptionError
from shardwise.verbs.search.space import Wanted


@pytest.mark.parametrize(
    ("fixes", "devices", "said"),
    [
        (("tp=8", "fsdp=8"), 8, "--fix fsdp=8 and --fix tp=8 make 64 ranks, and 8 devices"),
        (("tp=4,8", "pp=4"), 8, "--fix pp=4 and --fix tp=4,8 make 16 ranks"),
        (("tp=4", "pp=3"), 16, "--fix pp=3 and --fix tp=4 make 12 ranks, and 16 devices"),
    ],
)
def test_degrees_that_together_are_no_part_of_the_devices_are_named(
    fixes: tuple[str, ...], devices: int, said: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        Wanted.of(fixes, ()).check_ranks(devices)


def test_degrees_that_go_together_pass() -> None:
    for fixes in ((), ("tp=2,8", "pp=2"), ("tp=8",), ("recompute=full", "tp=2", "fsdp=4")):
        Wanted.of(fixes, ()).check_ranks(8)


@pytest.mark.parametrize(
    ("fixes", "forbids", "said"),
    [
        (("tp=8", "tp=4"), (), "--fix tp=8 and --fix tp=4 contradict each other. Leave one out."),
        (("tp=8",), ("tp=8",), "--fix tp=8 and --forbid tp=8 contradict each other. Leave one out."),
        (("tp",), (), '--fix is "tp". Write DECISION=VALUE'),
    ],
)
def test_what_contradicts_itself_or_can_t_be_read_is_one_line(
    fixes: tuple[str, ...], forbids: tuple[str, ...], said: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        Wanted.of(fixes, forbids)
