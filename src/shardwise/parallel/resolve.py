"""Which rule holds for which module, and whether the model can carry the plan: every check that needs no process group.

Runs on a meta model as well as on a real one, so that a command refuses a plan before it starts a rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from shardwise.core.errors import PlanError
from shardwise.core.placement import Replicate, Shard
from shardwise.core.plan import Engine, Ownership, Plan, Rule, StyleName, suggest_pattern
from shardwise.parallel.collectives import chunk_sizes
from shardwise.torch_private import AnyDropout

LINEAR = frozenset({StyleName.COLWISE, StyleName.ROWWISE, StyleName.REPLICATE})
EMBEDDING = frozenset({StyleName.ROWWISE, StyleName.COLWISE, StyleName.ROUTED, StyleName.REPLICATED})
NORM = frozenset({StyleName.SEQUENCE_PARALLEL, StyleName.REPLICATE})
STYLES_OF: dict[type[nn.Module], frozenset[StyleName]] = {
    nn.Linear: LINEAR,
    nn.Embedding: EMBEDDING,
    nn.RMSNorm: NORM,
    nn.LayerNorm: NORM,
}
# PyTorch's ParallelStyles have no counterpart of these
NATIVE_ONLY = frozenset({StyleName.ROUTED, StyleName.REPLICATED})
KEY_VALUE_NAMES = frozenset({"wk", "wv", "k_proj", "v_proj", "key", "value"})
# query, key and value of a head lie side by side there: models/gpt.py
FUSED_NAMES = frozenset({"wqkv"})


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """One module and the rule that holds for it."""

    name: str
    module: nn.Module
    rule: Rule


def resolve(
    model: nn.Module, plan: Plan, *, tp: int, seq: int | None = None, fsdp: int = 1
) -> tuple[Assignment, ...]:
    """The rule of every module that has one, in the model's order. Raises PlanError for a plan that the model can't carry.

    seq: the length that will be used, where it is known; fsdp: the ranks on axes that shard parameters further.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    try:
        for rule in plan.rules:
            _check_matches(rule, modules)
        rules = ((name, module, plan.rule_for(name)) for name, module in modules.items())
        assignments = tuple(
            Assignment(name, module, rule) for name, module, rule in rules if rule is not None
        )
        head = last_linear(model)
        for assignment in assignments:
            _check_style(assignment, plan.engine)
            _check_sizes(assignment, modules, tp, seq, fsdp)
            if plan.engine is Engine.DTENSOR:
                _check_dtensor_sizes(assignment, head, tp)
        if plan.engine is Engine.NATIVE:
            for assignment in assignments:
                if below_gather_input(assignment.name, plan):
                    _check_below_gather_input(assignment)
            _check_coverage({"the model itself": model, **modules}, {a.name for a in assignments})
        _check_ties(model, assignments, plan.engine)
    except PlanError as error:
        raise PlanError(f'plan "{plan.name}": {error}') from None
    return assignments


def is_sequence_parallel(plan: Plan) -> bool:
    """Whether activations between blocks are cut along the sequence."""
    return any(
        rule.style.name is StyleName.SEQUENCE_PARALLEL or Shard(1) in (rule.style.input, rule.style.output)
        for rule in plan.rules
    )


def tied_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name of a parameter -> all names of the same one, where it has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}


def below_gather_input(name: str, plan: Plan) -> bool:
    """Whether an enclosing module makes the input whole."""
    parts = name.split(".")
    parents = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return any(
        (rule := plan.rule_for(parent)) is not None and rule.style.name is StyleName.GATHER_INPUT
        for parent in parents
    )


def _check_matches(rule: Rule, modules: dict[str, nn.Module]) -> None:
    if any(rule.matches(name) for name in modules):
        return
    near = suggest_pattern(rule.pattern, modules)
    hint = f'; did you mean "{near}"?' if near else f". The model's modules: {_some(modules)}."
    raise PlanError(f"rule {rule} matched nothing{hint}")


def _check_style(assignment: Assignment, engine: Engine) -> None:
    rule, module = assignment.rule, assignment.module
    style = rule.style.name
    if engine is Engine.DTENSOR and style in NATIVE_ONLY:
        raise PlanError(f'rule {rule}: PyTorch\'s own styles have no "{style}". Use engine = "native".')
    if style is StyleName.GATHER_INPUT:
        if type(module) in STYLES_OF:
            raise PlanError(
                f"rule {rule} matched {assignment.name}, a {type(module).__name__}. gather_input is for modules that hold others."
            )
        if rule.style.input not in (None, Shard(1), Replicate()):
            raise PlanError(f"rule {rule}: from is {rule.style.input}. Allowed: shard(1), replicate.")
        return
    allowed = STYLES_OF.get(type(module))
    if allowed is None:
        raise PlanError(
            f"rule {rule} matched {assignment.name}, a {type(module).__name__}, which can't be sharded. "
            f"Shardable: {', '.join(kind.__name__ for kind in STYLES_OF)}."
        )
    if style not in allowed:
        raise PlanError(
            f"rule {rule} matched {assignment.name}, a {type(module).__name__}. Its styles: {', '.join(sorted(allowed))}."
        )
    _check_arguments(rule, module)


