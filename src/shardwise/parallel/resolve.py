"""Which rule holds for which module, and whether the model can carry the plan: every check that needs no
process group.

Runs on a meta model as well as on a real one, so that a command refuses a plan before it starts a rank. What
only one style wants its own file says: styles/.
"""

from collections.abc import Iterator, Mapping
from itertools import islice

from torch import nn

from shardwise.core.errors import PlanError
from shardwise.core.placement import Replicate
from shardwise.core.plan import Engine, Ownership, Plan, Rule, suggest_pattern
from shardwise.parallel.collectives import chunk_sizes
from shardwise.parallel.sharder import Assignment, Fit, Sharder, divisors
from shardwise.parallel.styles import SHARDABLE, STYLES, sharder_of, styles_of
from shardwise.torch_private import AnyDropout


def resolve(
    model: nn.Module, plan: Plan, *, tp: int, seq: int | None = None, fsdp: int = 1
) -> tuple[Assignment, ...]:
    """The rule of every module that has one, in the model's order. Raises PlanError for a plan that the model
    can't carry.

    seq: the length that will be used, where it is known; fsdp: the ranks on axes that shard parameters
    further.
    """
    fit = Fit({name: module for name, module in model.named_modules() if name}, tp, fsdp, seq)
    try:
        for rule in plan.rules:
            _check_matches(rule, fit.modules)
        assignments = tuple(_assignments(plan, fit))
        if plan.engine is Engine.NATIVE:
            _check_native(model, assignments, fit)
        _check_ties(model, assignments, plan.engine)
    except PlanError as error:
        raise PlanError(f'plan "{plan.name}": {error}') from None
    return assignments


def tied_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name of a parameter -> all names of the same one, where it has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}


def last_linear(model: nn.Module) -> nn.Module | None:
    """The head: the linear layer that the model registered last."""
    return next((module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear)), None)


def below_gather_input(name: str, plan: Plan) -> bool:
    """Whether an enclosing module makes the input whole."""
    parts = name.split(".")
    rules = (plan.rule_for(".".join(parts[:depth])) for depth in range(1, len(parts)))
    styles = (STYLES[rule.style.name] for rule in rules if rule is not None)
    return any(sharder.gathers_input for sharders in styles for sharder in sharders.values())


def _assignments(plan: Plan, fit: Fit) -> Iterator[Assignment]:
    """Each module with its rule, as soon as it is known to suit the module."""
    head = [module for module in fit.modules.values() if isinstance(module, nn.Linear)][-1:]
    for name, module in fit.modules.items():
        rule = plan.rule_for(name)
        if rule is None:
            continue
        sharder = _sharder(rule, name, module)
        assignment = Assignment(name, module, rule, sharder, below_gather_input(name, plan))
        _check_arguments(assignment)
        if fit.seq is not None and fit.seq % fit.tp and sharder.cuts_sequence(rule.style):
            raise PlanError(
                f"rule {rule} cuts the sequence, and {fit.seq} is no multiple of tp={fit.tp}. Use a sequence "
                f"that is a multiple of {fit.tp}, or a plan without sequence parallelism."
            )
        if plan.engine is Engine.DTENSOR and sharder.twin(assignment, keeps_dtensor=False) is None:
            raise PlanError(
                f'rule {rule}: PyTorch\'s own styles have no "{rule.style.name}". Use engine = "native".'
            )
        sharder.check(assignment, fit)
        if plan.engine is Engine.DTENSOR:
            _check_equal_parts(assignment, is_head=module in head, tp=fit.tp)
        yield assignment


def _check_matches(rule: Rule, modules: Mapping[str, nn.Module]) -> None:
    if any(rule.matches(name) for name in modules):
        return
    near = suggest_pattern(rule.pattern, modules)
    hint = f'; did you mean "{near}"?' if near else f". The model's modules: {_some(modules)}."
    raise PlanError(f"rule {rule} matched nothing{hint}")


def _sharder(rule: Rule, name: str, module: nn.Module) -> Sharder:
    sharder = sharder_of(rule.style.name, module)
    if sharder is not None:
        return sharder
    kind = type(module)
    matched = f"rule {rule} matched {name}, a {kind.__name__}"
    if nn.Module in STYLES[rule.style.name]:
        raise PlanError(f"{matched}. {rule.style.name} is for modules that hold others.")
    if kind in SHARDABLE:
        raise PlanError(f"{matched}. Its styles: {', '.join(styles_of(module))}.")
    raise PlanError(f"{matched}, which can't be sharded. Shardable: {_SHARDABLE_NAMES}.")


