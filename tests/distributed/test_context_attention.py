"""Attention over a sequence that ranks share equals one process's, forward and every gradient, whichever way
keys and values come; and sends what the formulas say."""

from functools import cache

import msgspec
import pytest

from shardwise.launch import run_ranks
from tests.distributed.context_attention_workers import WAYS, Answer, Sent, cases
from tests.matrix import thinned

TOLERANCE = 1e-12


@cache
def answers(ranks: int) -> list[Answer]:
    worker = "tests.distributed.context_attention_workers:run"
    found = run_ranks(worker, b"", world_size=ranks, device_type="cpu", timeout_s=120)
    return [msgspec.json.decode(each, type=Answer) for each in found]


@pytest.mark.parametrize("ranks", thinned((2, 3, 4), lambda ranks: ranks == 3))
def test_a_shared_sequence_attends_as_on_one_process(ranks: int) -> None:
    names = {f"{name} by {way}" for name, *_ in cases() for way in WAYS}
    for answer in answers(ranks):
        assert set(answer.errors) == names
        assert {name: error for name, error in answer.errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("ranks", thinned((2, 3, 4), lambda ranks: ranks == 3))
def test_each_way_sends_what_its_formula_says(ranks: int) -> None:
    """n ranks, keys and values of `full` bytes: a gather sends (n-1)/n of them forward; again, and as much of
    gradients, backward. A ring sends a rank's n - 1 times, and so do keys and gradients of its backward."""
    for answer in answers(ranks):
        share = answer.payload_bytes * (ranks - 1) / ranks
        assert answer.sent["gather"] == [
            Sent("all_gather", "backward", 1, share),
            Sent("all_gather", "forward", 1, share),
            Sent("all_to_all", "backward", 1, share),  # a reduce-scatter on gloo
        ]
        assert answer.sent["ring"] == [
            Sent("recv", "backward", 2 * (ranks - 1), 0.0),
            Sent("recv", "forward", ranks - 1, 0.0),
            Sent("send", "backward", 2 * (ranks - 1), 2 * share),
            Sent("send", "forward", ranks - 1, share),
        ]
