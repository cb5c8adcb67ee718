"""The scene of a mixture's experts, shared out over ranks: the style runs for real, and each token travels to
the rank that holds its expert, and back.

Suffixes: N a rank's tokens, E experts, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.walkthrough import Content, Held, Matrix, Phase, Role, Row, Sizes, Step, StepKind
from shardwise.parallel.apply import parallelize
from shardwise.walkthrough.run import plan_of
from shardwise.walkthrough.scene import Recorded, Steps, matrix, rows_of
from shardwise.walkthrough.subject import Subject
from shardwise.walkthrough.thread_ranks import Exchanged, on_threads
from shardwise.walkthrough.toy import DTYPE

HIDDEN, TOKENS, EXPERTS = 2, 3, 2
# the router's: one rank's experts are asked for by most tokens, and one expert by none
CHOICES = (3, 0, 3, 1, 2, 3, 5, 0, 3, 7, 4, 5)
FORWARD, BACKWARD = Phase.FORWARD, Phase.BACKWARD


class Experts(nn.Module):
    """Expert e multiplies a token by its row of numbers: 10 (e + 1), 10 (e + 1) + 1."""

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        first = 10 * torch.arange(1, n_experts + 1, dtype=DTYPE).unsqueeze(1)
        self.scale = nn.Parameter(first + torch.arange(HIDDEN, dtype=DTYPE))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        made_NKH = hidden.unsqueeze(1) * self.scale[top_k_index] * top_k_weights.unsqueeze(-1)
        return made_NKH.sum(1)


@dataclass(slots=True)
class Run:
    """One rank's, or the whole module's."""

    scale: Tensor
    output: Tensor
    input_gradient: Tensor
    gradient: Tensor
    log: Sequence[Exchanged]


def record(about: Subject, ranks: int) -> Recorded:
    tokens = TOKENS * ranks
    hidden = torch.arange(1, tokens + 1, dtype=DTYPE).unsqueeze(1).expand(tokens, HIDDEN).contiguous()
    given = 10 * torch.arange(1, tokens + 1, dtype=DTYPE).unsqueeze(1) + torch.arange(HIDDEN, dtype=DTYPE)
    choices = torch.tensor(CHOICES[:tokens]).unsqueeze(1)

    def run(part: slice, mesh: DeviceMesh | None, log: Sequence[Exchanged]) -> Run:
        model = nn.ModuleDict({"module": Experts(EXPERTS * ranks)})
        if mesh is not None:
            parallelize(model, plan_of(about), mesh)
        x = hidden[part].clone().requires_grad_()
        out = model["module"](x, choices[part], torch.ones(len(x), 1, dtype=DTYPE))
        out.backward(given[part])
        scale = model["module"].get_parameter("scale")
        gradient = scale.grad
        assert gradient is not None
        assert x.grad is not None
        return Run(_local(scale).detach(), out.detach(), x.grad, _local(gradient), log)

    whole = run(slice(0, tokens), None, [])
    runs = on_threads(ranks, lambda rank, mesh, log: run(_own(rank), mesh, log))
    sizes = Sizes(ranks, 1, tokens, HIDDEN, hidden.element_size(), experts=EXPERTS * ranks)
    held = [
        Held(
            rank, tuple(each.scale.shape), each.scale.nbytes, tuple(each.gradient.shape), each.gradient.nbytes
        )
        for rank, each in enumerate(runs)
    ]
    return Recorded(sizes, tuple(_Scene(whole, runs, hidden, given).steps()), tuple(held))


class _Scene:
    def __init__(self, whole: Run, runs: Sequence[Run], hidden: Tensor, given: Tensor) -> None:
        self.whole, self.runs, self.hidden, self.given = whole, runs, hidden, given
        self.all = range(TOKENS * len(runs))

    def steps(self) -> list[Step]:
        steps = Steps([run.log for run in self.runs])
        steps.hold(FORWARD, StepKind.CUT, self._experts)
        steps.hold(FORWARD, StepKind.INPUT, lambda rank: self._tokens(Content.INPUT, self.hidden, rank))
        steps.exchange(FORWARD, "counts", 0, self._counts)
        steps.exchange(FORWARD, "there", 1, self._there)
        steps.hold(FORWARD, StepKind.COMPUTE, self._made)
        steps.exchange(FORWARD, "back", 2, self._back)
        steps.compare(FORWARD, StepKind.RESULT, self._output, self._parts("output"))
        steps.hold(
            BACKWARD,
            StepKind.GRADIENT_IN,
            lambda rank: self._tokens(Content.OUTPUT_GRADIENT, self.given, rank),
        )
        steps.exchange(BACKWARD, "there", 3, self._there)
        steps.compare(BACKWARD, StepKind.GRADIENT, self._gradient, self._of_experts())
        steps.exchange(BACKWARD, "back", 4, self._back)
        steps.compare(BACKWARD, StepKind.INPUT_GRADIENT, self._input_gradient, self._parts("input_gradient"))
        return steps.made

    def _experts(self, rank: int) -> Matrix:
        own = _experts_of(rank)
        return matrix(Content.PARAMETER, self.runs[rank].scale, Role.OWN, items=own, owners=[rank] * len(own))

    def _tokens(self, content: Content, values: Tensor, rank: int) -> Matrix:
        tokens = self.all[_own(rank)]
        experts = [CHOICES[token] for token in tokens]
        owners = [expert // EXPERTS for expert in experts]
        return matrix(content, values[_own(rank)], Role.GIVEN, tokens=tokens, items=experts, owners=owners)

    def _counts(self, source: int, destination: int, block: Tensor) -> tuple[list[Row], Sequence[int]]:
        return [Row(tuple(map(float, block.tolist())), Role.OWN)], _experts_of(destination)

    def _there(self, source: int, destination: int, block: Tensor) -> tuple[list[Row], Sequence[int]]:
        return self._travelling(source, destination, block)

    def _back(self, source: int, destination: int, block: Tensor) -> tuple[list[Row], Sequence[int]]:
        return self._travelling(destination, source, block)

    def _travelling(self, asker: int, owner: int, block: Tensor) -> tuple[list[Row], Sequence[int]]:
        """Tokens of the asker, whose experts the owner holds: by expert."""
        own = (token for token in self.all[_own(asker)] if CHOICES[token] // EXPERTS == owner)
        tokens = sorted(own, key=lambda token: CHOICES[token])
        return rows_of(block, tokens, [CHOICES[token] for token in tokens]), range(HIDDEN)

    def _made(self, rank: int) -> Matrix:
        sent = self.runs[rank].log[2].sent
        rows = [row for asker, block in enumerate(sent) for row in self._travelling(asker, rank, block)[0]]
        return Matrix(Content.MADE, tuple(range(HIDDEN)), tuple(rows))

    def _output(self, rank: int | None) -> Matrix:
        run = self.whole if rank is None else self.runs[rank]
        tokens = self.all if rank is None else self.all[_own(rank)]
        return matrix(Content.OUTPUT, run.output, Role.OWN, tokens=tokens)

    def _input_gradient(self, rank: int | None) -> Matrix:
        run = self.whole if rank is None else self.runs[rank]
        tokens = self.all if rank is None else self.all[_own(rank)]
        return matrix(Content.INPUT_GRADIENT, run.input_gradient, Role.OWN, tokens=tokens)

    def _gradient(self, rank: int | None) -> Matrix:
        run = self.whole if rank is None else self.runs[rank]
        items = range(EXPERTS * len(self.runs)) if rank is None else _experts_of(rank)
        owners = [item // EXPERTS for item in items]
        return matrix(Content.GRADIENT, run.gradient, Role.OWN, items=items, owners=owners)

    def _parts(self, name: str) -> list[tuple[Tensor, Tensor]]:
        whole: Tensor = getattr(self.whole, name)
        return [(getattr(run, name), whole[_own(rank)]) for rank, run in enumerate(self.runs)]

    def _of_experts(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (run.gradient, self.whole.gradient[list(_experts_of(rank))]) for rank, run in enumerate(self.runs)
        ]


def _own(rank: int) -> slice:
    return slice(rank * TOKENS, (rank + 1) * TOKENS)


def _experts_of(rank: int) -> range:
    return range(rank * EXPERTS, (rank + 1) * EXPERTS)


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
