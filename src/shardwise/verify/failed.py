"""Whose failure is told of a claim that not all ranks came through: a rank's own error stands before those of
ranks that lost it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardwise.core.finding import Finding, FindingKind
from shardwise.core.verification import Verdict, Verification
from shardwise.launch.cause import is_of_lost_connection


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank's failure in a claim; note is empty where it had none. ran_unsharded: whether it came through
    the unsharded run."""

    note: str = ""
    ran_unsharded: bool = True

    @classmethod
    def of(cls, answer: Verification) -> "Failed":
        is_skipped = answer.verdict is Verdict.SKIPPED
        has_failed = is_skipped or answer.verdict is Verdict.CRASHES
        return cls(answer.note, not is_skipped) if has_failed else cls()


def of_failed_ranks(answer: Verification, ranks: Mapping[int, Failed], world_size: int) -> Verification:
    """`answer` of one rank; what others failed with stands in its place, with their rank, where that tells
    more. ranks: of those that came to an end."""
    failed = {rank: each for rank, each in ranks.items() if each.note}
    own = {rank: each for rank, each in failed.items() if not is_of_lost_connection(each.note)}
    if not failed or len(own) == world_size:
        return answer
    rank, first = next(iter((own or failed).items()))
    told = f"on rank {rank}: {first.note}"
    known = Failed.of(answer)
    subject = answer.findings[0].subject if known == first and known.ran_unsharded else "model"
    rest = tuple(each for each in answer.findings if each.kind is not FindingKind.CRASHES)
    crash = Finding(FindingKind.CRASHES, subject, told)
    return replace(answer, findings=(crash, *rest), note=told, ran_unsharded=first.ran_unsharded)
