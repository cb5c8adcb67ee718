"""walk: a module of a model under a plan -> Walkthrough: how its style works, on small numbers, rank by
rank."""

from shardwise.core.case import Case
from shardwise.core.errors import OptionError
from shardwise.core.plan import Plan, suggest
from shardwise.core.walkthrough import Walkthrough
from shardwise.verbs.checks import default_plan


def walk(case: Case, what: str) -> Walkthrough:
    """what: a module of the case's model under its first plan, a subject's name (embedding/rowwise), or loss.
    Raises InputError for a module that isn't there, or has no walk-through."""
    from shardwise.walkthrough.record import record_walkthrough

    subject, module = _subject(case, what)
    return record_walkthrough(subject, module=module)


def _subject(case: Case, what: str) -> tuple[str, str | None]:
    """(walk-through, module) for a walk-through's name, or for a module of the model under the plan."""
    from shardwise.walkthrough.subject import subject_of, subjects

    names = ", ".join(subjects())
    if what in subjects():
        return what, None
    if what == "loss":
        return "loss/vocab_parallel", None
    import torch

    from shardwise.models.source import find_model
    from shardwise.parallel.kinds import kind_of
    from shardwise.parallel.plans import load_any_plan

    source = find_model(case.model)
    name = case.plans[0] if case.plans else default_plan(source)
    plan = load_any_plan(
        name,
        sequence_parallel=case.sequence_parallel,
        family=source.family,
        context_attention=case.context_attention,
    )
    modules = dict(source.build(dtype=torch.float32).named_modules())
    if what not in modules:
        hint = suggest(what[:80], modules)
        raise OptionError(
            f'--walk: {case.model} has no module "{what[:80]}".{hint} Or name one of {names}, loss.'
        )
    rule = plan.rule_for(what) if isinstance(plan, Plan) else None
    subject = None if rule is None else subject_of(kind_of(modules[what]), rule.style)
    if subject is None:
        style = "no style" if rule is None else rule.style.name
        shown = f"{type(modules[what]).__name__} under {style}"
        raise OptionError(f"--walk: {what}, a {shown}, has no walk-through. There are: {names}, loss.")
    return subject.name, what
