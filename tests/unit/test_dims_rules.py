"""Each op's rule against the op itself: what a rule says can be cut is cut, the op runs on each rank's parts,
and what the ranks have must be their parts of what the op gives for the whole (or parts of a sum)."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from shardwise.dims.record import Op
from shardwise.dims.rules import RULES, Call, matmul, pointwise, reduction
from shardwise.dims.views import permuted
from shardwise.torch_private import schema_of
from tests.unit.op_example import Example, Ids, Input, Mask, complaints
from tests.unit.op_examples import EXAMPLES

# no example can meet these
ELSEWHERE = {"_fused_rms_norm": "a trace is on meta tensors, where PyTorch takes it apart"}


@pytest.mark.parametrize("group", EXAMPLES)
def test_a_rank_s_part_of_the_inputs_gives_what_the_rule_says(group: str) -> None:
    for example in EXAMPLES[group]:
        names = ", ".join(op.name for op in example.traced.ops)
        assert example.traced.says() == example.says, names
        assert list(complaints(example)) == [], f"{names} {example.inputs}"


def test_every_rule_has_an_example() -> None:
    met = {op.name for group in EXAMPLES.values() for example in group for op in example.traced.record.ops}
    assert set(RULES) - met == set(ELSEWHERE)


# ---------------------------------------------------------------- ops that PyTorch calls pointwise, by schema


def overloads(tag: torch.Tag) -> Iterator[Any]:
    for name in sorted(dir(torch.ops.aten)):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else []:
            func = getattr(packet, overload)
            is_out = any(each.is_out for each in schema_of(func).arguments)
            tensors = {str(each.type) for each in schema_of(func).returns}
            if tag in func.tags and tensors == {"Tensor"} and not is_out and name not in RULES:
                yield func


def called(func: Any, make: Callable[[tuple[int, ...]], Input]) -> Example:
    """An example of an op, its tensors broadcast against each other and its numbers 1."""
    shapes, inputs, fixed = iter([(4, 6), (6,), (4, 1), (4, 6), (6,)]), list[Input](), dict[str, Any]()
    places = []
    for each in schema_of(func).arguments:
        kind = str(each.type)
        if kind in ("Tensor", "Optional[Tensor]"):
            places.append(each.name)
            inputs.append(make(next(shapes)))
        elif not each.has_default_value() or kind == "Optional[number]":
            fixed[each.name] = {"str": "none", "Optional[str]": "floor", "bool": False}.get(kind, 1)

    def run(*tensors: torch.Tensor) -> Any:
        own = dict(zip(places, tensors, strict=True))
        if schema_of(func).is_mutable:
            own[places[0]] = own[places[0]].clone()
        return func(**own, **fixed)

    return Example(run, tuple(inputs), "")


KINDS: list[Callable[[tuple[int, ...]], Input]] = [lambda shape: shape, lambda shape: Ids(shape, 5), Mask]


def test_ops_that_pytorch_calls_pointwise_are_so() -> None:
    """With floats, whole numbers or booleans, whichever they take."""
    refused, wrong, n = [], {}, 0
    for func in overloads(torch.Tag.pointwise):
        for make in KINDS:
            example = called(func, make)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    example.on_whole()
            except (RuntimeError, NotImplementedError, IndexError):
                continue
            n += 1
            found = list(complaints(example))
            if found or set(example.traced.says()) - set("f- "):
                wrong[str(func)] = (example.traced.says(), found)
            break
        else:
            refused.append(str(func))
    assert wrong == {}
    assert refused == []
    assert n > 300


# --------------------------------------------------------------------------------------- faults that are seen


def _nothing_summed(call: Call) -> None:
    matmul(call)
    call.summed.clear()


def _turned_wrongly(call: Call) -> None:
    permuted(call)
    dims = call.given[id(call.output)]
    call.give(call.output, [*dims[:-2], dims[-1], dims[-2]])


def _nothing_added(call: Call) -> None:
    matmul(call)
    call.added = None


def _linear(call: Call) -> None:
    pointwise(call)
    call.is_linear = True


@pytest.mark.parametrize(
    ("name", "wrong", "example"),
    [
        ("mm", _nothing_summed, Example(torch.mm, ((4, 6), (6, 8)), "")),
        ("addmm", _nothing_added, Example(torch.addmm, ((8,), (4, 6), (6, 8)), "")),
        ("_softmax", pointwise, Example(lambda x: x.softmax(-1), ((4, 6),), "")),
        ("cumsum", pointwise, Example(lambda x: x.cumsum(1), ((4, 6),), "")),
        ("permute", _turned_wrongly, Example(lambda x: x.permute(1, 0, 2), ((6, 4, 4),), "")),
        ("exp", _linear, Example(torch.exp, ((4, 6),), "")),
        ("relu", _linear, Example(torch.relu, ((4, 6),), "")),
        ("topk", lambda call: None, Example(lambda x: x.topk(2), ((4, 6),), "")),
        ("tril", pointwise, Example(lambda x: x.tril(), ((4, 6),), "")),
        ("index_select", pointwise, Example(lambda x, i: x.index_select(0, i), ((8, 6), Ids((8,), 8)), "")),
        ("gather", pointwise, Example(lambda x, i: x.gather(1, i), ((4, 6), Ids((4, 6), 6)), "")),
    ],
)
def test_a_wrong_rule_is_seen(
    name: str, wrong: Callable[[Call], None], example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, name, wrong)
    assert list(complaints(example))


# ------------------------------------------------------------------------------------------- what stays whole


def blocked_in(example: Example) -> dict[str, int]:
    found: dict[str, int] = {}
    for op in example.traced.ops:
        for factor, why in op.blocked:
            found[why] = found.get(why, 0) + factor.size
    return found


def test_an_op_that_nobody_described_keeps_all_its_dims_whole_by_its_name() -> None:
    example = Example(lambda x: torch.rot90(x), ((4, 6),), "bb")
    assert example.traced.record.unknown == {"rot90": 1}
    assert example.traced.says() == "bb"
    assert blocked_in(example) == {
        "nobody described what rot90 does": 10,
        "rot90 gives every rank all of it": 10,
    }


def test_what_an_op_makes_anew_can_t_be_cut() -> None:
    """Two best of six, the last window, three pictures side by side: no rank could make its part of them."""
    for run in (lambda x: x.topk(2), lambda x: x.unfold(1, 4, 2), lambda x: torch.stack([x, x, x, x])):
        example = Example(run, ((4, 6),), "")
        assert any("gives every rank all of it" in why for why in blocked_in(example))


def test_a_constant_that_a_forward_finds_is_a_table_of_positions() -> None:
    constant = torch.arange(6.0)
    example = Example(lambda x: x * constant, ((4, 6),), "ff")
    (op,) = example.traced.ops
    assert op.inputs[1].source.name == "POSITIONS"
    assert list(example.traced.free()) == [op.inputs[0].dims[0]]


def test_an_op_in_place_that_turns_a_tensor_turns_its_dims() -> None:
    example = Example(lambda x: x.clone().t_() * 1, ((4, 6),), "ff")
    ops: tuple[Op, ...] = example.traced.ops
    assert [op.outputs[0].shape for op in ops] == [(4, 6), (6, 4), (6, 4)]


def test_a_reduction_that_isn_t_a_sum_leaves_no_part_of_one() -> None:
    assert RULES["prod"] is reduction
    example = Example(lambda x: x.prod(1), ((4, 6),), "fb")
    assert example.traced.summed == frozenset()
