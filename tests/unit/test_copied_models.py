"""Models that are copied, not built again, for each trace."""

import torch
from torch import nn

from shardwise.models.layers import copied
from shardwise.models.specs import get_spec


class Holds(nn.Linear):
    """A module that keeps something of its model."""

    def __init__(self, kept: object) -> None:
        super().__init__(2, 2)
        self.kept = kept


def test_a_copy_shares_nothing_and_keeps_what_is_tied() -> None:
    model = get_spec("llama3-debug").build(dtype=torch.bfloat16)
    copy = copied(model)
    assert copy is not None
    assert str(copy) == str(model)
    shapes = [[(name, p.shape, p.dtype) for name, p in each.named_parameters()] for each in (copy, model)]
    assert shapes[0] == shapes[1]
    assert {id(p) for p in copy.parameters()}.isdisjoint(id(p) for p in model.parameters())
    tied = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tied["b"].weight = tied["a"].weight
    both = copied(tied)
    assert both is not None
    assert both.get_parameter("a.weight") is both.get_parameter("b.weight")


def test_what_may_speak_of_the_original_is_built_again() -> None:
    inner = nn.Linear(2, 2)
    hooked = nn.Sequential(nn.Linear(2, 2))
    hooked[0].register_forward_hook(lambda *_: None)
    worked_out = Holds(None)
    worked_out.kept = (worked_out.weight * 2).view(4)
    for model in (hooked, Holds(lambda x: inner(x)), worked_out):
        assert copied(model) is None
    assert copied(Holds(torch.relu)) is not None