def _check_arguments(assignment: Assignment) -> None:
    given, sharder = assignment.style, assignment.sharder
    for what, value, allowed in (
        ("input", given.input, sharder.inputs),
        ("output", given.output, sharder.outputs),
    ):
        if value is None or value in allowed:
            continue
        shown = ", ".join(str(choice).lower() for choice in allowed) or "none"
        if "from" in given.name.arguments:
            raise PlanError(f"rule {assignment.rule}: from is {value}. Allowed: {shown}.")
        raise PlanError(
            f"rule {assignment.rule}: {what} is {str(value).lower()}. Allowed for "
            f"{type(assignment.module).__name__}: {shown}."
        )


def _check_equal_parts(assignment: Assignment, *, is_head: bool, tp: int) -> None:
    """PyTorch's own styles fail in mid forward where two layers meet in an uneven shard, and hang where one
    is empty."""
    rule, module, name = assignment.rule, assignment.module, assignment.name
    if not isinstance(module, nn.Linear | nn.Embedding):
        return
    dim, rows = assignment.sharder.cut_dim, module.weight.shape[0]
    if isinstance(module, nn.Linear) and not is_head:
        if dim is not None and module.weight.shape[dim] % tp:
            width = module.weight.shape[dim]
            raise PlanError(
                f"rule {rule} splits {width} of {name} over tp={tp}, and PyTorch's own styles need equal "
                f"parts. Use tp in {divisors(width)}."
            )
    elif 0 in chunk_sizes(rows, tp):
        raise PlanError(
            f"rule {rule} leaves a rank without rows of {name} ({rows} over tp={tp}). Use tp of at most "
            f"{rows}."
        )


def _check_native(model: nn.Module, assignments: tuple[Assignment, ...], fit: Fit) -> None:
    for assignment in assignments:
        if assignment.is_input_whole:
            assignment.sharder.check_below_gather_input(assignment)
    covered = {assignment.name for assignment in assignments}
    for name, module in {"the model itself": model, **fit.modules}.items():
        kind = type(module).__name__
        if isinstance(module, AnyDropout) and module.p > 0:
            raise PlanError(
                f"{name} is a {kind}({module.p}), whose masks would differ between the ranks. Set its p to 0."
            )
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if type(module) not in SHARDABLE:
            raise PlanError(
                f"{name}, a {kind}, holds parameters of its own, and the native engine knows what to do with "
                f"{_SHARDABLE_NAMES} only. Use PyTorch's own styles for it."
            )
        if name not in covered:
            choices = ", ".join(styles_of(module))
            raise PlanError(f'no rule covers {name}, a {kind}. Add one: "{name}" = one of {choices}.')


def _check_ties(model: nn.Module, assignments: tuple[Assignment, ...], engine: Engine) -> None:
    by_name = {assignment.name: assignment for assignment in assignments}
    for group in set(tied_parameters(model).values()):
        modules = (name.rpartition(".")[0] for name in group)
        owners = [by_name[name] for name in modules if name in by_name]
        if not owners:
            continue
        names = " and ".join(group)
        if engine is Engine.DTENSOR:
            raise PlanError(
                f'{names} are tied, and PyTorch\'s own styles would untie them. Use engine = "native".'
            )
        head = next((owner for owner in owners if type(owner.module) is nn.Linear), None)
        if (
            head is None
            or {type(owner.module) for owner in owners} != {nn.Embedding, nn.Linear}
            or len(owners) > 2
        ):
            raise PlanError(f"{names} are tied. Only an embedding tied to one linear head can be sharded.")
        _check_tied_head(head, any(owner.style.ownership is Ownership.INTERLEAVED for owner in owners))


def _check_tied_head(head: Assignment, is_interleaved: bool) -> None:
    """is_interleaved: the rows of the table that it shares."""
    where = f"rule {head.rule}: {head.name} is tied to"
    if not head.sharder.takes_tied_table:
        raise PlanError(f"{where} the embedding. Allowed for a tied head: {_TIED_HEADS}.")
    if is_interleaved and head.sharder.output_of(head.style) == Replicate():
        raise PlanError(
            f"{where} an interleaved table, so its whole logits would be out of order. "
            'Use output = "shard(-1)", or ownership = "contiguous".'
        )
    if is_interleaved and head.module.bias is not None:
        raise PlanError(
            f"{where} an interleaved table, and its bias is not dealt out like that. "
            'Use ownership = "contiguous".'
        )


_SHARDABLE_NAMES = ", ".join(kind.__name__ for kind in SHARDABLE)
_TIED_HEADS = ", ".join(
    style for style, sharders in STYLES.items() for sharder in sharders.values() if sharder.takes_tied_table
)


def _some(names: Mapping[str, nn.Module]) -> str:
    return ", ".join(islice(names, 6)) + (", ..." if len(names) > 6 else "")
