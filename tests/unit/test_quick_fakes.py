"""Fakes that are made without FakeTensorMode are those that it makes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.parallel.recorder import tensors_in
from shardwise.torch_private import FakeTensor, FakeTensorMode
from shardwise.trace import quick_fakes
from shardwise.trace.quick_fakes import ELSEWHERE, fake_of, quick_fake

aten = torch.ops.aten
VIEWS = [
    (aten.view.default, [6, 4]),
    (aten.t.default,),
    (aten.transpose.int, 0, 1),
    (aten.permute.default, [1, 0]),
    (aten.unsqueeze.default, 1),
    (aten.expand.default, [3, 4, 6]),
    (aten.slice.Tensor, 1, 2, 6),
    (aten.select.int, 0, 2),
    (aten.detach.default,),
    (aten.alias.default,),
    (aten.as_strided.default, [2, 3], [6, 1], 4),
    (aten.split.Tensor, 3),
    (aten.unbind.int, 1),
]


def told(out: Any) -> list[object]:
    each: list[Tensor] = [out] if isinstance(out, Tensor) else list(out)
    return [(t.shape, t.stride(), t.dtype, t.device, t.storage_offset(), type(t)) for t in each]


@pytest.mark.parametrize("call", VIEWS, ids=lambda call: str(call[0]))
def test_views(call: tuple[Any, ...]) -> None:
    func, *rest = call
    mode = FakeTensorMode()
    with mode:
        tensor = torch.empty(4, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        expected, quick = func(tensor, *rest), quick_fake(mode, func, (tensor, *rest), {})
    assert quick is not ELSEWHERE
    assert told(quick) == told(expected)
    for each in [quick] if isinstance(quick, Tensor) else quick:
        assert isinstance(each, FakeTensor)
        assert each.untyped_storage()._cdata == tensor.untyped_storage()._cdata


def test_what_only_writes_into_what_it_takes_gives_nothing() -> None:
    mode = FakeTensorMode()
    with mode:
        tensors = [torch.empty(4, 6), torch.empty(3)]
    assert quick_fake(mode, aten._foreach_add_.Scalar, (tensors, 1.0), {}) is None
    assert quick_fake(mode, aten._foreach_add_.Scalar, ([*tensors, torch.ones(3)], 1.0), {}) is ELSEWHERE


def test_all_else_is_left_to_pytorch() -> None:
    mode = FakeTensorMode()
    with mode:
        tensor = torch.empty(4, 6)
        known = torch.tensor(1.0)
    assert isinstance(known, FakeTensor)
    assert known.constant is not None
    assert quick_fake(mode, aten.mul.Tensor, (tensor, tensor), {}) is ELSEWHERE
    assert quick_fake(mode, aten.to.dtype, (tensor, torch.float32), {}) is ELSEWHERE  # may be no view
    assert quick_fake(mode, aten.view.default, (torch.ones(4, 6), [24]), {}) is ELSEWHERE
    assert quick_fake(mode, aten.view.default, (known, [1]), {}) is ELSEWHERE
    assert quick_fake(FakeTensorMode(), aten.view.default, (tensor, [24]), {}) is ELSEWHERE


Made = Callable[[], tuple[Any, ...]]
OPS: list[tuple[Any, Made]] = [
    (aten.mm.default, lambda: (empty(4, 6), empty(6, 5))),
    (aten.mul.Tensor, lambda: (empty(4, 6).t(), empty(6, 1))),
    (aten.add.Tensor, lambda: (empty(4, 6), empty(6, dtype=torch.float32))),
    (aten.cat.default, lambda: ([empty(4, 6), empty(2, 6)],)),
    (aten._to_copy.default, lambda: (empty(4, 6),)),
    (aten.native_layer_norm.default, lambda: (empty(4, 6), [6], None, None, 1e-5)),
    (aten._unsafe_view.default, lambda: (empty(4, 6), [2, 12])),
    (aten._unsafe_view.default, lambda: (empty(8, 6)[4:], [2, 12])),
    (aten.copy_.default, lambda: (empty(4, 6), empty(6))),
    (aten.mul_.Scalar, lambda: (empty(4, 6), 2.0)),
]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("func", "made"), OPS, ids=[f"{number} {func}" for number, (func, _) in enumerate(OPS)]
)
def test_what_was_given_once_is_given_again(func: Any, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_fakes, "_given", {})
    for mode in (FakeTensorMode(), FakeTensorMode()):  # the second is told by what the first gave
        with mode, torch.no_grad():
            args = made()
            expected, told_again = func(*args), fake_of(mode, func, args, {})
        assert told(told_again) == told(expected)
        outs = (
            [(told_again, expected)]
            if isinstance(expected, Tensor)
            else zip(told_again, expected, strict=True)
        )
        for out, right in outs:
            assert out.untyped_storage().nbytes() == right.untyped_storage().nbytes()
            aliased = [
                each.untyped_storage()._cdata == out.untyped_storage()._cdata for each in tensors_in(args)
            ]
            assert aliased == [
                each.untyped_storage()._cdata == right.untyped_storage()._cdata for each in tensors_in(args)
            ]
    assert len(quick_fakes._given) == 1


def test_a_shape_that_was_seen_is_where_its_own_argument_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_fakes, "_given", {})
    mode, func = FakeTensorMode(), aten._unsafe_view.default
    with mode:
        whole, part = empty(4, 6), empty(8, 6)[4:]
        outs = [fake_of(mode, func, (each, [24]), {}) for each in (whole, part)]
    assert len(quick_fakes._given) == 1
    assert [out.storage_offset() for out in outs] == [0, 24]
    assert outs[1].untyped_storage()._cdata == part.untyped_storage()._cdata


def test_what_decides_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_fakes, "_given", {})
    mode = FakeTensorMode()
    with mode:
        whole = torch.empty(3, dtype=torch.int64)
        dtypes = [fake_of(mode, aten.mul.Tensor, (whole, by), {}).dtype for by in (1, 1.0, True)]
        monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
        fake_of(mode, aten.mul.Tensor, (whole, 1.0), {})
    assert dtypes == [torch.int64, torch.float32, torch.int64]
    assert len(quick_fakes._given) == 4


def test_what_fails_fails_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_fakes, "_given", {})
    mode = FakeTensorMode()
    with mode:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                fake_of(mode, aten.copy_.default, (empty(4, 6), empty(5)), {})
    assert not quick_fakes._given
