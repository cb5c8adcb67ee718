"""The scene of a pipeline: stages hold some layers each, and micro-batches go through them as 1F1B has it.

The stages are those of parallel/stages.py, each cut from a whole model; what runs when is what Pipeline.turns
says. In a slot every stage runs its next pass, if what it needs was made in a slot before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shardwise.core.collective import CollectiveKind
from shardwise.core.pipeline import Pipeline, Turn
from shardwise.core.walkthrough import (
    Content,
    Difference,
    Exchange,
    Held,
    Matrix,
    Panel,
    Phase,
    Role,
    Row,
    Sizes,
    Step,
    StepKind,
    Transfer,
)
from shardwise.models.layers import find_layers
from shardwise.parallel.ends import Ends
from shardwise.parallel.stages import Stage, cut_to_stage
from shardwise.walkthrough.scene import Recorded, matrix, rows_of
from shardwise.walkthrough.subject import Subject
from shardwise.walkthrough.toy import DTYPE

WIDTH, TOKENS = 2, 2
FORWARD, BACKWARD = Phase.FORWARD, Phase.BACKWARD


class Layer(nn.Module):
    """Multiplies by numbers of its own: those of layer i are i + 2, i + 3."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(index + 2 + torch.arange(WIDTH, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Model(nn.Module):
    """Ids [B, S] -> [B, S, WIDTH]; a row of the table is its id and one, in each place."""

    def __init__(self, ids: int, n_layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(ids, WIDTH, dtype=DTYPE)
        with torch.no_grad():
            self.table.weight.copy_(torch.arange(1, ids + 1, dtype=DTYPE).unsqueeze(1))
        self.layers = nn.ModuleList(Layer(index) for index in range(n_layers))

    def forward(self, ids_BS: Tensor) -> Tensor:
        x = self.table(ids_BS)
        for layer in self.layers:
            x = layer(x)
        return x  # type: ignore[no-any-return]


@dataclass(slots=True)
class Played:
    """What has happened. slots: of each pass. made, back: what a part gave for a micro-batch, and the
    gradient that it sent back. inputs: what came in, with its gradient to come."""

    slots: dict[Turn, int] = field(default_factory=dict)
    made: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    back: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)


def record(about: Subject, ranks: int) -> Recorded:
    micro_batches, pipeline = ranks, Pipeline(ranks)
    ids = torch.arange(TOKENS * micro_batches).view(micro_batches, 1, TOKENS)
    given = 1 + torch.arange(TOKENS * micro_batches, dtype=DTYPE).view(micro_batches, 1, TOKENS, 1)
    given = given.expand(-1, -1, -1, WIDTH).contiguous()
    whole = Model(ids.numel(), ranks)
    output = torch.cat([whole(each)[0] for each in ids])
    output.backward(given.flatten(0, 2))
    models = [Model(ids.numel(), ranks) for _ in range(ranks)]
    stages = [_cut(model, pipeline, rank) for rank, model in enumerate(models)]
    played = _play(pipeline, models, stages, ids, given)
    scene = _Scene(pipeline, whole, output.detach(), models, played, given)
    sizes = Sizes(ranks, 1, ids.numel(), WIDTH, output.element_size())
    held = []
    for rank in range(ranks):
        layer = scene.scale(rank)
        assert layer.grad is not None
        held.append(Held(rank, (1, WIDTH), layer.nbytes, (1, WIDTH), layer.grad.nbytes))
    return Recorded(sizes, tuple(scene.steps()), tuple(held))


def _cut(model: Model, pipeline: Pipeline, rank: int) -> Stage:
    layers = find_layers(model)
    assert layers is not None
    ends = Ends("toy", layers, ("table",), (), (("table", nn.Embedding),), WIDTH, 0)
    return cut_to_stage(model, ends, pipeline, rank, tp=1, dtype=DTYPE)


def _play(
    pipeline: Pipeline, models: Sequence[Model], stages: Sequence[Stage], ids: Tensor, given: Tensor
) -> Played:
    played, slot = Played(), 0
    left = [list(pipeline.turns(stage, len(ids))) for stage in range(pipeline.stages)]
    while any(left):
        ready = [turns[0] for turns in left if turns and _is_ready(turns[0], pipeline, played, slot)]
        for turn in ready:
            left[turn.part].pop(0)
            played.slots[turn] = slot
            if turn.backward:
                _backward(turn, pipeline, played, given)
            else:
                _forward(turn, models[turn.part], stages[turn.part], played, ids)
        slot += 1
    return played


def _is_ready(turn: Turn, pipeline: Pipeline, played: Played, slot: int) -> bool:
    if not turn.backward:
        needs = Turn(turn.part - 1, turn.micro_batch, False) if turn.part else None
    elif turn.part == pipeline.parts - 1:
        needs = Turn(turn.part, turn.micro_batch, False)
    else:
        needs = Turn(turn.part + 1, turn.micro_batch, True)
    return needs is None or played.slots.get(needs, slot) < slot


def _forward(turn: Turn, model: Model, stage: Stage, played: Played, ids: Tensor) -> None:
    received = None
    if turn.part:
        received = played.made[turn.part - 1, turn.micro_batch].detach().requires_grad_()
        played.inputs[turn.part, turn.micro_batch] = received
    played.made[turn.part, turn.micro_batch] = stage.run(model, turn.part, ids[turn.micro_batch], received)