def _check_arguments(rule: Rule, module: nn.Module) -> None:
    given = rule.style
    outputs: tuple[object, ...] = (None,)
    inputs: tuple[object, ...] = (None,)
    match module, given.name:
        case nn.Embedding(), _:
            outputs = (None, Shard(1), Replicate())
        case nn.Linear(), StyleName.COLWISE:
            inputs, outputs = (None, Replicate(), Shard(1)), (None, Shard(-1), Replicate())
        case nn.Linear(), StyleName.ROWWISE:
            inputs, outputs = (None, Shard(-1), Replicate()), (None, Replicate(), Shard(1))
    for what, value, allowed in (("input", given.input, inputs), ("output", given.output, outputs)):
        if value not in allowed:
            shown = ", ".join(str(choice).lower() for choice in allowed if choice is not None) or "none"
            raise PlanError(
                f"rule {rule}: {what} is {str(value).lower()}. Allowed for {type(module).__name__}: {shown}."
            )


def _check_sizes(
    assignment: Assignment, modules: dict[str, nn.Module], tp: int, seq: int | None, fsdp: int
) -> None:
    rule, module, name = assignment.rule, assignment.module, assignment.name
    style = rule.style.name
    if seq is not None and seq % tp and _cuts_sequence(assignment):
        raise PlanError(
            f"rule {rule} cuts the sequence, and {seq} is no multiple of tp={tp}. "
            f"Use a sequence that is a multiple of {tp}, or a plan without sequence parallelism."
        )
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            raise PlanError(
                f"rule {rule}: {name} uses max_norm, sparse or scale_grad_by_freq, which no style carries out. Switch them off."
            )
        if style is StyleName.COLWISE and module.embedding_dim % tp:
            raise PlanError(
                f"rule {rule} splits hidden {module.embedding_dim} of {name} over tp={tp}. Use tp in {_divisors(module.embedding_dim)}."
            )
        if style in (StyleName.ROWWISE, StyleName.ROUTED):
            _check_no_empty_shard(rule, name, module.num_embeddings, "rows", tp, fsdp)
        if rule.style.ownership is Ownership.INTERLEAVED and fsdp > 1:
            raise PlanError(
                f"rule {rule} interleaves the rows of {name}, and no checkpoint could tell their order once FSDP cuts them again. "
                'Use ownership = "contiguous", or no fsdp axis.'
            )
    if isinstance(module, nn.Linear) and style in (StyleName.COLWISE, StyleName.ROWWISE):
        width = module.out_features if style is StyleName.COLWISE else module.in_features
        parent_name, _, own_name = name.rpartition(".")
        head_dim = getattr(modules.get(parent_name), "head_dim", None)
        per_head = head_dim * (3 if own_name in FUSED_NAMES else 1) if isinstance(head_dim, int) else 0
        if per_head and width % per_head == 0:
            heads = width // per_head
            if heads % tp:
                what = "KV heads" if own_name in KEY_VALUE_NAMES else "heads"
                raise PlanError(
                    f"rule {rule} splits {heads} {what} of {parent_name} over tp={tp}. Use tp in {_divisors(heads)}."
                )
        _check_no_empty_shard(
            rule, name, width, "columns" if style is StyleName.ROWWISE else "rows", tp, fsdp
        )


def _check_dtensor_sizes(assignment: Assignment, head: nn.Module | None, tp: int) -> None:
    """PyTorch's own styles fail in mid forward where two layers meet in an uneven shard, and hang where a shard is empty."""
    rule, module, name = assignment.rule, assignment.module, assignment.name
    if isinstance(module, nn.Linear) and module is not head:
        width = module.out_features if rule.style.name is StyleName.COLWISE else module.in_features
        if width % tp:
            raise PlanError(
                f"rule {rule} splits {width} of {name} over tp={tp}, and PyTorch's own styles need equal parts. Use tp in {_divisors(width)}."
            )
    elif isinstance(module, nn.Embedding | nn.Linear):
        size = module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features
        if 0 in chunk_sizes(size, tp):
            raise PlanError(
                f"rule {rule} leaves a rank without rows of {name} ({size} over tp={tp}). Use tp of at most {size}."
            )


def last_linear(model: nn.Module) -> nn.Module | None:
    """The head: the linear layer that the model registered last."""
    return next((module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear)), None)


