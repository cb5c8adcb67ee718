"""Plans as a command names them: built-in names, or paths of TOML files."""

from collections.abc import Sequence
from pathlib import Path

from shardwise.core.errors import PlanError
from shardwise.core.plan import AnyPlan, Family, Plan, TheirPlan
from shardwise.parallel.builtin import builtin_plan


def load_plans(names: Sequence[str], *, sequence_parallel: bool, family: Family) -> list[tuple[str, Plan]]:
    """(label, plan) for each name, built-in ones for a family of models; labels are told apart where two
    plans share one."""
    found: list[tuple[str, Plan]] = []
    for name in names:
        plan = _load(name, sequence_parallel, family)
        label, count = plan.name, 2
        while label in {known for known, _ in found}:
            label, count = f"{plan.name} #{count}", count + 1
        found.append((label, plan))
    return found


def load_any_plan(name: str, *, sequence_parallel: bool, family: Family) -> AnyPlan:
    """A plan of ours by name or file, or one that isn't ours: unsharded, hf, own."""
    if name in list(TheirPlan):
        return TheirPlan(name)
    return _load(name, sequence_parallel, family)


def _load(name: str, sequence_parallel: bool, family: Family) -> Plan:
    if not name.endswith(".toml"):
        return builtin_plan(name, sequence_parallel=sequence_parallel, family=family)
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"plan file {name}: {error.strerror}. Give the path of a TOML file, or a built-in plan's name."
        ) from None
    except UnicodeDecodeError:
        raise PlanError(f"plan file {name}: not UTF-8 text.") from None
    return Plan.from_toml(text, source=name)
