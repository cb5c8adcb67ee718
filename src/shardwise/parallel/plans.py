"""Plans as a command names them: built-in names, or paths of TOML files."""

from collections.abc import Sequence
from pathlib import Path

from shardwise.core.errors import PlanError
from shardwise.core.plan import AnyPlan, ContextAttention, Family, Plan, TheirPlan
from shardwise.parallel.any_plan import name_of
from shardwise.parallel.builtin import builtin_plan


def load_plans(
    names: Sequence[str], *, sequence_parallel: bool, family: Family, context_attention: str
) -> list[tuple[str, AnyPlan]]:
    """(label, plan) for each name, built-in ones for a family of models; labels are told apart where two
    plans share one."""
    found: list[tuple[str, AnyPlan]] = []
    for name in names:
        plan = load_any_plan(
            name, sequence_parallel=sequence_parallel, family=family, context_attention=context_attention
        )
        found.append((told_apart(name_of(plan), [label for label, _ in found]), plan))
    return found


def told_apart(name: str, taken: Sequence[str]) -> str:
    """The plan's name, or `NAME #2` where another plan of the run has it."""
    label, count = name, 2
    while label in taken:
        label, count = f"{name} #{count}", count + 1
    return label


def load_any_plan(
    name: str, *, sequence_parallel: bool, family: Family, context_attention: str = ContextAttention.GATHER
) -> AnyPlan:
    """A plan of ours by name or file, or one that isn't ours: unsharded, hf, own. sequence_parallel,
    context_attention: of built-in ones; a file says its own."""
    if name in list(TheirPlan):
        return TheirPlan(name)
    if not name.endswith(".toml"):
        way = ContextAttention(context_attention)
        return builtin_plan(name, sequence_parallel=sequence_parallel, family=family, context_attention=way)
    return _read(name)


def _read(name: str) -> Plan:
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"plan file {name}: {error.strerror}. Give the path of a TOML file, or a built-in plan's name."
        ) from None
    except UnicodeDecodeError:
        raise PlanError(f"plan file {name}: not UTF-8 text.") from None
    return Plan.from_toml(text, source=name)
