"""What a module is, by its class and what it owns, never by its name."""

from torch import nn

from shardwise.core.rule import ModuleKind


def kind_of(module: nn.Module) -> ModuleKind:
    """The kind of any module: torch's own, a subclass, or another library's."""
    match module:
        case nn.Embedding():
            return ModuleKind.EMBEDDING
        case nn.Linear():
            return ModuleKind.LINEAR
    own, holds_modules = list(module.parameters(recurse=False)), any(True for _ in module.children())
    if own and not holds_modules and all(parameter.dim() == 1 for parameter in own):
        return ModuleKind.NORM
    return ModuleKind.CONTAINER if holds_modules and not own else ModuleKind.OTHER
