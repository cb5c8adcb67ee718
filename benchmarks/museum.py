"""Does verify find every public fault of the museum, name it, and pass what is mended?

    python -m benchmarks.museum                  all exhibits; writes benchmarks/results/DATE-museum.json
    python -m benchmarks.museum 7 10             these; prints, writes nothing
    python -m benchmarks.museum --judged FILE    with what museum/judge.py --json wrote, instead of running it

What is right and wrong, and what a loss curve shows, is for museum/judge.py to say, which shares nothing
with verify. A fault is named where a finding that doesn't only follow from others names the parameter or the
module that the exhibit says; its reason is right where that finding's cause is the one in CAUSES.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from benchmarks.museum_ranks import held
from benchmarks.museum_results import Row, Run, Shown, summary
from benchmarks.results import now
from museum import judge
from museum.judge import Exhibit, Judgement
from shardwise.core.case import StepSettings
from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verification
from shardwise.report.verify import rows
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify

CAUSES = {
    "parts not summed": Cause.PARTS_NOT_SUMMED,
    "summed too often": Cause.SUMMED_TOO_OFTEN,
    "averaged": Cause.AVERAGED,
    "nothing arrives": Cause.NOTHING_ARRIVES,
    "cut as one": Cause.CUT_AS_ONE,
    "untied": Cause.UNTIED,
    "output of a module": Cause.FORWARD,
    "added on every rank": Cause.SUMMED_TOO_OFTEN,
    "statistics over a part": Cause.PART_FOR_WHOLE,
    "whole key heads": Cause.PARTS_MEET_WHOLES,
    "ranks drift": Cause.RANKS_DRIFT,
    "scaled again": Cause.AVERAGED,
    "dropped in part": Cause.NOTHING_ARRIVES,
}

KINDS = {
    "crashes": FindingKind.CRASHES,
    "norm of a part": FindingKind.WEIGHTS_DIFFER,
    "loss of a part": FindingKind.LOSS_DIFFERS,
    "labels of a part": FindingKind.LOSS_DIFFERS,
    "data of a part": FindingKind.RANKS_DISAGREE,
}


def claims_of(exhibit: Exhibit) -> tuple[Claim, Claim]:
    """That it trains the model, before and after."""
    return (
        Claim(f"{exhibit.module}:build", "own", f"{exhibit.number} before"),
        Claim(f"{exhibit.module}:after", "own", f"{exhibit.number} after"),
    )


def judgement(exhibit: Exhibit, before: Verification, after: Verification) -> Row:
    """What verify says, against what the exhibit says."""
    about = exhibit.about
    naming = [each for each in before.wrong if _is_own(each) and _names(each, about["wrong"])]
    return Row(
        number=exhibit.number,
        title=about["title"],
        sources=tuple(about["sources"]),
        symptom=about["symptom"],
        axis=about["axis"],
        kind=about["kind"],
        wrong=about["wrong"],
        reason=about["reason"],
        is_wrong=True,
        is_after_right=True,
        is_found=bool(before.wrong),
        is_named=bool(naming),
        is_reason_right=any(_is_reason(each, about["reason"]) for each in naming),
        said=_headline(before),
        said_of_after=_headline(after) if after.wrong else "",
        seconds=before.seconds,
    )


def _headline(found: Verification) -> str:
    return rows.headline(found) if found.wrong else found.note


def _is_own(finding: Finding) -> bool:
    """Whether it says more than that something else is wrong. The first module with another output does."""
    return finding.cause not in rows.PASSED_ON or finding.kind is FindingKind.OUTPUT_DIFFERS


def _names(finding: Finding, wrong: str) -> bool:
    """As its subject, or in what it says, itself or something inside it."""
    return bool(re.search(rf"(?<![\w.]){re.escape(wrong)}(?!\w)", f"{finding.subject}: {finding.reason}"))


def _is_reason(finding: Finding, reason: str) -> bool:
    """What people read tells more than a cause does: whose tokens a loss is divided by."""
    divides = finding.cause is Cause.AVERAGED and "of its own part" in finding.reason
    if reason == "loss of a part" and divides:
        return True
    return finding.kind is KINDS[reason] if reason in KINDS else finding.cause is CAUSES.get(reason)


def of_models(exhibits: Sequence[Exhibit]) -> list[Row]:
    """Proved on ranks, those on one mesh with one batch in one launch."""
    found = []
    for mesh, batch in sorted({(each.about["mesh"], each.batch) for each in exhibits}):
        own = [each for each in exhibits if (each.about["mesh"], each.batch) == (mesh, batch)]
        claims = [claim for exhibit in own for claim in claims_of(exhibit)]
        settings = StepSettings(batch=batch, seq=judge.SEQ)
        answers = verify(claims, mesh=Mesh.parse(mesh), settings=settings)
        pairs = zip(own, answers[::2], answers[1::2], strict=True)
        found += [judgement(exhibit, before, after) for exhibit, before, after in pairs]
    return found


def of_steps(exhibits: Sequence[Exhibit]) -> list[Row]:
    """Held against one process, on ranks."""
    found = held(exhibits)
    return [
        judgement(each, *(found[each.number, variant].verification for variant in ("before", "after")))
        for each in exhibits
    ]


def _told(row: Row, answers: Sequence[Judgement]) -> Row:
    """With what the plain script says."""
    before, after = (
        next((each for each in answers if (each.number, each.variant) == (row.number, variant)), None)
        for variant in ("before", "after")
    )
    curve = before.curve if before is not None else None
    shown = Shown(curve.largest, curve.lasting, curve.seeds, curve.is_noticed) if curve is not None else None
    return replace(
        row,
        is_wrong=before is not None and before.is_wrong,
        is_after_right=after is not None and not after.is_wrong,
        curve=shown,
    )


def _show(row: Row) -> None:
    marks = [] if row.is_found else ["NOT FOUND"]
    marks += [] if row.is_named else ["not named"]
    marks += [] if row.is_reason_right else ["reason"]
    marks += ["AFTER FLAGGED"] if row.said_of_after else []
    print(
        f"{row.number:3} {row.title}: {row.said[:150]}{' <-- ' if marks else ''}{', '.join(marks)}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.museum", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("numbers", nargs="*", type=int, help="these exhibits; nothing is written then")
    parser.add_argument("--judged", nargs="+", metavar="FILE", help="answers of museum/judge.py, as JSON")
    given = parser.parse_args()
    chosen = [each for each in judge.exhibits() if not given.numbers or each.number in given.numbers]
    started = now()
    if given.judged:
        texts = [Path(name).read_text(encoding="utf-8") for name in given.judged]
        answers = [judge.read(each) for text in texts for each in json.loads(text)]
    elif not given.numbers:
        answers = judge.judged([(each, "before") for each in chosen], curve=True)
        answers += judge.judged([(each, "after") for each in chosen])
    else:
        answers = judge.judged([(each, variant) for each in chosen for variant in ("before", "after")])
    found = of_models([each for each in chosen if not each.is_step])
    found += of_steps([each for each in chosen if each.is_step])
    found = sorted((_told(row, answers) for row in found), key=lambda row: row.number)
    for row in found:
        _show(row)
    versions = tuple((name, version(name)) for name in ("shardwise", "torch"))
    run = Run("python -m benchmarks.museum", started.isoformat(timespec="seconds"), versions, tuple(found))
    print(summary(run))
    if not given.numbers:
        print(f"wrote {run.write()}; now run python -m benchmarks.tables")
    return int(not all(row.is_wrong and row.is_after_right for row in found))


if __name__ == "__main__":
    sys.exit(main())
