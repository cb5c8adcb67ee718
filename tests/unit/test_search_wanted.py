"""What is asked of a search: by --fix and --forbid (what can't be is refused in one line that names it), of
what is given out, and what of it reaches the solver."""

import re
from collections import Counter

import pytest

from shardwise.core.case import Case
from shardwise.core.errors import OptionError
from shardwise.core.mesh import NAMES, Mesh
from shardwise.core.plan import ContextAttention
from shardwise.core.prediction import Setup
from shardwise.core.search import Candidate, Group
from shardwise.predict.machines import load_machine
from shardwise.verbs.search import SearchOptions
from shardwise.verbs.search.looking import problem_of
from shardwise.verbs.search.space import Choices, Wanted, candidates, within_node
from tests.unit.search_example import SPACE


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


@pytest.mark.parametrize("way", ContextAttention)
def test_the_bounds_of_context_ranks_wait_for_keys_only_where_these_are_gathered(
    way: ContextAttention,
) -> None:
    case = Case.of(model="llama3-8b", mesh="tp=1", context_attention=str(way))
    candidate = Candidate(Mesh.parse("cp=8").axes, (), 1, 4)
    machine = load_machine("h100-sxm-80gb")
    problem = problem_of(case, machine, Setup(), SPACE, [candidate], {1: ()}, 32)
    assert problem.gathers_keys is (way is ContextAttention.GATHER)
    assert problem.candidates == (candidate,)


def test_only_what_is_exported_is_verified_beside_the_best() -> None:
    asked = {(None, None): (5, 1), (3, None): (3, 1), (None, "hf"): (5, 1), (3, "hf"): (3, 3)}
    for (top, form), (given_out, recommended) in asked.items():
        options = SearchOptions(top=top, export=form)
        assert (options.given_out, options.recommended) == (given_out, recommended)


def test_an_unknown_format_of_exports_is_one_line() -> None:
    with pytest.raises(OptionError, match=r'--export is "torchtitn"\. Did you mean "torchtitan"'):
        SearchOptions(export="torchtitn")


def test_a_tp_that_would_lie_on_two_nodes_is_no_candidate_and_says_why() -> None:
    assert within_node((1, 2, 3, 6), 6, 8) == (1, 2, 3, 6)
    assert within_node((1, 2, 5, 10), 10, 8) == (1, 2)
    said = "tp=5 on 10 devices: tp doesn't divide the 8 devices of a node: a group would lie on two."
    with pytest.raises(OptionError, match=re.escape(said)):
        within_node((5,), 10, 8)
    degrees = {axis: (1, 2, 5, 10) if axis in ("dp", "tp") else (1,) for axis in NAMES}
    choices = Choices(10, 8, degrees, (1,), (1,), (True,), 10, 4, False)
    refused: Counter[str] = Counter()
    cut = {tp: (Group("a", ("a",), ("cut",)),) for tp in (1, 2)}
    found = list(candidates(choices, cut, refused))
    assert {each.mesh.tp for each in found} == {1, 2}
    assert refused == {
        "tp doesn't divide the 8 devices of a node: a group would lie on two": 1,
        "tp is more than the 8 devices of a node": 1,
    }
