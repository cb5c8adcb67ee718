"""Counts what routers choose while a step runs: of every module that is called as experts are, whoever wrote
it and however it is sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.core.expert_load import ExpertLoad
from shardwise.parallel.experts import number_of_experts, takes_tokens_of_experts
from shardwise.torch_private import in_backward, local_part


class ExpertLoads:
    """What this rank's tokens chose. tokens: of the whole step, over all ranks."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._counts: dict[str, tuple[Tensor, int, int]] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Counts inside."""
        handles = []
        for name, module in model.named_modules():
            experts = number_of_experts(module) if takes_tokens_of_experts(module) else None
            if experts is not None:
                held = next(local_part(parameter).shape[0] for parameter in module.parameters(recurse=False))
                hook = self._hook(name, experts, experts // held if held else 1)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loads(self) -> tuple[ExpertLoad, ...]:
        """What was counted; a recomputed forward isn't counted again."""
        found = []
        for name, (counts, ranks, choices) in self._counts.items():
            *own, dropped = counts.tolist()
            found.append(ExpertLoad(name, tuple(own), dropped, ranks, self._tokens * choices))
        return tuple(found)

    def _hook(self, name: str, experts: int, ranks: int) -> Any:
        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if in_backward():
                return
            index_NK: Tensor = (*args, *kwargs.values())[1]
            counts = torch.bincount(index_NK.detach().flatten(), minlength=experts + 1)
            before = self._counts.get(name)
            total = counts if before is None else before[0] + counts
            self._counts[name] = total, ranks, index_NK.shape[1]

        return count
