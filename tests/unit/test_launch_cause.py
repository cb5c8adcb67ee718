"""Which of several bad ends is the cause of the others, and how a silent run is told."""

import signal

from shardwise.core.errors import PlanError, RunError
from shardwise.launch.cause import BadEnd, Failure, Silence, error_for, first_cause, stall_error

LOST = BadEnd(
    0,
    1.0,
    failure=Failure(("RuntimeError", "Exception"), "[pair.cc:538] Connection closed by peer [127.0.0.1]"),
    exit_code=None,
)
OWN = BadEnd(1, 2.0, failure=Failure(("ValueError", "Exception"), "no"), exit_code=None)
LATER = BadEnd(4, 5.0, failure=Failure(("ValueError", "Exception"), "no"), exit_code=None)
ABORTED = BadEnd(2, 3.0, failure=None, exit_code=-signal.SIGABRT)
KILLED = BadEnd(3, 4.0, failure=None, exit_code=-signal.SIGKILL)


def test_the_most_telling_end_is_the_cause_even_if_it_was_seen_last() -> None:
    assert first_cause([LOST, OWN, ABORTED, KILLED]) is KILLED
    assert first_cause([LOST, ABORTED, OWN]) is OWN
    assert first_cause([LOST, ABORTED]) is ABORTED
    assert first_cause([LOST]) is LOST


def test_of_two_equal_ends_the_earlier_one_is_the_cause() -> None:
    assert first_cause([LATER, OWN]) is OWN


def test_an_error_of_ours_comes_back_as_the_nearest_class_that_the_parent_knows() -> None:
    class OddPlanError(PlanError):
        pass

    failure = Failure.of(OddPlanError("plan: odd."))
    error = error_for(
        BadEnd(0, 0.0, failure=failure, exit_code=None), world_size=2, note="loading", log="a.log"
    )
    assert type(error) is PlanError
    assert str(error) == "plan: odd."


def test_a_lone_rank_has_no_others_and_unknown_parts_are_left_out() -> None:
    error = error_for(
        BadEnd(0, 0.0, failure=None, exit_code=-signal.SIGKILL), world_size=1, note=None, log=None
    )
    assert type(error) is RunError
    assert (
        str(error)
        == "rank 0 was killed by SIGKILL (signal 9). If memory ran out, use a smaller --batch or --seq."
    )
    nameless = BadEnd(0, 0.0, failure=Failure(("KeyError", "Exception"), "\n"), exit_code=None)
    assert (
        str(error_for(nameless, world_size=1, note="a\nb", log=None)) == 'rank 0 failed: KeyError during "a".'
    )


def test_silent_ranks_in_the_same_state_share_a_mention() -> None:
    waiting = Silence(is_ready=True, is_done=False, stopped_by=None, note="step 3")
    ranks = {
        0: waiting,
        1: Silence(is_ready=True, is_done=False, stopped_by=signal.SIGSTOP, note="step 2"),
        2: waiting,
        3: Silence(is_ready=False, is_done=False, stopped_by=None, note=None),
        4: Silence(is_ready=True, is_done=True, stopped_by=None, note="step 4"),
        5: Silence(is_ready=True, is_done=False, stopped_by=None, note=None),
    }
    assert str(stall_error(ranks, silent_s=90.0)) == (
        'nothing was heard from any rank for 90 s, so they were stopped (ranks 0, 2: last at "step 3"; '
        'rank 1: stopped by SIGSTOP, last at "step 2"; '
        "rank 3: hasn't joined the others; rank 4: done; rank 5: no note yet). "
        "If the work needs longer, raise the timeout."
    )
