"""watch(): hashes what ranks must hold alike, every so many steps of a real run, and says what differs first.

A check comes before the forward, when nothing of the step has begun: FSDP holds its shards, the optimizer is
done. It costs a reading of what is replicated and one all-gather of a few numbers. On a GPU nothing waits:
what a check found is read as the next step begins. The first check is read at once.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.core.drift import Drift, Held
from shardwise.core.errors import DriftError, ModelError, OptionError
from shardwise.core.plan import Engine
from shardwise.parallel.apply import applied_to
from shardwise.parallel.dropout import may_drop
from shardwise.torch_private import in_backward, tree_flatten
from shardwise.watch.alike import Alike, Layout, Replicated, plain_part
from shardwise.watch.digest import digest
from shardwise.watch.exchange import Exchange, Gathered, Item

OnDifference = Literal["raise", "warn"] | Callable[[Drift], object]


def watch(
    model: nn.Module,
    *,
    every: int = 100,
    mesh: DeviceMesh | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    replicated: Replicated = None,
    same_input: str | Sequence[str] | None = None,
    random: bool | None = None,
    on_difference: OnDifference = "raise",
) -> "Sentinel":
    """Watches a model that trains on several ranks: at the first step, and then every so many, it compares
    over the ranks what they must hold alike, and names what differs first: replicated weights and buffers,
    the input, and the random state where dropout must agree.

    Call it on all ranks, last of all that replaces parameters (DTensor, FSDP2, DDP, parallelize()). It hooks
    itself onto the model, and lets go at close() or at the end of a `with`.

    every: steps from check to check. A step is a training forward; with an `optimizer`, its step.
    mesh: all axes of the run; by default the mesh of the model's DTensors, DDP's group, or all ranks.
    replicated: axes along which what is no DTensor is held alike, or a function from a parameter's name to
    them; by default all but a pipeline's. same_input: axes whose ranks get the same input; by default those
    along which tensors are cut that the forward computes with, as tp's. random: whether ranks along
    same_input must draw alike; by default where the model has dropout that is on and no native plan sees to
    it.
    on_difference: "raise" raises DriftError, on all ranks that are compared; "warn" warns, of each thing
    once; a function is given the Drift.

    Raises MeshError for axes that the mesh hasn't, OptionError for no process group.
    """
    if not dist.is_initialized():
        raise OptionError(
            "watch: there is no process group, so there are no ranks to compare. Call "
            "torch.distributed.init_process_group() first."
        )
    if every < 1:
        raise OptionError(f"watch: every={every} is no number of steps. Use 1 or more.")
    layout = Layout(model, mesh, replicated, same_input)
    return Sentinel(model, layout, every, optimizer, random, on_difference)


class Sentinel:
    """What watch() gives: close() ends it, as the end of a `with` does; check() checks now."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        every: int,
        optimizer: torch.optim.Optimizer | None,
        random: bool | None,
        on_difference: OnDifference,
    ) -> None:
        self._model, self._layout, self._every = model, layout, every
        self._on_difference = on_difference
        self._weights = dict(model.named_parameters())
        self._written: frozenset[str] | None = None
        self._before: dict[str, int] = {}
        self._steps, self._checked = 0, -1
        self._told: set[tuple[Held, str]] = set()
        self._pending: Gathered | None = None
        native = (plan := applied_to(model).plan) is not None and plan.engine is Engine.NATIVE
        self._random = may_drop(model) and not native if random is None else random
        self._device = next((plain_part(each).device for each in self._weights.values()), torch.device("cpu"))
        self._exchange = Exchange(set(self._all_alike()), self._device)
        before = torch.compiler.disable(self._before_forward)
        after = torch.compiler.disable(self._after_forward)
        # before FSDP's own, which makes parameters whole
        self._hooks: list[Any] = [
            model.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            model.register_forward_hook(after),
        ]
        self._counts_forwards = optimizer is None
        if optimizer is not None:
            self._hooks.append(optimizer.register_step_post_hook(self._count))

    @property
    def steps(self) -> int:
        """Those that have begun."""
        return self._steps

    def check(self, *inputs: Tensor) -> None:
        """Checks now, whatever the step, and reads what was found. All ranks call it."""
        self._read()
        self._begin(inputs, {})
        self._read()

    def hashed(self) -> list[Tensor]:
        """This rank's parts of the weights and buffers that a check reads."""
        return [plain_part(tensor) for _, _, tensor, alike in self._held() if alike is not None]

    def close(self) -> None:
        """Reads what the last check found, and lets go of the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._read()

    def __str__(self) -> str:
        """What it compares: for a log."""
        counts = {Held.WEIGHT: 0, Held.BUFFER: 0}
        for held, _, _, alike in self._held():
            counts[held] += alike is not None
        named = [f"{n} {held}{'s' * (n != 1)}" for held, n in counts.items()]
        if self._layout.of_input() is not None:
            named += ["the input"] + ["the random state"] * self._random
        return f"watches {', '.join(named)} every {self._every} steps"

    def __enter__(self) -> "Sentinel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._pending = None  # the run's own error is the one to see
        self.close()

    # --------------------------------------------------------------------------------- when

    def _count(self, *_: object) -> None:
        self._steps += 1

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled() or in_backward():
            return
        self._read()
        if self._steps % self._every == 0 and self._checked != self._steps:
            is_first, self._checked = self._checked < 0, self._steps
            self._begin(args, kwargs)
            if is_first or self._device.type == "cpu":
                self._read()
        if self._written is None:
            self._before = _digests(model)
        if self._counts_forwards:
            self._steps += 1

    def _after_forward(self, model: nn.Module, *_: object) -> None:
        if self._written is None and model.training and torch.is_grad_enabled():
            # by their bits: batch_norm writes its statistics without a word to autograd
            now = _digests(model)
            self._written = frozenset(name for name, each in now.items() if self._before.get(name) != each)

    def _begin(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if not self._exchange.is_alone:
            step = self._steps + 1
            self._pending = self._exchange.begin(step, tuple(self._items(args, kwargs)))

    def _read(self) -> None:
        """What the last check found, if nobody has read it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        drift = self._exchange.end(pending)
        if drift is None:
            return
        drift = replace(drift, is_first=pending.step == 1)
        if callable(self._on_difference):
            self._on_difference(drift)
        elif self._on_difference == "raise":
            raise DriftError(str(drift))
        elif (drift.held, drift.subject) not in self._told:
            self._told.add((drift.held, drift.subject))
            warnings.warn(str(drift), stacklevel=2)

    # --------------------------------------------------------------------------------- what

    def _items(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Item]:
        given = [(str(at), each) for at, each in enumerate(args)] + list(kwargs.items())
        for name, value in given:
            tensors = [each for each in tree_flatten(value)[0] if isinstance(each, Tensor)]
            for at, tensor in enumerate(tensors):
                alike = self._layout.of_input(tensor)
                if alike is not None:
                    subject = f"{name}.{at}" if len(tensors) > 1 else name
                    yield Item(Held.INPUT, subject, alike, digest(plain_part(tensor)))
        alike = self._layout.of_input() if self._random else None
        if alike is not None:
            yield Item(Held.RANDOM, "", alike, _random_state(self._device))
        for held, name, tensor, found in self._held():
            if found is not None:
                if not self._exchange.knows(found):
                    raise ModelError(
                        f"watch: {name} is cut in another way than when watch() was called. Call it last, "
                        "after all that replaces parameters."
                    )
                yield Item(held, name, found, digest(plain_part(tensor)), isinstance(tensor, DTensor))

    def _held(self) -> Iterator[tuple[Held, str, Tensor, Alike | None]]:
        for name, buffer in self._model.named_buffers():
            if not buffer.is_meta:
                is_written = self._written is None or name in self._written
                yield Held.BUFFER, name, buffer, self._layout.of_buffer(name, buffer, is_written=is_written)
        for name, parameter in self._model.named_parameters():
            known = self._weights.get(name, parameter)
            # what FSDP has made whole for a forward is still held as its shard
            tensor = known if _is_made_whole(parameter, known) else parameter
            if not tensor.is_meta:
                yield Held.WEIGHT, name, tensor, self._layout.of_weight(name, tensor)

    def _all_alike(self) -> Iterator[Alike]:
        found = [self._layout.of_input()]
        found += [self._layout.of_weight(name, each) for name, each in self._weights.items()]
        for is_written in (True, False):
            buffers = self._model.named_buffers()
            found += [self._layout.of_buffer(name, each, is_written=is_written) for name, each in buffers]
        return (each for each in found if each is not None)


def _digests(model: nn.Module) -> dict[str, int]:
    """Of its buffers; waits for a GPU."""
    return {name: int(digest(plain_part(each))) for name, each in model.named_buffers() if not each.is_meta}


def _is_made_whole(now: Tensor, known: Tensor) -> bool:
    """Whether a parameter stands in the place of another one, which is cut over more axes."""
    axes = now.device_mesh.ndim if isinstance(now, DTensor) else 0
    return isinstance(known, DTensor) and known.device_mesh.ndim > axes


def _random_state(device: torch.device) -> Tensor:
    """Of the generators that a forward draws from; both lie on the host."""
    total = digest(torch.get_rng_state())
    if device.type == "cuda":
        total = total + digest(torch.cuda.get_rng_state(device)) * 3
    return total
