"""Finding: one reason why a plan is not right, with the numbers that show it."""

from dataclasses import dataclass
from enum import StrEnum

from shardwise.core.rule import RuleRef


class FindingKind(StrEnum):
    LOSS_DIFFERS = "loss_differs"
    GRADIENT_DIFFERS = "gradient_differs"
    GRADIENT_MISSING = "gradient_missing"
    RANKS_DISAGREE = "ranks_disagree"
    GRADIENT_NOT_AS_PARAMETER = "gradient_not_as_parameter"
    PARTIAL_GRADIENT = "partial_gradient"
    RULE_MATCHES_NOTHING = "rule_matches_nothing"
    LITTLE_IS_SHARDED = "little_is_sharded"
    COPIES_FOR_COLLECTIVES = "copies_for_collectives"
    COLLECTIVES_REPEAT = "collectives_repeat"
    COLLECTIVES_CANCEL = "collectives_cancel"
    SUMMED_APART = "summed_apart"
    GATHERED_FOR_NOTHING = "gathered_for_nothing"
    OPS_UNKNOWN = "ops_unknown"
    COLLECTIVES_UNKNOWN = "collectives_unknown"
    CRASHES = "crashes"
    TIMED_OUT = "timed_out"
    OUTPUT_DIFFERS = "output_differs"
    WEIGHTS_DIFFER = "weights_differ"
    RULE_IS_SHADOWED = "rule_is_shadowed"
    HEADS_NOT_DIVISIBLE = "heads_not_divisible"
    DROPOUT_MAY_DIFFER = "dropout_may_differ"
    CLIPPING_RAISES = "clipping_raises"
    UNTIED = "untied"
    SUSPECTED = "suspected"
    SIZES_NOT_DIVISIBLE = "sizes_not_divisible"


class Cause(StrEnum):
    """Why a sharded model's gradient, output or weight isn't the unsharded one's, as far as the numbers
    tell."""

    PARTS_NOT_SUMMED = "parts_not_summed"  # each rank has a part of it, and nobody sums them
    SUMMED_TOO_OFTEN = "summed_too_often"  # wholes were summed: it is a multiple
    AVERAGED = "averaged"  # it is a fraction: parts were averaged, or wholes divided
    WRONG_SHARD = "wrong_shard"  # a rank has what belongs to another one
    CUT_AS_ONE = "cut_as_one"  # several weights in one tensor, cut as if they were one
    NOTHING_ARRIVES = "nothing_arrives"  # no gradient, or zero
    NOT_GATHERED = "not_gathered"  # a part where the whole is expected
    PART_FOR_WHOLE = "part_for_whole"  # a module that needs all of its input has a part of it
    PARTS_MEET_WHOLES = "parts_meet_wholes"  # a rank's part of one thing is put together with all of another
    UNTIED = "untied"  # one parameter became several
    RANKS_DRIFT = "ranks_drift"  # replicated, and not equal on all ranks
    FORWARD = "forward"  # a module's output is wrong already
    FOLLOWS = "follows"  # right by itself: what comes down to it is wrong
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """`subject`: the parameter (or "loss", "ids") that is wrong. `reason`: one sentence for people.

    relative_error: ||sharded - unsharded|| / ||unsharded|| (None where the finding isn't about a size).
    ratio: least-squares factor between them, <s,u>/<u,u>: 2.0 or 1/tp tells its own story. advice: what to
    do, a sentence. cause: of a difference, where the numbers tell. rule: the plan's rule that holds for the
    subject. follows: the subject of the finding that explains this one; that one stands before it.
    """

    kind: FindingKind
    subject: str
    reason: str
    relative_error: float | None = None
    ratio: float | None = None
    advice: str | None = None
    cause: Cause | None = None
    rule: RuleRef | None = None
    follows: str | None = None
