"""Arguments that a module is given whole and of which its forward, on what is cut, takes each rank's part:
tables that the model makes for all heads. They are constants: nothing is sent, forward or backward."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from shardwise.core.argument_cut import ArgumentCut
from shardwise.core.errors import PlanError
from shardwise.core.plan import suggest
from shardwise.parallel.axis import Axis, Site
from shardwise.parallel.own_forward import wrap
from shardwise.parallel.sharder import Assignment

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_arguments_cut(assignment: Assignment) -> None:
    """Raises PlanError for a name that the module's forward doesn't take."""
    known = _names(assignment.module)
    for name, _ in assignment.style.cut:
        if name not in known:
            raise PlanError(
                f"rule {assignment.rule}: cut names {name}, and the forward of {assignment.shown}, a "
                f"{assignment.kind}, takes no such argument.{suggest(name, known)} It takes: "
                f"{', '.join(known) or 'none that has a name'}."
            )


def cut_arguments(assignment: Assignment, site: Site) -> None:
    """Gives the module's forward its part of them."""
    module, cuts = assignment.module, dict(assignment.style.cut)
    if not cuts:
        return
    positions = {name: at for at, name in enumerate(_names(module))}

    def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        for name, how in cuts.items():
            if name in kwargs:
                kwargs[name] = _part(kwargs[name], name, how, site)
            elif positions[name] < len(given):
                given[positions[name]] = _part(given[positions[name]], name, how, site)
        return inner(*given, **kwargs)

    wrap(module, around)


def _names(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [each.name for each in parameters if each.kind in _NAMED]


def _part(given: Any, name: str, how: ArgumentCut, site: Site) -> Any:
    if not isinstance(given, Tensor):
        return given  # None: the model makes no such table now
    where = f"{site.module}: rule {site.rule} cuts its argument {name}"
    if given.requires_grad:
        raise PlanError(f"{where}, which has a gradient. Cut constants alone; what is trained a rule holds.")
    if not -given.dim() <= how.dim < given.dim():
        raise PlanError(
            f"{where} along dim {how.dim}, and it has shape {list(given.shape)}. Name one of its dims."
        )
    dim = how.dim % given.dim()
    size, ranks = given.shape[dim], site.axis.size
    every = how.every or size
    if size % every or every % ranks:
        raise PlanError(
            f"{where}, {size} in runs of {every}, over tp={ranks}. Give runs that divide it, and a tp that "
            "divides them."
        )
    return part_of(given, dim, every, site.axis)


def part_of(whole: Tensor, dim: int, every: int, axis: Axis) -> Tensor:
    """Of each run of `every` entries along a dim this rank's part."""
    runs = whole.unflatten(dim, (-1, axis.size, every // axis.size))
    part: Tensor = runs.select(dim + 1, axis.rank).flatten(dim, dim + 1)
    return part
