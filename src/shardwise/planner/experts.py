"""Experts by expert: on a mesh with an axis for them, modules that are called as experts are hold some of
them on each of its ranks, beside what tp cuts inside. A trace has no say in it: what goes where a router
decides."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from shardwise.core.errors import PlanError
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Partial, Replicate
from shardwise.core.plan import Style, StyleName
from shardwise.parallel.experts import number_of_experts, takes_tokens_of_experts
from shardwise.parallel.sharder import divisors
from shardwise.planner.rules import Reasoned

_WHY = "each ep rank has its part of the experts ({:,}), and tokens go to those that the router chose"


def experts_in(model: nn.Module, mesh: Mesh) -> dict[str, int]:
    """Modules that are shared out by expert, and how many experts each has. Raises PlanError for experts that
    the mesh can't share out evenly."""
    if mesh.experts == 1:
        return {}
    found = {}
    for name, module in model.named_modules():
        experts = number_of_experts(module) if takes_tokens_of_experts(module) else None
        if experts is None:
            continue
        if experts % mesh.experts:
            raise PlanError(
                f"{name} has {experts} experts, which ep={mesh.experts} can't share evenly. Use ep in "
                f"{divisors(experts)}."
            )
        found[name] = experts
    return found


def shared_out(rules: Mapping[str, Reasoned], model: nn.Module, mesh: Mesh) -> dict[str, Reasoned]:
    """The rules with each module of experts by expert. Raises PlanError as experts_in() does, and for a cut
    inside that it can't keep."""
    found = dict(rules)
    for name, experts in experts_in(model, mesh).items():
        before = rules.get(name)
        style = _by_expert(name, before.style if before is not None else Style(StyleName.REPLICATE))
        why = _WHY.format(experts)
        if before is not None and style.parameters:
            why += f"; over tp they are cut inside: {before.why}"
        found[name] = Reasoned(style, why)
    return found


def _by_expert(name: str, style: Style) -> Style:
    match style.name:
        case StyleName.GATHER_INPUT if style.input == style.output == Replicate() and style.every_input:
            return replace(style, name=StyleName.EXPERTS, input=None, every_input=False)
        case StyleName.REPLICATE | StyleName.SEQUENCE_PARALLEL:
            is_part = style.gradient is not None or style.name is StyleName.SEQUENCE_PARALLEL
            return Style(StyleName.EXPERTS, gradient=Partial() if is_part else None)
        case StyleName.LOCAL:
            return replace(style, name=StyleName.EXPERTS)
        case _:
            raise PlanError(
                f"{name} is cut inside by {style}, which can't be beside experts by expert. Use a mesh "
                "with tp=1, or without ep."
            )
