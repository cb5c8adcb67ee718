"""Which rule holds for which module, and whether the model can carry the plan: every check that needs no
process group.

Runs on a meta model as well as on a real one, so that a command refuses a plan before it starts a rank. What
only one style wants its own file says: styles/.
"""

from collections.abc import Iterator, Mapping

from torch import nn

from shardwise.core.batch_part import sequence_step
from shardwise.core.errors import ModelError, PlanError
from shardwise.core.placement import Partial, Replicate
from shardwise.core.plan import Engine, Plan, Rule, suggest_pattern
from shardwise.models.source import vocab_size_of
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.claims import check_held, check_none_forgotten, check_ties, claims
from shardwise.parallel.counts import check_counts
from shardwise.parallel.dropout import check_dropout
from shardwise.parallel.pairs import check_pairs
from shardwise.parallel.sharder import Assignment, Fit, Sharder, divisors
from shardwise.parallel.styles import STYLES, sharder_of, styles_of


def resolve(
    model: nn.Module,
    plan: Plan,
    *,
    tp: int,
    seq: int | None = None,
    fsdp: int = 1,
    experts: int = 1,
    context: int = 1,
) -> tuple[Assignment, ...]:
    """The rule of every module that has one, in the model's order. Raises PlanError for a plan that the model
    can't carry.

    seq: the length that will be used, where it is known; fsdp: the ranks on axes that shard parameters
    further; experts: those that share experts out; context: those that share each sequence.
    """
    fit = Fit(dict(model.named_modules()), tp, fsdp, seq, experts, context)
    try:
        for rule in plan.rules:
            _check_matches(rule, fit.modules)
        assignments = tuple(_assignments(model, plan, fit))
        held = claims(assignments)
        if plan.engine is Engine.NATIVE:
            for assignment in assignments:
                if assignment.is_input_whole:
                    assignment.sharder.check_below_gather_input(assignment)
            check_pairs(assignments, fit, head_of(model))
            check_none_forgotten(model, held, {each.name: each for each in assignments})
            check_dropout(model, held, head_of(model), tp)
        check_ties(tied_parameters(model), held, plan.engine)
    except PlanError as error:
        raise PlanError(f'plan "{plan.name}": {error}') from None
    return assignments


def tied_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name of a parameter -> all names of the same one, where it has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}


def head_of(model: nn.Module) -> nn.Module | None:
    """The head: what a Hugging Face model calls so. Else, of the modules that own a matrix and are no
    embedding, the last registered of those whose matrix is as wide as there are ids; of all if none is."""
    named: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    if named is not None:
        return named
    owners = [
        (module, matrices)
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and (matrices := _own_matrices(module))
    ]
    try:
        ids = vocab_size_of(model)
    except ModelError:
        ids = 0
    as_wide = [module for module, matrices in owners if any(ids in each.shape for each in matrices)]
    return next(reversed(as_wide or [module for module, _ in owners]), None)


def _own_matrices(module: nn.Module) -> list[nn.Parameter]:
    return [each for each in module.parameters(recurse=False) if each.dim() > 1]


def below_gather_input(name: str, plan: Plan) -> bool:
    """Whether the modules around one make what is whole have a part of its gradient on each rank."""
    parts = name.split(".")
    around = ["", *(".".join(parts[:depth]) for depth in range(1, len(parts)))] if name else []
    inside: Partial | Replicate | None = None
    for rule in map(plan.rule_for, around):
        sharders = STYLES[rule.style.name].values() if rule is not None else ()
        inside = next((each.gradients_inside for each in sharders if each.gradients_inside), inside)
    return inside == Partial()


def _assignments(model: nn.Module, plan: Plan, fit: Fit) -> Iterator[Assignment]:
    """Each module with its rule, as soon as it is known to suit the module."""
    head = head_of(model)
    for name, module in fit.modules.items():
        rule = plan.rule_for(name)
        if rule is None:
            continue
        sharder = _sharder(rule, name, module)
        below = tuple(_without_rules(name, module, plan)) if sharder.holds_below else ()
        assignment = Assignment(name, module, rule, sharder, below_gather_input(name, plan), below)
        _check_arguments(assignment)
        if fit.seq is not None and fit.seq // fit.context % fit.tp and sharder.cuts_sequence(rule.style):
            shared = f", over cp={fit.context}," if fit.context > 1 else ""
            step = sequence_step(fit.context, fit.tp)
            raise PlanError(
                f"rule {rule} cuts the sequence, and {fit.seq}{shared} is no multiple of tp={fit.tp}. Use a "
                f"sequence that is a multiple of {step}, or a plan without sequence parallelism."
            )
        if plan.engine is Engine.DTENSOR:
            _check_twin(assignment)
        sharder.check(assignment, fit)
        check_held(assignment, fit)
        check_counts(assignment, fit.tp)
        if plan.engine is Engine.DTENSOR:
            _check_equal_parts(assignment, is_head=module is head, tp=fit.tp)
        yield assignment


def _without_rules(name: str, module: nn.Module, plan: Plan) -> Iterator[str]:
    """Modules inside, by their name from it on, that own parameters and have no rule."""
    for path, inner in module.named_modules():
        has_own = any(True for _ in inner.parameters(recurse=False))
        if path and has_own and plan.rule_for(f"{name}.{path}" if name else path) is None:
            yield path


def _check_twin(assignment: Assignment) -> None:
    """PyTorch's own styles have no such style, or not these arguments."""
    rule, style = assignment.rule, assignment.style
    if assignment.sharder.twin(assignment, keeps_dtensor=False) is None:
        raise PlanError(
            f'rule {rule}: PyTorch\'s own styles have no "{style.name}" for {assignment.shown}, a '
            f'{assignment.kind}. Use engine = "native".'
        )
    ours = {
        "pieces": style.pieces,
        "parameters": style.parameters,
        "divide": style.divide,
        "gradient": style.gradient,
        "cut": style.cut,
    }
    given = [key for key, value in ours.items() if value]
    if given:
        raise PlanError(f'rule {rule}: PyTorch\'s own styles take no {given[0]}. Use engine = "native".')


def _check_matches(rule: Rule, modules: Mapping[str, nn.Module]) -> None:
    if any(rule.matches(name) for name in modules):
        return
    near = suggest_pattern(rule.pattern, modules)
    hint = f'; did you mean "{near}"?' if near else f". The model's modules: {_some(modules)}."
    raise PlanError(f"rule {rule} matched nothing{hint}")


def _sharder(rule: Rule, name: str, module: nn.Module) -> Sharder:
    style = rule.style
    sharder = sharder_of(style, module)
    if sharder is not None:
        return sharder
    matched = f"rule {rule} matched {name}, a {type(module).__name__}"
    if all(other.holds_others for other in STYLES[style.name].values()):
        raise PlanError(f"{matched}. {style.name} is for modules that hold others.")
    raise PlanError(f"{matched}. Its styles: {', '.join(styles_of(module))}.")


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


def _some(modules: Mapping[str, nn.Module]) -> str:
    names = [name for name in modules if name]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
