"""What a search recommends, written for a framework by the export verb."""

from dataclasses import replace

from shardwise.core.case import Case
from shardwise.core.errors import InputError
from shardwise.core.search import Found, Search
from shardwise.search.solve import BY_HAND
from shardwise.verbs.progress import Progress
from shardwise.verbs.search.options import SearchOptions
from shardwise.verbs.search.proof import PROOF_STOPPED


def exported(search: Search, case: Case, options: SearchOptions, progress: Progress) -> Search:
    """With files for the framework of each plan that is recommended, or why there are none. case: as it was
    asked, for how its machine was named."""
    count = options.recommended
    made = [_exported(search, index, case, options, progress) for index in range(len(search.found[:count]))]
    fewer = f"--top {count}: {len(made)} of the space could be given out, so no more is written"
    notes = (*search.notes, fewer) if 0 < len(made) < count else search.notes
    return replace(search, found=(*made, *search.found[count:]), notes=notes)


def _exported(search: Search, index: int, case: Case, options: SearchOptions, progress: Progress) -> Found:
    found = search.found[index]
    why = _why_not(search, index, options)
    if why is not None:
        return replace(found, why_not_exported=why)
    from shardwise.core.plan import Plan, TheirPlan
    from shardwise.verbs.export import ExportOptions, export

    plan = Plan.from_toml(found.plan) if found.plan is not None else TheirPlan.UNSHARDED
    assert options.export is not None
    try:
        asked = search.case(index, case.machine or "")
        made = export(asked, ExportOptions(options.export), progress, plan=plan)
    except InputError as error:
        return replace(found, why_not_exported=str(error))
    return replace(found, export=made)


def _why_not(search: Search, index: int, options: SearchOptions) -> str | None:
    """A plan that is wrong isn't written, nor a runner-up that could not be verified."""
    found = search.found[index]
    if search.stopped == BY_HAND:
        return "the search was stopped"
    if found.is_wrong:
        return "it trains the model wrong, so it isn't written"
    if found.why_unproved == PROOF_STOPPED:
        return PROOF_STOPPED
    if index and options.verify and found.proof is None:
        return f"it could not be verified: {found.why_unproved}"
    return None
