"""toml: the plan's file and a case file, which every verb of Shardwise takes."""

import tomllib

from shardwise.core.export import File
from shardwise.core.named_path import case_for_file
from shardwise.core.plan import TheirPlan
from shardwise.export.code import comment
from shardwise.export.heads import MARK
from shardwise.export.job import Job, Written
from shardwise.files.case import case_text, said_by

ABOUT = "the plan and the case as files, which every verb takes"
PLAN, CASE = "plan.toml", "case.toml"


def write(job: Job) -> Written:
    """Says all of any plan of ours."""
    from dataclasses import replace

    plan = job.plan
    case = replace(
        case_for_file(job.case, job.folder),
        plans=(PLAN,) if plan is not None else (str(TheirPlan.UNSHARDED),),
    )
    first = f"# {MARK}{comment(job.command)}\n"
    files = [File(CASE, first + case_text(case, said_by(case), {}))]
    if plan is not None:
        made = first + plan.to_toml()
        assert tomllib.loads(made)
        files.insert(0, File(PLAN, made))
    return Written(tuple(files))
