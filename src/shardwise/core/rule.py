"""What a rule of a plan was to a module, as values: RuleRef says which rule and which style, ModuleKind what
the module is."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self


class ModuleKind(StrEnum):
    """What a module does with its weights, whoever wrote its class and whatever it is called."""

    EMBEDDING = "embedding"  # looks rows up by ids
    LINEAR = "linear"
    NORM = "norm"  # scales what it takes: all that it owns are vectors
    EXPERTS = "experts"  # gives each token what the experts that were chosen for it make of it
    CONTAINER = "container"  # owns nothing, and holds modules
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class RuleRef:
    """A rule by its pattern and the bare name of its style: one of ours, or another library's."""

    pattern: str
    style: str

    def __str__(self) -> str:
        return f'"{self.pattern}" ({self.style})'

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The inverse of str(), for files. None for other text, such as the "end of backward" of older
        ones."""
        pattern, _, style = text.removeprefix('"').removesuffix(")").rpartition('" (')
        rule = cls(pattern, style)
        return rule if str(rule) == text else None
