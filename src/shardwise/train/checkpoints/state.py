"""What of a run is saved, by name, as this rank holds it: parameters and persistent buffers, the optimizer's
state of each parameter, and the random state of every rank.

    model/NAME               a parameter or buffer, under the model's own name
    optimizer/NAME/KEY       what the optimizer keeps of it: exp_avg, exp_avg_sq, step
    random/RANK/cpu, cuda    of each rank; forwards: what ranks that draw dropout alike have counted

Ranks that hold the same part of one name hold it alike, so one of them writes it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shardwise.core.errors import CheckpointError
from shardwise.core.shown import shown
from shardwise.parallel.apply import applied_to
from shardwise.parallel.dropout import forwards_of
from shardwise.parallel.ownership import Order
from shardwise.torch_private import persistent_buffers
from shardwise.train.checkpoints.places import Place, place_of

MODEL, OPTIMIZER, RANDOM = "model", "optimizer", "random"
# more than a step has: streams of two steps don't meet
_FORWARDS_OF_A_STEP = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A tensor of the state: its whole shape, and this rank's part, which is the memory itself."""

    name: str
    shape: tuple[int, ...]
    place: Place
    local: Tensor

    @classmethod
    def of(cls, name: str, tensor: Tensor, order: Order | None = None) -> "Held":
        place = place_of(name, tensor, order)
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return cls(name, tuple(tensor.shape), place, local.detach())


def held_by(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> list[Held]:
    """Everything, in the model's order. Raises CheckpointError for state that can't be saved."""
    return [*of_model(model), *of_optimizer(model, optimizer), *_of_random(model, rank)]


def of_model(model: nn.Module) -> Iterator[Held]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without a backward, as in validation, leaves parameters whole
    orders = applied_to(model).row_order
    for name, parameter in model.named_parameters():
        yield Held.of(f"{MODEL}/{name}", parameter, orders.get(name))
    for name, buffer in persistent_buffers(model):
        yield Held.of(f"{MODEL}/{name}", buffer)


def of_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Held]:
    """Of parameters that it has state of: before the first step none."""
    orders = applied_to(model).row_order
    for name, parameter in _named(model, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            yield Held.of(
                f"{OPTIMIZER}/{name}/{key}",
                _tensor(name, key, value),
                _order_for(orders.get(name), parameter, value),
            )


def fresh_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> list[Held]:
    """Gives the optimizer empty state of all that was saved of its parameters, for the values to come. saved:
    shape and dtype, by name. Raises CheckpointError for a shape that is neither the parameter's nor one
    number's."""
    keys: dict[str, list[str]] = {}
    for whole_name in saved:
        kind, _, rest = whole_name.partition("/")
        name, _, key = rest.rpartition("/")
        if kind == OPTIMIZER:
            keys.setdefault(name, []).append(key)
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    optimizer.state.clear()
    for name, parameter in _named(model, optimizer):
        for key in keys.get(name, ()):
            shape, dtype = saved[f"{OPTIMIZER}/{name}/{key}"]
            if shape == tuple(parameter.shape):
                value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            elif shape == ():
                # fused and capturable optimizers count steps where the parameter is
                group = groups[id(parameter)]
                on_device = bool(group.get("fused") or group.get("capturable"))
                device = parameter.device if on_device else torch.device("cpu")
                value = torch.zeros((), dtype=dtype, device=device)
            else:
                raise CheckpointError(
                    f"{OPTIMIZER}/{name}/{key} is {shown(list(shape))} and {name} is "
                    f"{list(parameter.shape)}. Use the optimizer that the checkpoint was made with."
                )
            optimizer.state[parameter][key] = value
    return list(of_optimizer(model, optimizer))


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The optimizer's parameters by the model's names, in the model's order."""
    own = {id(each) for group in optimizer.param_groups for each in group["params"]}
    named = [(name, each) for name, each in model.named_parameters() if id(each) in own]
    if len(named) != len(own):
        raise CheckpointError(
            f"checkpoint: {len(own) - len(named)} of the optimizer's {len(own)} parameters are none of the "
            "model's. Make the optimizer of the model after it was sharded."
        )
    yield from named


def _tensor(name: str, key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"checkpoint: the optimizer keeps a {type(value).__name__} as {key} of {name}. Only tensors can "
            "be saved: use an optimizer of torch.optim."
        )
    return value


def _order_for(order: Order | None, parameter: Tensor, value: Any) -> Order | None:
    """A state of the parameter's shape is kept as the parameter is."""
    return order if isinstance(value, Tensor) and value.shape == parameter.shape else None


def _of_random(model: nn.Module, rank: int) -> Iterator[Held]:
    yield Held.of(f"{RANDOM}/{rank}/cpu", torch.get_rng_state())
    if torch.cuda.is_initialized():
        yield Held.of(f"{RANDOM}/{rank}/cuda", torch.cuda.get_rng_state())
    forwards = forwards_of(model)
    if forwards is not None:
        yield Held.of(f"{RANDOM}/{rank}/forwards", torch.tensor(forwards.number))


def random_targets(model: nn.Module, rank: int) -> list[Held]:
    """Memory for the random state of a rank, for take_random()."""
    return list(_of_random(model, rank))


def take_random(model: nn.Module, held: list[Held]) -> None:
    """Sets what random_targets() made and was filled."""
    for each in held:
        match each.name.rpartition("/")[2]:
            case "cpu":
                torch.set_rng_state(each.local)
            case "cuda":
                torch.cuda.set_rng_state(each.local)
            case "forwards":
                _set_forwards(model, int(each.local))


def draw_anew(model: nn.Module, step: int) -> None:
    """Random numbers from the seed that ranks began with and the step, the same on all that began alike."""
    digest = blake2b(f"{torch.initial_seed()}:{step}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
    _set_forwards(model, step * _FORWARDS_OF_A_STEP)


def _set_forwards(model: nn.Module, number: int) -> None:
    forwards = forwards_of(model)
    if forwards is not None:
        forwards.number = number
