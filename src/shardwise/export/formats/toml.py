"""toml: the plan's file and a case file, which every verb of Shardwise takes."""

import tomllib

from shardwise.core.case import SHARED
from shardwise.core.export import File
from shardwise.core.plan import TheirPlan
from shardwise.export.code import comment
from shardwise.export.heads import MARK
from shardwise.export.job import Job, Written
from shardwise.files.case import case_text

ABOUT = "the plan and the case as files, which every verb takes"
PLAN, CASE = "plan.toml", "case.toml"


def write(job: Job) -> Written:
    """Says all of any plan of ours."""
    from dataclasses import replace

    plan = job.plan
    case = replace(job.case, plans=(PLAN,) if plan is not None else (str(TheirPlan.UNSHARDED),))
    given = {asked.key for asked in SHARED if _is_said(job, asked.key)}
    first = f"# {MARK}{comment(job.command)}\n"
    files = [File(CASE, first + case_text(case, given, {}))]
    if plan is not None:
        made = first + plan.to_toml()
        assert tomllib.loads(made)
        files.insert(0, File(PLAN, made))
    return Written(tuple(files))


def _is_said(job: Job, key: str) -> bool:
    """Whether a key says something that isn't the default."""
    nouns = (job.case, job.case.step, job.case.text)
    for asked in SHARED:
        if asked.key == key:
            value = next(getattr(noun, asked.field) for noun in nouns if hasattr(noun, asked.field))
            return key in ("plans", "model", "mesh") or (value != asked.default and value not in (None, ()))
    return False
