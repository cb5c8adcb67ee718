"""What a rank keeps of each parameter, its gradient and its optimizer state after a traced step; and the same
of a deeper model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from shardwise.core.layer_name import layer_index, moved_name
from shardwise.core.mesh import Mesh
from shardwise.core.program import Holding
from shardwise.core.rule import RuleRef
from shardwise.parallel.kinds import kind_of, outer_parameters
from shardwise.step.train import TrainStep
from shardwise.torch_private import local_part
from shardwise.trace.placements import placements_on


def holdings_of(step: TrainStep, mesh: Mesh, rule_of: Callable[[str], RuleRef | None]) -> Iterator[Holding]:
    """In the model's order; a tied parameter once."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in step.model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    outer = outer_parameters(step.model)
    for parameter, (name, *shared) in names.items():
        module = name.rpartition(".")[0]
        gradient = parameter.grad
        state = step.optimizer.state.get(parameter, {})
        yield Holding(
            name=name,
            module=module,
            dtype=str(parameter.dtype).removeprefix("torch."),
            shape=tuple(parameter.shape),
            local_shape=tuple(local_part(parameter).shape),
            placement=placements_on(mesh, parameter),
            parameter_bytes=_n_bytes(parameter),
            grad_shape=tuple(local_part(gradient).shape) if gradient is not None else None,
            grad_placement=placements_on(mesh, gradient) if gradient is not None else None,
            gradient_bytes=_n_bytes(gradient) if gradient is not None else 0,
            optimizer_bytes=sum(_n_bytes(value) for value in state.values() if isinstance(value, Tensor)),
            rule=rule_of(module),
            shared=tuple(shared),
            module_kind=kind_of(step.model.get_submodule(module)),
            is_outer=parameter in outer,
        )


def longer_holdings(
    holdings: Sequence[Holding], prefix: str, firsts: Sequence[int], more: int
) -> tuple[Holding, ...]:
    """Those of a model with `more` layers more in each row of them, which begin at `firsts`: a row's second
    one stands for all of them but the first and the last two."""
    longer: list[Holding] = []
    seconds = [
        [holding for holding in holdings if layer_index(holding.module, prefix) == first + 1]
        for first in firsts
    ]
    for holding in holdings:
        index = layer_index(holding.module, prefix)
        if index is not None and index - max(first for first in firsts if first <= index) >= 2:
            longer.append(_moved(holding, prefix, more))
            continue
        longer.append(holding)
        for template in seconds:
            if template and holding is template[-1]:
                longer += [_moved(again, prefix, by) for by in range(1, more + 1) for again in template]
    return tuple(longer)


def _moved(holding: Holding, prefix: str, by: int) -> Holding:
    return replace(
        holding,
        name=moved_name(holding.name, prefix, by),
        module=moved_name(holding.module, prefix, by),
        shared=tuple(moved_name(name, prefix, by) for name in holding.shared),
    )


def _n_bytes(tensor: Tensor) -> int:
    local = local_part(tensor)
    return local.numel() * local.element_size()
