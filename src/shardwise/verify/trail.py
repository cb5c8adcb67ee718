"""A trail through one run of a model: what each module took and gave, what came back to both, and which of
these points, and which parameters, each point is computed from.

What a module takes is marked by an identity op of its own, so that its gradient is what comes back from this
module alone, however many others take the same tensor: sharded, each of them may take a tensor of its own.
What is computed from what is read off autograd's graph, which outlives the backward.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from shardwise.parallel.stages import stage_of
from shardwise.verify.held import local

Change = Callable[[Tensor], Tensor]
NOTHING: Mapping[int, Change] = {}
Edge = tuple[Any, int]
"""An output of a node of autograd's graph."""


class Side(StrEnum):
    TAKES = "takes"
    GIVES = "gives"


@dataclass(slots=True)
class Point:
    """The first tensor that a call of a module takes or gives, and the gradient that came back to it, as this
    rank has them. call: how many calls of this module there were before. tensor: with autograd's graph."""

    module: str
    side: Side
    call: int
    value: Tensor | None = None
    gradient: Tensor | None = None
    tensor: Tensor | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[str, Side, int]:
        return self.module, self.side, self.call


class Trail:
    """Takes note of all points while it is hooked, and of what each backward gives each parameter. change:
    see observe()."""

    def __init__(self, model: nn.Module, change: Mapping[int, Change] = NOTHING) -> None:
        self.points: list[Point] = []
        self.given: dict[str, list[Tensor]] = {}
        self._parameters = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        self._change = change
        self._calls: dict[str, int] = {}
        stage = stage_of(model)
        # what a stage hands on isn't what the model gives
        self._modules = [(name, each) for name, each in model.named_modules() if name or stage is None]

    @contextmanager
    def hooked(self, is_on: Callable[[], bool]) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, module in self._modules:

                def enter(_: nn.Module, args: Any, kwargs: Any, *, name: str = name) -> Any:
                    return self._take(name, args, kwargs) if is_on() else None

                def leave(_: nn.Module, __: Any, output: object, *, name: str = name) -> None:
                    if is_on():
                        self._note(
                            Point(name, Side.GIVES, self._calls.get(name, 1) - 1), first_tensor(output)
                        )

                hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(leave))
            for name, parameter in self._parameters:
                given = self.given.setdefault(name, [])
                handle = parameter.register_hook(
                    lambda each, given=given: given.append(local(each.detach()).clone())
                )
                hooks.callback(handle.remove)
            yield

    def _take(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments with the first tensor marked."""
        point = Point(name, Side.TAKES, self._calls.get(name, 0))
        self._calls[name] = point.call + 1
        at: Any = next((at for at, each in enumerate(args) if _is_activation(each)), None)
        key = (
            next((key for key, each in kwargs.items() if _is_activation(each)), None) if at is None else None
        )
        if at is None and key is None:
            return None
        given: Tensor = args[at] if key is None else kwargs[key]
        taken = given.view_as(given)
        self._note(point, taken)
        if key is not None:
            return args, {**kwargs, key: taken}
        return (*args[:at], taken, *args[at + 1 :]), kwargs

    def _note(self, point: Point, tensor: Tensor | None) -> None:
        change = self._change.get(len(self.points))
        self.points.append(point)
        if tensor is None:
            return
        point.value, point.tensor = local(tensor.detach()).clone(), tensor

        def came_back(gradient: Tensor) -> Tensor | None:
            point.gradient = local(gradient.detach()).clone()
            return change(gradient) if change is not None else None

        if tensor.requires_grad:
            tensor.register_hook(came_back)


@dataclass(frozen=True, slots=True)
class Flow:
    """What is computed from what, by numbers of points. before: of each point, those it is computed from with
    no other in between. uses: of each parameter, the points that are computed from it so."""

    before: tuple[tuple[int, ...], ...] = ()
    uses: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def after(self) -> tuple[tuple[int, ...], ...]:
        """Of each point, those that are computed from it."""
        found: list[list[int]] = [[] for _ in self.before]
        for at, earlier in enumerate(self.before):
            for each in earlier:
                found[each].append(at)
        return tuple(map(tuple, found))


def flow(model: nn.Module, points: list[Point], micro_batches: int = 1) -> Flow:
    """Of an unsharded model's trail. Points that are one tensor are in a row, in the order of the forward. Of
    several micro-batches the last tells what parameters are used for: what is wrong is so in each."""
    by_edge: dict[Edge, list[int]] = {}
    for at, point in enumerate(points):
        edge = _edge(point.tensor)
        if edge is not None:
            by_edge.setdefault(edge, []).append(at)
    names = {accumulating(each): name for name, each in model.named_parameters() if each.requires_grad}
    before: list[tuple[int, ...]] = [()] * len(points)
    uses: dict[str, list[int]] = {}
    for (node, _), same in by_edge.items():
        for earlier, later in pairwise(same):
            before[later] = (earlier,)
        reached, parameters = _reached(node, by_edge, names)
        before[same[0]] = tuple(sorted(reached))
        for name in parameters:
            uses.setdefault(name, []).append(same[0])
    last = len(points) - len(points) // micro_batches
    of_last = {name: tuple(sorted(at for at in each if at >= last)) for name, each in uses.items()}
    return Flow(tuple(before), {name: of_last[name] or tuple(sorted(each)) for name, each in uses.items()})


def _reached(
    node: Any, by_edge: Mapping[Edge, list[int]], names: Mapping[Any, str]
) -> tuple[set[int], set[str]]:
    """Points and parameters that a node is computed from, the nearest on each way."""
    reached: set[int] = set()
    parameters: set[str] = set()
    seen, left = {node}, [node]
    while left:
        for edge in left.pop().next_functions:
            if edge[0] is None:
                continue
            if edge in by_edge:
                reached.add(by_edge[edge][-1])
            elif edge[0] in names:
                parameters.add(names[edge[0]])
            elif edge[0] not in seen:
                seen.add(edge[0])
                left.append(edge[0])
    return reached, parameters


def _edge(tensor: Tensor | None) -> Edge | None:
    return (tensor.grad_fn, tensor.output_nr) if tensor is not None and tensor.grad_fn is not None else None


def accumulating(parameter: nn.Parameter) -> Any:
    """The node of autograd's graph that takes in its gradient."""
    node: Any = parameter.view_as(parameter).grad_fn
    return node.next_functions[0][0]


def _is_activation(each: object) -> bool:
    return isinstance(each, Tensor) and each.is_floating_point()


def first_tensor(output: object) -> Tensor | None:
    """Of numbers, in whatever a module gives."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, list | tuple):
        tensors = (first_tensor(each) for each in output)
        return next((tensor for tensor in tensors if tensor is not None), None)
    return None
