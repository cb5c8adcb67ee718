"""Sizes that know where they come from: an integer that a forward reads (a module's attribute, a number of
its configuration, a tensor's shape) and what Python computes from it.

A forward that writes `view(batch, length, self.num_heads, -1)` fails, or is silently wrong, where a rank has
half the heads. So while a model is traced its integers are Sizes: an int that carries the expression it came
from, which can be worked out anew for a rank's part.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Attribute:
    """An integer that a module holds, or an object of the module's (`config.num_attention_heads`)."""

    module: str
    name: str
    value: int


@dataclass(frozen=True, slots=True)
class Length:
    """The size of one dim of a tensor of the trace, by the tensor's number. at: the event that came next when
    it was asked for."""

    tensor: int
    dim: int
    at: int = 0


@dataclass(frozen=True, slots=True)
class Computed:
    """What Python made of two of them."""

    what: Callable[[int, int], int]
    first: "Expression"
    second: "Expression"


Expression = int | Attribute | Length | Computed


class Size(int):
    """An int with the expression that it came from."""

    expression: Expression

    @classmethod
    def of(cls, value: int, expression: Expression) -> "Size":
        size = cls(value)
        size.expression = expression
        return size

    def _with(self, other: Any, what: Callable[[Any, Any], Any], *, turned: bool = False) -> Any:
        first, second = (other, self) if turned else (self, other)
        value = what(int(first), int(second)) if isinstance(other, int) else NotImplemented
        if value is NotImplemented:
            return value
        return Size.of(value, Computed(what, expression_of(first), expression_of(second)))

    def __add__(self, other: Any) -> Any:
        return self._with(other, operator.add)

    def __radd__(self, other: Any) -> Any:
        return self._with(other, operator.add, turned=True)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, operator.sub)

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, operator.sub, turned=True)

    def __mul__(self, other: Any) -> Any:
        return self._with(other, operator.mul)

    def __rmul__(self, other: Any) -> Any:
        return self._with(other, operator.mul, turned=True)

    def __floordiv__(self, other: Any) -> Any:
        return self._with(other, operator.floordiv)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with(other, operator.floordiv, turned=True)

    def __mod__(self, other: Any) -> Any:
        return self._with(other, operator.mod)

    def __neg__(self) -> Any:
        return self._with(-1, operator.mul)


def expression_of(size: int) -> Expression:
    return size.expression if isinstance(size, Size) else int(size)


def evaluate(expression: Expression, value_of: Callable[[Attribute | Length], int]) -> int:
    """What an expression is where attributes and lengths are what `value_of` says."""
    match expression:
        case int():
            return expression
        case Computed(what, first, second):
            return what(evaluate(first, value_of), evaluate(second, value_of))
    return value_of(expression)


def attributes_in(expression: Expression) -> Iterator[Attribute]:
    return (known for known in _read_in(expression) if isinstance(known, Attribute))


def lengths_in(expression: Expression) -> Iterator[Length]:
    return (known for known in _read_in(expression) if isinstance(known, Length))


def _read_in(expression: Expression) -> Iterator[Attribute | Length]:
    """What an expression was computed from."""
    match expression:
        case Attribute() | Length():
            yield expression
        case Computed(_, first, second):
            yield from _read_in(first)
            yield from _read_in(second)


@contextmanager
def tagged(model: nn.Module) -> Iterator[None]:
    """Integers that the model's modules hold are Sizes inside. What torch's own modules hold is left alone:
    it is read by C++ alone or says what their weights say too."""
    restored: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, module in model.named_modules():
            held = vars(module)
            for key, value in list(held.items()):
                tag = _tagged(value, name, key)
                if tag is not None:
                    restored.append((held, key, value))
                    held[key] = tag
        yield
    finally:
        for held, key, value in reversed(restored):
            held[key] = value


def _tagged(value: Any, module: str, key: str) -> Any:
    """What stands for an attribute's value in the trace; None where it stays."""
    if type(value) is int:
        return Size.of(value, Attribute(module, key, value))
    if type(value) in (list, tuple) and value and all(type(each) is int for each in value):
        return type(value)(
            Size.of(each, Attribute(module, f"{key}[{at}]", each)) for at, each in enumerate(value)
        )
    if _is_configuration(value):
        kind: Any = type(value)
        try:
            copied = kind.__new__(kind)
        except TypeError:
            return None  # it can't be made without what it holds
        copied.__dict__.update(value.__dict__)
        for inner, number in vars(value).items():
            tag = _tagged(number, module, f"{key}.{inner}") if type(number) in (int, list) else None
            if tag is not None:
                copied.__dict__[inner] = tag
        return copied
    return None


def _is_configuration(value: Any) -> bool:
    """A plain object that holds numbers beside others: no module, tensor, function or container."""
    return (
        not isinstance(value, nn.Module | type)
        and hasattr(value, "__dict__")
        and type(value).__module__ not in ("builtins", "torch")
        and not callable(value)
        and any(type(each) is int for each in vars(value).values())
    )