def _backward(turn: Turn, pipeline: Pipeline, played: Played, given: Tensor) -> None:
    is_last = turn.part == pipeline.parts - 1
    came = given[turn.micro_batch] if is_last else played.back[turn.part + 1, turn.micro_batch]
    played.made[turn.part, turn.micro_batch].backward(came)
    if turn.part:
        gradient = played.inputs[turn.part, turn.micro_batch].grad
        assert gradient is not None
        played.back[turn.part, turn.micro_batch] = gradient


class _Scene:
    def __init__(
        self, pipeline: Pipeline, whole: Model, output: Tensor, models: Sequence[Model], played: Played,
        given: Tensor,
    ) -> None:  # fmt: skip
        self.pipeline, self.whole, self.output = pipeline, whole, output
        self.models, self.played, self.given = models, played, given
        self.ranks = range(pipeline.stages)
        self.last = pipeline.stages - 1

    def scale(self, rank: int) -> Tensor:
        return self.models[rank].get_parameter(f"layers.{rank}.scale")

    def steps(self) -> list[Step]:
        steps = [
            Step(StepKind.CUT, FORWARD, self._each(lambda rank: self._layer(Content.PARAMETER, rank))),
            Step(StepKind.ROUTE, FORWARD, self._each(self._lanes)),
        ]
        steps += [self._passed(FORWARD, number) for number in self.ranks]
        steps += [
            self._result(),
            Step(StepKind.GRADIENT_IN, BACKWARD, self._at_the_last(Content.OUTPUT_GRADIENT, self.given)),
        ]
        steps += [self._passed(BACKWARD, number) for number in self.ranks]
        return [*steps, self._gradients()]

    def _each(self, of: Callable[[int], Matrix]) -> tuple[Panel, ...]:
        return tuple(Panel(rank, (of(rank),)) for rank in self.ranks)

    def _layer(self, content: Content, rank: int) -> Matrix:
        values = self.scale(rank)
        return matrix(content, values.detach().unsqueeze(0), Role.OWN, items=[rank], owners=[rank])

    def _lanes(self, rank: int) -> Matrix:
        """The micro-batch of each slot, in the forward and in the backward; none where the stage waits."""
        slots = range(1 + max(self.played.slots.values()))
        rows = []
        for backward in (False, True):
            row: list[float | None] = [None for _ in slots]
            for turn, slot in self.played.slots.items():
                if (turn.part, turn.backward) == (rank, backward):
                    row[slot] = float(turn.micro_batch)
            rows.append(Row(tuple(row), Role.OWN, item=int(backward)))
        return Matrix(Content.LANES, tuple(slots), tuple(rows))

    def _passed(self, phase: Phase, number: int) -> Step:
        """What goes from stage to stage for one micro-batch."""
        passes = self.played.made if phase is FORWARD else self.played.back
        sends = self.ranks[:-1] if phase is FORWARD else self.ranks[1:]
        way = 1 if phase is FORWARD else -1
        tokens = range(TOKENS * number, TOKENS * (number + 1))
        columns = tuple(range(WIDTH))
        holds: dict[int, Matrix] = {}
        gets: dict[int, Matrix] = {}
        transfers = []
        for source in sends:
            sent, destination = passes[source, number].detach()[0], source + way
            rows = tuple(rows_of(sent, tokens))
            came = tuple(Row(row.values, Role.RECEIVED, row.token) for row in rows)
            holds[source] = Matrix(Content.SENT, columns, rows, destination)
            gets[destination] = Matrix(Content.RECEIVED, columns, came, source)
            transfers.append(Transfer(source, destination, TOKENS, 0, sent.nbytes))
        panels = [
            Panel(rank, *(tuple([found[rank]] if rank in found else []) for found in (holds, gets)))
            for rank in self.ranks
        ]
        whole = "Replicate"
        exchange = Exchange(CollectiveKind.SEND, whole, whole, tuple(transfers))
        return Step(StepKind.EXCHANGE, phase, tuple(panels), exchange, part="passed", turn=number + 1)

    def _at_the_last(self, content: Content, values: Tensor) -> tuple[Panel, ...]:
        flat = values.reshape(-1, WIDTH)
        last = matrix(content, flat, Role.OWN, tokens=range(len(flat)))
        return tuple(Panel(rank, (last,) if rank == self.last else ()) for rank in self.ranks)

    def _result(self) -> Step:
        mine = torch.cat([self.played.made[self.last, number].detach()[0] for number in self.ranks])
        right = matrix(Content.OUTPUT, self.output, Role.OWN, tokens=range(len(self.output)))
        panels = (*self._at_the_last(Content.OUTPUT, mine), Panel(None, (right,)))
        return Step(StepKind.RESULT, FORWARD, panels, difference=_difference([(mine, self.output)]))

    def _gradients(self) -> Step:
        pairs = []
        for rank in self.ranks:
            own, right = self.scale(rank).grad, self.whole.get_parameter(f"layers.{rank}.scale").grad
            assert own is not None
            assert right is not None
            pairs.append((own.unsqueeze(0), right.unsqueeze(0)))
        panels = [
            Panel(rank, (matrix(Content.GRADIENT, own, Role.SUMMED, items=[rank], owners=[rank]),))
            for rank, (own, _) in enumerate(pairs)
        ]
        whole = torch.cat([right for _, right in pairs])
        of_whole = matrix(Content.GRADIENT, whole, Role.SUMMED, items=self.ranks, owners=self.ranks)
        return Step(
            StepKind.GRADIENT, BACKWARD, (*panels, Panel(None, (of_whole,))), difference=_difference(pairs)
        )


def _difference(pairs: Sequence[tuple[Tensor, Tensor]]) -> Difference:
    """Sums of whole numbers are exact."""
    return Difference(max(float((own - right).abs().max()) for own, right in pairs), 0.0)
