"""What can be said of a plan before anything runs: from the model as it was named (without weights), the
plan, and the number of ranks."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.plan import AnyPlan, Engine, Plan, TheirPlan, suggest_pattern
from shardwise.core.program import RuleUse
from shardwise.core.sharded import Sharded
from shardwise.parallel.apply import applied_to
from shardwise.parallel.kinds import outer_parameters
from shardwise.parallel.mixed import mixed_for_clipping
from shardwise.torch_private import AnyDropout


def of_model(model: nn.Module, plan: AnyPlan, tp: int) -> tuple[Sharded, list[Finding]]:
    """How much of a model that `plan` has sharded is sharded, and all that is found in it but ties."""
    sharded = count(model)
    findings = [*sharded.findings(tp), *dropout(model, plan)]
    foreign = applied_to(model).foreign
    if foreign is not None:
        findings += [*undivided_heads(model, foreign, tp), *idle_rules(model, foreign)]
    if isinstance(plan, Plan):
        findings += shadowed_rules(model, plan)
    mixed = mixed_for_clipping(model) if plan is TheirPlan.OWN else None
    if mixed is not None:
        findings.append(mixed)
    return sharded, findings


def count(model: nn.Module) -> Sharded:
    """What of a sharded model's parameters a rank doesn't hold whole."""
    outer = outer_parameters(model)
    return Sharded.of((each.numel(), _is_cut(each), each in outer) for each in model.parameters())


def _is_cut(parameter: nn.Parameter) -> bool:
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    return not all(placement.is_replicate() for placement in placements)


def shadowed_rules(model: nn.Module, plan: Plan) -> Iterator[Finding]:
    """Rules that match modules and hold for none, since later ones match them all."""
    names = [name for name, _ in model.named_modules() if name]
    holds = {name: plan.rule_for(name) for name in names}
    for rule in plan.rules:
        matched = [name for name in names if rule.matches(name)]
        if matched and all(holds[name] is not rule for name in matched):
            others = ", ".join(dict.fromkeys(str(holds[name]) for name in matched))
            what = f"what it matches, {_some(matched)}, later rules match too: {others}"
            advice = "Of several rules the last that matches holds: move it down, or take it out."
            reason = f"the rule holds for no module: {what}"
            yield Finding(FindingKind.RULE_IS_SHADOWED, rule.pattern, reason, advice=advice, rule=rule.ref)


def idle_rules(model: nn.Module, rules: Iterable[RuleUse]) -> Iterator[Finding]:
    """Another library's rules that match nothing. Our own engine refuses those."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for rule in (use.rule for use in rules if not use.modules):
        near = suggest_pattern(rule.pattern, names)
        advice = f'Did you mean "{near}"?' if near is not None and near != rule.pattern else None
        reason = f"the rule ({rule.style}) matches no module or parameter"
        yield Finding(FindingKind.RULE_MATCHES_NOTHING, rule.pattern, reason, advice=advice, rule=rule)


def untied(ties: Iterable[tuple[str, ...]], model: nn.Module) -> Iterator[Finding]:
    """Parameters that are one in the unsharded model, under the names of each of `ties`, and several in the
    sharded one."""
    after = dict(model.named_parameters(remove_duplicate=False))
    for name, *others in sorted(ties):
        if len({id(after[each]) for each in (name, *others) if each in after}) > 1:
            one = f"it is one parameter with {', '.join(others)}"
            reason = f"{one}, and several when sharded, which train apart"
            yield Finding(FindingKind.UNTIED, name, reason, cause=Cause.UNTIED)


_HEAD_COUNTS = (
    ("num_attention_heads", "attention heads", r"(^|\.)(q_proj|wq|query)$"),
    ("num_key_value_heads", "KV heads", r"(^|\.)(k_proj|v_proj|wk|wv|key|value)$"),
)


def undivided_heads(model: nn.Module, rules: Iterable[RuleUse], tp: int) -> Iterator[Finding]:
    """Heads that the ranks can't share out evenly, where a rule cuts the projection that makes them. By a
    Hugging Face configuration."""
    config: Any = getattr(model, "config", None)
    part: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for key, what, projections in _HEAD_COUNTS:
        count = _number(part, key)
        cuts = (use for use in rules if use.style == "colwise" and use.modules)
        use = next((use for use in cuts if re.search(projections, use.modules[0])), None)
        if count is not None and count % tp and use is not None:
            cut = "the rule cuts the projection that makes them"
            reason = f"tp={tp} doesn't divide the {count} {what}, and {cut}"
            divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            advice = f"Use tp in {{{divisors}}}, or leave the projection whole."
            where = use.modules[0]
            yield Finding(FindingKind.HEADS_NOT_DIVISIBLE, where, reason, advice=advice, rule=use.rule)


def _number(config: Any, key: str) -> int | None:
    """A configuration's number; None where there is none, or one for each layer (asking for which
    transformers refuses in its own way)."""
    try:
        value = getattr(config, key, None)
    except Exception:
        return None
    return value if isinstance(value, int) else None


def dropout(model: nn.Module, plan: AnyPlan) -> Iterator[Finding]:
    """Dropout that is on. Each rank draws its masks itself, and activations that all ranks hold need the same
    ones; our own engine sees to that."""
    if isinstance(plan, Plan) and plan.engine is Engine.NATIVE:
        return
    dropouts: Any = ((name, each) for name, each in model.named_modules() if isinstance(each, AnyDropout))
    on = [name for name, module in dropouts if module.p > 0]
    if on:
        masks = "each rank draws its own masks, and of what all ranks hold they must be equal"
        reason = f"{len(on)} dropout modules are on ({_some(on)}); {masks}"
        advice = "Seed all tp ranks alike, or set the dropout to 0. A proof runs without any."
        yield Finding(FindingKind.DROPOUT_MAY_DIFFER, on[0], reason, advice=advice)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
