"""What a module is, by its class and what it owns, never by its name."""

from torch import nn

from shardwise.core.rule import ModuleKind
from shardwise.parallel.experts import takes_tokens_of_experts
from shardwise.parallel.resolve import head_of


def kind_of(module: nn.Module) -> ModuleKind:
    """The kind of any module: torch's own, a subclass, or another library's."""
    match module:
        case nn.Embedding():
            return ModuleKind.EMBEDDING
        case nn.Linear():
            return ModuleKind.LINEAR
    if takes_tokens_of_experts(module):
        return ModuleKind.EXPERTS
    own, holds_modules = list(module.parameters(recurse=False)), any(True for _ in module.children())
    if own and not holds_modules and all(parameter.dim() == 1 for parameter in own):
        return ModuleKind.NORM
    return ModuleKind.CONTAINER if holds_modules and not own else ModuleKind.OTHER


def outer_parameters(model: nn.Module) -> frozenset[nn.Parameter]:
    """Those of embeddings, and of the head."""
    head = head_of(model)
    outer = (module for module in model.modules() if isinstance(module, nn.Embedding) or module is head)
    return frozenset(parameter for module in outer for parameter in module.parameters())
