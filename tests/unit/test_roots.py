"""Where a run begins to go wrong, on invented trails: what is wrong though all that it is computed from is
right."""

import pytest
import torch
from torch import Tensor, nn

from shardwise.verify.observe import observe
from shardwise.verify.relation import Related, Relation
from shardwise.verify.roots import Roots, Seen
from shardwise.verify.trail import Flow, Side, flow

RIGHT, PART = Related(Relation.WHOLE, 0.0), Related(Relation.PARTS, 0.5)
UNEQUAL, TWICE = Related(Relation.UNEQUAL, 0.5), Related(Relation.MULTIPLE, 1.0, factor=2.0)


def chain(*gradients: Related | None, values: tuple[Related | None, ...] = ()) -> Roots:
    """Modules a, b, c, ... one after the other, each with a weight."""
    seen = [
        Seen(name, Side.GIVES, values[at] if values else RIGHT, gradient)
        for at, (name, gradient) in enumerate(zip("abcdef", gradients, strict=False))
    ]
    before = tuple((at - 1,) if at else () for at in range(len(seen)))
    uses = {f"{each.module}.weight": (at,) for at, each in enumerate(seen)}
    return Roots(seen, Flow(before, uses), lambda at, parts: True)


def test_a_gradient_that_is_wrong_though_what_comes_to_its_module_is_right_is_a_source_itself() -> None:
    source = chain(UNEQUAL, RIGHT, RIGHT).source("b.weight", TWICE)
    assert (source.points, set(source.right)) == ((), {1})


def test_a_gradient_comes_from_the_wrong_point_nearest_to_the_loss() -> None:
    roots = chain(UNEQUAL, UNEQUAL, TWICE, RIGHT)
    assert roots.source("a.weight", UNEQUAL).points == (2,)
    assert roots.source("a.weight", UNEQUAL).right == {3}


def test_what_cannot_be_compared_is_looked_through() -> None:
    assert chain(UNEQUAL, None, TWICE, None, RIGHT).source("a.weight", UNEQUAL).points == (2,)
    assert chain(UNEQUAL, None, TWICE, None, RIGHT).source("a.weight", UNEQUAL).right == {4}


def test_parts_that_are_summed_are_no_source_and_parts_that_are_not_are_from_where_they_begin() -> None:
    assert chain(RIGHT, PART, PART, RIGHT).source("a.weight", TWICE).points == ()
    source = chain(UNEQUAL, PART, PART, RIGHT).source("a.weight", UNEQUAL)
    assert (source.points, source.are_parts) == ((2,), True)


def test_what_one_fault_makes_a_multiple_has_the_same_fault_between_the_same_points() -> None:
    roots = chain(TWICE, None, RIGHT)
    of_weight, of_point = roots.source("b.weight", TWICE), roots.source("a.weight", TWICE)
    assert of_weight.right == of_point.right == {2}
    assert of_weight.fault == of_point.fault == 2.0


def test_values_begin_to_be_wrong_where_what_they_are_made_of_is_right() -> None:
    roots = chain(*[None] * 4, values=(RIGHT, None, UNEQUAL, UNEQUAL))
    assert roots.first_wrong == 2
    assert roots.made_of(2) == [0]


class Branches(nn.Module):
    """A norm that two layers take, one of them by a name."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(8, 4), nn.LayerNorm(4)
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        both: Tensor = self.other(input=x) + self.other(self.one(x).tanh())
        return both


@pytest.fixture(scope="module")
def branches() -> tuple[list[tuple[str, Side, int]], Flow, list[Tensor | None]]:
    torch.manual_seed(0)
    model = Branches()
    ids = torch.arange(8).view(2, 4)
    points = observe(model, (ids, ids), trail=True).points
    return [point.key for point in points], flow(model, points), [point.gradient for point in points]


def test_a_trail_tells_what_is_computed_from_what(
    branches: tuple[list[tuple[str, Side, int]], Flow, list[Tensor | None]],
) -> None:
    keys, found, _ = branches

    def at(module: str, side: Side, call: int = 0) -> int:
        return keys.index((module, side, call))

    norm = at("norm", Side.GIVES)
    assert found.before[norm] == (at("norm", Side.TAKES),)
    assert found.before[at("other", Side.TAKES)] == (norm,)
    assert found.before[at("one", Side.TAKES)] == (norm,)
    assert found.before[at("other", Side.TAKES, 1)] == (at("one", Side.GIVES),)
    assert found.before[at("", Side.GIVES)] == (at("other", Side.GIVES), at("other", Side.GIVES, 1))
    assert found.uses["other.weight"] == (at("other", Side.GIVES), at("other", Side.GIVES, 1))
    assert found.uses["norm.bias"] == (norm,)


def test_what_comes_back_from_one_of_several_modules_is_told_by_itself(
    branches: tuple[list[tuple[str, Side, int]], Flow, list[Tensor | None]],
) -> None:
    keys, _, gradients = branches
    of_both = gradients[keys.index(("norm", Side.GIVES, 0))]
    of_each = [gradients[keys.index((name, Side.TAKES, 0))] for name in ("one", "other")]
    assert of_both is not None
    assert of_each[0] is not None
    assert of_each[1] is not None
    torch.testing.assert_close(of_both, of_each[0] + of_each[1])
