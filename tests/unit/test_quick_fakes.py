"""Fakes that are made without FakeTensorMode are those that it makes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.torch_private import FakeTensor, FakeTensorMode
from shardwise.trace.quick_fakes import ELSEWHERE, quick_fake

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
