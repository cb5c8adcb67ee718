"""The styles, one file each: NAME.py is the style NAME, and its SHARDERS say what it does to which class of
modules.

The list is what lies in this folder. A subclass is taken for its class where it inherits that one's forward;
nn.Module stands for whatever has a forward of its own.
"""

import pkgutil
from collections.abc import Mapping
from importlib import import_module

from torch import nn

from shardwise.core.plan import AnyPlan, Plan, Style, StyleName
from shardwise.core.rule import RuleRef
from shardwise.parallel.sharder import Reasons, Sharder

STYLES: Mapping[StyleName, Mapping[type[nn.Module], Sharder]] = {
    StyleName(found.name): import_module(f"{__name__}.{found.name}").SHARDERS
    for found in pkgutil.iter_modules(__path__)
}
_TAKEN = dict.fromkeys(kind for sharders in STYLES.values() for kind in sharders)
SHARDABLE = tuple(kind for kind in _TAKEN if kind is not nn.Module)
"""The classes of modules that some style takes for what they are."""
# another library's names of styles that are ours
_ALSO = {"embedding_rowwise": StyleName.ROWWISE}


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module is taken for: one of SHARDABLE where it computes what that class does, else
    nn.Module."""
    if "forward" in vars(module):
        return nn.Module
    if type(module) in SHARDABLE:
        return type(module)
    # a subclass may own more, or make its weight of something else
    is_plain = "weight" in module._parameters and module._parameters.keys() <= {"weight", "bias"}
    kinds = (kind for kind in SHARDABLE if isinstance(module, kind) and type(module).forward is kind.forward)
    return next(kinds, nn.Module) if is_plain else nn.Module


def sharder_of(style: Style, module: nn.Module) -> Sharder | None:
    """What a style does to a module; None where it doesn't take it. A rule that says how parameters are held
    speaks of a module whose class doesn't tell."""
    return sharder_for(style, class_of(module))


def sharder_for(style: Style, kind: type[nn.Module]) -> Sharder | None:
    """The same for the class that a module is taken for."""
    is_told = bool(style.parameters or style.parts)
    return STYLES[style.name].get(nn.Module if is_told else kind)


def styles_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the styles that take a module for what it is, sorted."""
    kind = class_of(module)
    return tuple(sorted(style for style, sharders in STYLES.items() if kind in sharders))


def is_decided_by_data(plan: AnyPlan) -> bool:
    """Whether token ids decide what a plan sends."""
    return isinstance(plan, Plan) and any(
        sharder.decided_by_data for rule in plan.rules for sharder in STYLES[rule.style.name].values()
    )


def reasons_of(module: nn.Module, rule: RuleRef | None, cut_dim: int | None) -> Reasons | None:
    """Why a module issues collectives: by its rule's style, whoever carries it out, or where no rule is known
    by the dim of its weight that is cut. None where neither is known."""
    if rule is None and cut_dim is None:
        return None
    for style, sharders in STYLES.items():
        for kind, sharder in sharders.items():
            if rule is not None:
                is_its = _ALSO.get(rule.style, rule.style) == style
            else:
                is_its = sharder.cut_dim == cut_dim and not sharder.decided_by_data
            if is_its and sharder.reasons is not None and isinstance(module, kind):
                return sharder.reasons
    return None
