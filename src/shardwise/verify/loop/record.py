"""What some steps of a user's loop did, on one process or on this rank: losses, gradients as the backward
leaves them and as the optimizer finds them, its settings, and what is left at the end."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.verify.held import local
from shardwise.verify.loop.loop import SEED, Loop, bare, optimizers_in
from shardwise.verify.noise import NoDropout

Tensors = dict[str, Tensor | None]
Settings = dict[str, dict[str, Any]]


@dataclass(slots=True)
class StepRecord:
    """loss, norm: as the step returned them; None where it didn't. raw: gradients after its last backward;
    given: as its first optimizer found them; settings: by parameter, the numbers of its group then. kept:
    parameters that had a gradient of an earlier step as its backward began. between: what gradients were
    multiplied by between two of its backwards; 0.0 where they were dropped, None where they were not touched.
    """

    loss: float | None = None
    norm: float | None = None
    raw: Tensors | None = None
    given: Tensors | None = None
    settings: Settings = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    between: float | None = None

    @property
    def gradients(self) -> Tensors:
        """What the optimizer goes by, as far as it was seen."""
        return self.given if self.given is not None else self.raw or {}


@dataclass(slots=True)
class Record:
    """before, after: parameters. states: of the optimizer, by kind and parameter. strangers: how many
    parameters the optimizers hold that aren't the model's."""

    steps: list[StepRecord]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    buffers: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]
    strangers: int = 0


def record(
    loop: Loop,
    model: nn.Module,
    batch_of: Callable[[int], Any],
    mesh: Any,
    *,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    told: Callable[[int], None] = lambda _: None,
    steps: int | None = None,
) -> Record:
    """Runs the loop's steps on a model, without dropout. around: of the run. told: of each step, as it
    begins."""
    torch.manual_seed(SEED)
    held = dict(bare(model).named_parameters())
    made = loop.make_optimizer(model)
    names = {id(parameter): name for name, parameter in held.items()}
    watched = _Recording(held)
    found = optimizers_in(made)
    in_groups = [each for one in found for group in one.param_groups for each in group["params"]]
    before = {name: local(each).detach().clone() for name, each in held.items()}
    records = []
    with ExitStack() as stack:
        for each in found:
            hook = each.register_step_pre_hook(lambda one, *_: watched.optimizer_steps(one, names))
            stack.callback(hook.remove)
        stack.enter_context(around())
        for number in range(loop.steps if steps is None else steps):
            told(number)
            watched.begin(is_first=number == 0)
            with watched:
                given = loop.run(
                    model=model, batch=batch_of(number), optimizer=made, mesh=mesh, number=number
                )
            watched.now.loss, watched.now.norm = _numbers(given)
            records.append(watched.now)
    after = {name: each.detach() for name, each in bare(model).named_parameters()}
    buffers = {name: each.detach() for name, each in bare(model).named_buffers()}
    strangers = sum(id(each) not in names for each in in_groups)
    return Record(records, before, after, buffers, _states(found, names), strangers)


class _Recording(NoDropout):
    """Inside, what each backward leaves is noted; nothing is dropped."""

    def __init__(self, held: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.now = StepRecord()
        self._held = held
        self._is_first = True

    def begin(self, *, is_first: bool) -> None:
        self.now, self._is_first = StepRecord(), is_first

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.backward:
            return super().__torch_function__(func, types, args, kwargs)
        if self.now.raw is None and not self._is_first:
            self.now.kept = tuple(
                name
                for name, each in self._held.items()
                if each.grad is not None and bool(local(each.grad).any())
            )
        if self.now.raw is not None and self.now.between is None:
            self.now.between = _multiplied(self.now.raw, self._gradients())
        given = func(*args, **(kwargs or {}))
        self.now.raw = self._gradients()
        return given

    def optimizer_steps(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        if self.now.given is None:
            self.now.given = self._gradients()
        for group in optimizer.param_groups:
            numbers = {key: value for key, value in map(_number, group.items()) if value is not None}
            for each in group["params"]:
                if id(each) in names:
                    self.now.settings[names[id(each)]] = numbers

    def _gradients(self) -> Tensors:
        with torch.no_grad():
            return {
                name: None if each.grad is None else each.grad.detach().clone()
                for name, each in self._held.items()
                if each.requires_grad
            }


def _multiplied(before: Tensors, now: Tensors) -> float | None:
    """By what, where it is one number; None where they are the same."""
    product = square = off = 0.0
    for name, each in before.items():
        other = now.get(name)
        if each is not None:
            own = local(each).double()
            kept = torch.zeros_like(own) if other is None else local(other).double()
            product, square = product + float((kept * own).sum()), square + float(own.square().sum())
            off += float((kept - own).square().sum())
    return product / square if square and off > (1e-6**2) * square else None


def _number(item: tuple[str, Any]) -> tuple[str, Any]:
    """A number that the optimizer steps with; None for any other setting."""
    name, value = item
    if isinstance(value, Tensor) and value.numel() == 1:
        value = float(value)
    if isinstance(value, tuple) and all(isinstance(each, int | float) for each in value):
        return name, value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return name, value if is_number else None


def _numbers(given: Any) -> tuple[float | None, float | None]:
    """(loss, norm) of what a step returned."""
    both = given if isinstance(given, tuple | list) else (given,)
    numbers = [_float(each) for each in both[:2]]
    return numbers[0] if numbers else None, numbers[1] if len(numbers) > 1 else None


def _float(value: Any) -> float | None:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return float(value.detach()) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


def _states(found: list[torch.optim.Optimizer], names: Mapping[int, str]) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {}
    for optimizer in found:
        for parameter, state in optimizer.state.items():
            for kind, value in state.items():
                if isinstance(value, Tensor) and id(parameter) in names and value.shape == parameter.shape:
                    states.setdefault(kind, {})[names[id(parameter)]] = value
    return states
