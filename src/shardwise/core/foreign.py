"""A plan that another library carries out by rules of its own: what we know of it is what matched what."""

from dataclasses import dataclass

from shardwise.core.rule import RuleRef


@dataclass(frozen=True, slots=True)
class ForeignRule:
    """One rule as that library has it, and the names of the model's modules and parameters that it was
    applied to."""

    rule: RuleRef
    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    @property
    def matches(self) -> bool:
        return bool(self.modules or self.parameters)


@dataclass(frozen=True, slots=True)
class ForeignPlan:
    """The rules in that library's order, those that matched nothing included; of two that match a name, its
    own logic chose."""

    name: str
    rules: tuple[ForeignRule, ...]

    def rule_for(self, name: str) -> ForeignRule | None:
        """The rule that was applied to a module or a parameter of this very name."""
        return next((rule for rule in self.rules if name in rule.modules or name in rule.parameters), None)
