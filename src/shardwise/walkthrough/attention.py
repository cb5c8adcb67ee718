"""The scene of attention over a sequence that ranks share: on a ring, keys and values go round, and each
rank's queries meet those that it has. The attention is parallel/context's own.

Every query looks at all keys that it may see alike, so what comes is the mean of their values, which people
can check. A token's numbers are its key and its value; both travel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import scaled_dot_product_attention

from shardwise.core.batch_part import part_of_batch
from shardwise.core.collective import Origin
from shardwise.core.mesh import CONTEXT_AXIS, Mesh
from shardwise.core.placement import Partial, Replicate, Shard
from shardwise.core.walkthrough import Content, Held, Matrix, Phase, Role, Row, Sizes, Step, StepKind
from shardwise.parallel.axis import Axis
from shardwise.parallel.context.asked import Asked
from shardwise.parallel.context.blocks import block_of
from shardwise.parallel.context.ring import ring_attention
from shardwise.walkthrough.scene import Block, Recorded, Steps, matrix, rows_of
from shardwise.walkthrough.subject import Subject
from shardwise.walkthrough.thread_ranks import Exchanged, on_threads
from shardwise.walkthrough.toy import DTYPE

NUMBERS = 2
FORWARD, BACKWARD = Phase.FORWARD, Phase.BACKWARD


def attend(x: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """[S, key and value] -> [S, 1]: causal, one head; over the mesh's ranks, or all in one."""
    key, value = (x[None, None, :, at : at + 1] for at in range(NUMBERS))
    if mesh is None:
        return scaled_dot_product_attention(0 * key, key, value, is_causal=True)[0, 0]
    origin = Origin("attention", None, Shard(2), Replicate())
    asked = Asked(Axis.of(mesh, CONTEXT_AXIS), origin, 1.0, True, None)
    return ring_attention(0 * key, key, value, asked)[0, 0]


@dataclass(slots=True)
class Run:
    """One rank's, or the whole module's."""

    output: Tensor
    input_gradient: Tensor
    forward: Sequence[Exchanged]
    log: Sequence[Exchanged]


def record(about: Subject, ranks: int) -> Recorded:
    tokens = 2 * ranks
    numbers = torch.arange(1, tokens + 1, dtype=DTYPE)
    x = torch.stack((numbers, 10 * numbers), 1)
    given = 12 * numbers.unsqueeze(1)

    def run(own: Sequence[int], mesh: DeviceMesh | None, log: list[Exchanged]) -> Run:
        mine = x[list(own)].clone().requires_grad_()
        out = attend(mine, mesh)
        forward = list(log)
        out.backward(given[list(own)])
        assert mine.grad is not None
        return Run(out.detach(), mine.grad, forward, log)

    whole = run(range(tokens), None, [])
    runs = on_threads(ranks, lambda rank, mesh, log: run(_tokens_of(rank, ranks), mesh, log))
    sizes = Sizes(ranks, 1, tokens, NUMBERS, x.element_size())
    held = [
        Held(rank, (2, NUMBERS), 2 * NUMBERS * x.element_size(), tuple(each.input_gradient.shape),
             each.input_gradient.nbytes)
        for rank, each in enumerate(runs)
    ]  # fmt: skip
    return Recorded(sizes, tuple(_Scene(whole, runs, x, given).steps()), tuple(held))


class _Scene:
    def __init__(self, whole: Run, runs: Sequence[Run], x: Tensor, given: Tensor) -> None:
        self.whole, self.runs, self.x, self.given = whole, runs, x, given
        self.n = len(runs)

    def steps(self) -> list[Step]:
        steps = Steps([run.log for run in self.runs])
        steps.hold(FORWARD, StepKind.INPUT, lambda rank: self._tokens(Content.INPUT, self.x, rank))
        steps.hold(FORWARD, StepKind.ROUTE, self._meets)
        turns = len(self.runs[0].forward)
        for turn in range(turns):
            steps.exchange(FORWARD, "keys", turn, self._held_in(turn), turn + 1)
        steps.compare(FORWARD, StepKind.RESULT, self._output, self._parts("output"))
        steps.hold(
            BACKWARD,
            StepKind.GRADIENT_IN,
            lambda rank: self._tokens(Content.OUTPUT_GRADIENT, self.given, rank),
        )
        keys = gradients = 0
        for number in range(turns, len(self.runs[0].log)):
            if self.runs[0].log[number].origin.before == Partial():
                gradients += 1
                steps.exchange(BACKWARD, "gradients", number, self._held_in(gradients), gradients)
            else:
                keys += 1
                steps.exchange(BACKWARD, "keys", number, self._held_in(keys - 1), keys)
        steps.compare(BACKWARD, StepKind.INPUT_GRADIENT, self._input_gradient, self._parts("input_gradient"))
        return steps.made

    def _own(self, rank: int | None) -> Sequence[int]:
        return range(2 * self.n) if rank is None else _tokens_of(rank, self.n)

    def _tokens(self, content: Content, values: Tensor, rank: int) -> Matrix:
        own = self._own(rank)
        return matrix(content, values[list(own)], Role.GIVEN, tokens=own, owners=[rank] * len(own))

    def _meets(self, rank: int) -> Matrix:
        """In which turn a token's query meets each token's key; none where it mayn't see it."""
        own = self._own(rank)
        values: list[list[float | None]] = [[None] * (2 * self.n) for _ in own]
        for turn in range(self.n):
            source = (rank - turn) % self.n
            block, theirs = block_of(rank, source, len(own), is_causal=True), self._own(source)
            for query in range(len(own))[block.queries]:
                for key in range(len(theirs))[block.keys]:
                    if theirs[key] <= own[query]:
                        values[query][theirs[key]] = float(turn + 1)
        rows = tuple(Row(tuple(row), Role.OWN, token) for row, token in zip(values, own, strict=True))
        return Matrix(Content.MEETS, tuple(range(2 * self.n)), rows)

    def _held_in(self, turn: int) -> Block:
        """What goes from a rank after so many turns: the tokens of the rank that many places before it."""

        def block(source: int, destination: int, sent: Tensor) -> tuple[list[Row], Sequence[int]]:
            tokens = self._own((source - turn) % self.n)
            return rows_of(sent.reshape(-1, NUMBERS), tokens), range(NUMBERS)

        return block

    def _output(self, rank: int | None) -> Matrix:
        run = self.whole if rank is None else self.runs[rank]
        return matrix(Content.OUTPUT, run.output, Role.OWN, tokens=self._own(rank))

    def _input_gradient(self, rank: int | None) -> Matrix:
        run = self.whole if rank is None else self.runs[rank]
        return matrix(Content.INPUT_GRADIENT, run.input_gradient, Role.SUMMED, tokens=self._own(rank))

    def _parts(self, name: str) -> list[tuple[Tensor, Tensor]]:
        whole: Tensor = getattr(self.whole, name)
        return [(getattr(run, name), whole[list(self._own(rank))]) for rank, run in enumerate(self.runs)]


def _tokens_of(rank: int, ranks: int) -> list[int]:
    """Head-tail: a token of the first half and its mirror of the second."""
    part = part_of_batch(Mesh(((CONTEXT_AXIS, ranks),)), rank)
    return list(part.positions(2 * ranks))
