"""The trace on meta tensors: what depends on no weight is computed for real, what a forward writes is taken
down with where it comes from, and nothing of a model stays changed."""

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.core.errors import ModelError
from shardwise.dims.factors import find, leaves
from shardwise.dims.record import Entered, Left, Op, Record, SizeUse, Source
from shardwise.dims.sizes import Attribute, Length, attributes_in, evaluate
from shardwise.dims.trace import record_of
from shardwise.torch_private import hook_counts

WIDTH, HEADS = 8, 4


class Model(nn.Module):
    """ids [B, S] -> logits [B, S, V], with one attention of a test's own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(16, WIDTH), inner
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids)))  # type: ignore[no-any-return]


class Masked(nn.Module):
    """Takes another way where its mask masks nothing."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if mask.all():
            return x.relu()
        if bool((mask.sum(-1) == torch.arange(1, x.shape[1] + 1, device=x.device)).all()):
            return x.sigmoid()
        return x.tanh()


class Reading(nn.Module):
    """Reads a number out of an activation, and takes a way by it."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().max() if x.abs().max() > 0 else x


class Counted(nn.Module):
    """A loop over a number that positions give."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(torch.arange(x.shape[1])[-1].item()) // 8):
            x = x.exp()
        return x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv = HEADS, nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).split(WIDTH, -1)
        k = k.view(x.shape[0], -1, self.heads, WIDTH // self.heads)
        return k.flatten(2) * v  # type: ignore[no-any-return]


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, [-2]] + x


def built(inner: nn.Module) -> Model:
    with torch.device("meta"):
        return Model(inner.to("meta"))


def traced(inner: nn.Module) -> Record:
    return record_of(built(inner), 16)


def names(record: Record) -> list[str]:
    return [op.name for op in record.ops]


def test_a_branch_on_a_mask_goes_as_in_training() -> None:
    record = traced(Masked())
    assert "sigmoid" in names(record)
    assert not {"relu", "tanh"} & set(names(record))
    assert record.guesses == []


def test_a_loop_over_a_count_that_positions_give_runs_as_often() -> None:
    record = traced(Counted())
    assert names(record).count("exp") == 23 // 8
    assert record.guesses == []


def test_a_number_read_out_of_an_activation_is_booked_as_a_guess_of_its_module() -> None:
    record = traced(Reading())
    assert record.guesses == ["inner"]
    (reading,) = (op for op in record.ops if op.name == "_local_scalar_dense")
    assert reading.inputs[0].is_live


def test_a_list_of_one_constant_takes_a_slice() -> None:
    record = traced(Last())
    assert "index" not in names(record)
    (use,) = (use for use in record.sizes if use.function == "__getitem__" and use.of is not None)
    width = evaluate(use.start, lambda _: 100)
    assert (width, evaluate(use.size, lambda _: 100)) == (98, 1)
    assert not any("taken by data" in why for op in record.ops for _, why in op.blocked)


def test_sizes_that_a_forward_writes_know_where_they_come_from() -> None:
    record = traced(Attention())
    views = [use for use in record.sizes if use.function == "view"]
    of_attributes = {attribute for use in views for attribute in attributes_in(use.size)}
    assert of_attributes == {Attribute("inner", "heads", HEADS)}
    assert any(isinstance(use.size, Length) for use in views)
    splits: list[SizeUse] = [use for use in record.sizes if use.function == "split"]
    assert [use.size for use in splits] == [WIDTH, WIDTH]
    assert [evaluate(use.start, lambda _: 0) for use in splits] == [0, WIDTH]


class Ranged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = 3

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(self.first, self.first + WIDTH, device=x.device)


def test_a_range_is_as_long_as_from_its_start_to_its_end() -> None:
    record = traced(Ranged())
    (use,) = (use for use in record.sizes if use.function == "arange")
    assert evaluate(use.size, lambda _: 100) == WIDTH


def test_ids_sequence_and_vocabulary_are_where_they_belong() -> None:
    record = traced(Attention())
    assert record.ids is not None
    assert record.logits is not None
    assert set(leaves(record.logits.dims[1])) == record.sequence
    (vocabulary,) = leaves(record.logits.dims[-1])
    assert vocabulary is find(record.parameters["head.weight"].dims[0])
    assert record.ids.source is Source.IDS
    assert record.parameters["embed.weight"].has_gradient
    assert not record.ids.has_gradient
    assert record.logits.is_live


def test_calls_of_modules_are_nested_as_they_ran() -> None:
    open_: list[str] = []
    for event in traced(Attention()).events:
        match event:
            case Entered(module):
                open_.append(module)
            case Left(module):
                assert open_.pop() == module
            case Op():
                assert event.module == open_[-1]
    assert open_ == []


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(3, 5)


class Boolean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


@pytest.mark.parametrize("inner", [Attention, Failing, Boolean])
def test_a_trace_leaves_no_hook_and_no_mode_behind(inner: type[nn.Module]) -> None:
    model = built(inner())
    before = [hook_counts(module) for module in model.modules()]
    with suppress(ModelError):
        record_of(model, 16)
    assert [hook_counts(module) for module in model.modules()] == before
    assert torch.is_grad_enabled()
    assert torch.equal(torch.ones(2).exp(), torch.ones(2).exp())
    assert isinstance(torch.ones(2).shape[0], int)
    assert type(torch.ones(2).shape[0]) is int


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        (Failing(), "its forward can't be traced without data: in inner, RuntimeError: shape '[3, 5]'"),
        (Boolean(), "its forward can't be traced without data: in inner, NotImplementedError:"),
    ],
)
def test_a_forward_that_fails_is_one_line_that_says_where(inner: nn.Module, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        traced(inner)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_a_model_that_gives_no_logits_is_told_so() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, WIDTH)

        def forward(self, ids: Tensor) -> tuple[Tensor, None]:
            return self.embed(ids), None

    with torch.device("meta"):
        model = Pair()
    with pytest.raises(ModelError, match=r"its forward gives tuple, not logits \[B, S, V\]\."):
        record_of(model, 16)


class Constants(nn.Module):
    """A table that is no buffer, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(float(WIDTH))
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table.to(x.device) * self.get_buffer("scale")


def test_a_table_that_a_module_holds_without_registering_it_is_one_of_positions() -> None:
    record = traced(Constants())
    sources = {value.source for op in record.ops if op.name in ("mul", "_to_copy") for value in op.inputs}
    assert {Source.POSITIONS, Source.BUFFER} <= sources


def test_a_trace_of_the_same_model_twice_is_the_same() -> None:
    model = built(Attention())
    first, second = record_of(model, 16), record_of(model, 16)
    assert names(first) == names(second)
    assert [[each.shape for each in op.outputs] for op in first.ops] == [
        [each.shape for each in op.outputs] for op in second.ops
    ]


class Twice(nn.Module):
    """Calls one module twice, and one parameter by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.linear(self.linear(x)), self.linear.weight) * self.scale


def test_a_module_that_is_called_twice_and_a_weight_that_is_read_by_name_are_booked_where_they_ran() -> None:
    record = traced(Twice())
    assert [event.module for event in record.events if isinstance(event, Entered)].count("inner.linear") == 2
    weight = record.parameters["inner.linear.weight"]
    users = [op.module for op in record.ops if weight in op.inputs]
    assert users == ["inner.linear", "inner.linear", "inner"]