def _check_below_gather_input(assignment: Assignment) -> None:
    """There every rank has the whole input and computes a part of its gradient; what assumes otherwise would train wrong without a word."""
    rule, module, name = assignment.rule, assignment.module, assignment.name
    match module, rule.style.name:
        case nn.Linear(), StyleName.COLWISE if rule.style.input == Shard(1):
            raise PlanError(
                f"rule {rule}: input is shard(1), but a gather_input above {name} has made it whole. Leave input out."
            )
        case nn.Linear(), StyleName.ROWWISE if rule.style.input == Replicate():
            advice = "Leave input out, and make the layer before it colwise."
        case nn.Linear(), StyleName.REPLICATE:
            advice = "Allowed there: colwise, rowwise."
        case ((nn.RMSNorm() | nn.LayerNorm()), StyleName.REPLICATE):
            advice = "Use sequence_parallel, which sums the parts."
        case _:
            return
    raise PlanError(
        f"rule {rule}: {name} is below a gather_input, where each rank's gradient is a part of the sum. {advice}"
    )


def _check_no_empty_shard(rule: Rule, name: str, size: int, what: str, tp: int, fsdp: int) -> None:
    if fsdp > 1 and 0 in chunk_sizes(size, tp):
        raise PlanError(
            f"rule {rule} leaves a rank without {what} of {name} ({size} over tp={tp}), which FSDP can't shard further. "
            f"Use tp of at most {size}, or no fsdp axis."
        )


def _check_ties(model: nn.Module, assignments: tuple[Assignment, ...], engine: Engine) -> None:
    ties = tied_parameters(model)
    by_name = {assignment.name: assignment for assignment in assignments}
    for group in set(ties.values()):
        owners = [by_name[name.rpartition(".")[0]] for name in group if name.rpartition(".")[0] in by_name]
        if not owners:
            continue
        if engine is Engine.DTENSOR:
            raise PlanError(
                f'{" and ".join(group)} are tied, and PyTorch\'s own styles would untie them. Use engine = "native".'
            )
        kinds = [type(owner.module) for owner in owners]
        head = next((owner for owner in owners if type(owner.module) is nn.Linear), None)
        if sorted(kind.__name__ for kind in kinds) != ["Embedding", "Linear"] or head is None:
            raise PlanError(
                f"{' and '.join(group)} are tied. Only an embedding tied to one linear head can be sharded."
            )
        if head.rule.style.name is not StyleName.COLWISE:
            raise PlanError(
                f"rule {head.rule}: {head.name} is tied to the embedding. Allowed for a tied head: colwise."
            )
        is_interleaved = any(owner.rule.style.ownership is Ownership.INTERLEAVED for owner in owners)
        if is_interleaved and head.rule.style.output == Replicate():
            raise PlanError(
                f"rule {head.rule}: {head.name} is tied to an interleaved table, so its whole logits would be out of order. "
                'Use output = "shard(-1)", or ownership = "contiguous".'
            )
        if is_interleaved and head.module.bias is not None:
            raise PlanError(
                f"rule {head.rule}: {head.name} is tied to an interleaved table, and its bias is not dealt out like that. "
                'Use ownership = "contiguous".'
            )


def _check_coverage(modules: dict[str, nn.Module], covered: set[str]) -> None:
    for name, module in modules.items():
        if isinstance(module, AnyDropout) and module.p > 0:
            raise PlanError(
                f"{name} is a {type(module).__name__}({module.p}), whose masks would differ between the ranks. Set its p to 0."
            )
        holds_parameters = any(True for _ in module.parameters(recurse=False))
        if holds_parameters and type(module) not in STYLES_OF:
            raise PlanError(
                f"{name}, a {type(module).__name__}, holds parameters of its own, and the native engine knows what to do with "
                f"{', '.join(kind.__name__ for kind in STYLES_OF)} only. Use PyTorch's own styles for it."
            )
        if holds_parameters and name not in covered:
            choices = ", ".join(sorted(STYLES_OF[type(module)]))
            raise PlanError(
                f'no rule covers {name}, a {type(module).__name__}. Add one: "{name}" = one of {choices}.'
            )


def _cuts_sequence(assignment: Assignment) -> bool:
    style, module = assignment.rule.style, assignment.module
    if isinstance(module, nn.Embedding):
        return style.output != Replicate()
    return style.output == Shard(1)


def _divisors(number: int) -> str:
    found = [candidate for candidate in range(1, min(number, 256) + 1) if number % candidate == 0]
    return "{" + ", ".join(map(str, found)) + "}"


def _some(names: dict[str, nn.Module]) -> str:
    return ", ".join(_first(iter(names), 6)) + (", ..." if len(names) > 6 else "")


def _first(items: Iterator[str], count: int) -> list[str]:
    return [item for item, _ in zip(items, range(count), strict=False)]
