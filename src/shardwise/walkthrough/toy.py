"""The toys of the walk-throughs, and how they run: the module, the numbers that go in, and what each rank had: Run.

The styles are the native engine's own, by parallelize(); ranks are threads (thread_ranks.py). What goes over the wire is what the
collectives were handed; what lies between is what the styles show (parallel/watch.py); all numbers are float32. Only the numbers that
go in are chosen, so that people can recognise them: row 5 of a table is 50, 51, 52, 53.

Suffixes: T ranks, S sequence (a batch of one), H hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import skip_init

from shardwise.core.errors import RunError
from shardwise.core.placement import Shard
from shardwise.core.plan import Ownership, Plan, ReduceScatter, Rule, Style, StyleName
from shardwise.core.walkthrough import Subject
from shardwise.parallel.apply import loss_of, parallelize
from shardwise.parallel.loss import IGNORED
from shardwise.parallel.ownership import RowOwnership
from shardwise.parallel.watch import watched_by
from shardwise.walkthrough.thread_ranks import Exchanged

VOCABULARY = 8
# a word that comes twice on one rank, one that comes on two, and on every rank some of another's
IDS = (5, 2, 5, 1, 7, 2, 0, 5, 3, 6, 6, 1)
LABELS = (5, 2, IGNORED, 7, 1, 0, 4, 3)
IDS_PER_RANK = 3
TOKENS_PER_RANK = 2
DTYPE = torch.float32

_STYLES = {
    Subject.EMBEDDING_ROWWISE: Style(StyleName.ROWWISE),
    Subject.EMBEDDING_COLWISE: Style(StyleName.COLWISE),
    Subject.EMBEDDING_ROUTED: Style(StyleName.ROUTED),
    Subject.EMBEDDING_ROUTED_INTERLEAVED: Style(StyleName.ROUTED, ownership=Ownership.INTERLEAVED),
    Subject.EMBEDDING_REPLICATED: Style(StyleName.REPLICATED),
    Subject.LINEAR_COLWISE: Style(StyleName.COLWISE, input=Shard(1)),
    Subject.LINEAR_ROWWISE: Style(StyleName.ROWWISE, output=Shard(1)),
    Subject.NORM_SEQUENCE_PARALLEL: Style(StyleName.SEQUENCE_PARALLEL),
    Subject.LOSS_VOCAB_PARALLEL: Style(StyleName.COLWISE),
}


@dataclass(frozen=True, slots=True)
class Toy:
    """The module, its inputs and the gradient of its output: the numbers that are chosen."""

    subject: Subject
    ranks: int

    @property
    def kind(self) -> str:
        return self.subject.partition("/")[0]

    @property
    def is_linear(self) -> bool:
        return self.kind == "linear"

    @property
    def has_vocabulary(self) -> bool:
        return self.kind in ("embedding", "loss")

    @property
    def hidden(self) -> int:
        return 6 if self.ranks == 3 else 4

    @property
    def per_rank(self) -> int:
        return IDS_PER_RANK if self.kind == "embedding" else TOKENS_PER_RANK

    @property
    def sequence(self) -> int:
        return self.per_rank * self.ranks

    @property
    def style(self) -> Style:
        return _STYLES[self.subject]

    @property
    def ownership(self) -> RowOwnership:
        """Who owns which row of the parameter (column of the logits), where it is cut that way."""
        rows = VOCABULARY if self.has_vocabulary else self.hidden
        return RowOwnership(rows, self.ranks, self.style.ownership)

    def build(self) -> nn.ModuleDict:
        """The module under the name "module", without a look at the random numbers."""
        H, V = self.hidden, VOCABULARY
        built: nn.Module
        match self.kind:
            case "embedding":
                built = nn.Embedding.from_pretrained(_grid(V, H, row=10), freeze=False)
            case "linear":
                built = _with_weight(
                    skip_init(nn.Linear, H, H, bias=False, dtype=DTYPE), _grid(H, H, row=10, first=10)
                )
            case "norm":
                built = _with_weight(
                    nn.RMSNorm(H, eps=1e-5, dtype=DTYPE), torch.arange(1, H + 1, dtype=DTYPE)
                )
            case _:  # a head over one-hot tokens: its weight is the table of logits
                built = _with_weight(
                    skip_init(nn.Linear, self.sequence, V, bias=False, dtype=DTYPE), self._logits().T
                )
        return nn.ModuleDict({"module": built})

    def ids(self) -> Tensor:
        return torch.tensor([IDS[: self.sequence]])

    def labels(self) -> Tensor:
        return torch.tensor([LABELS[: self.sequence]])

    def whole_input(self) -> Tensor:
        """[1, S, H], or [1, S] ids."""
        S, H = self.sequence, self.hidden
        match self.kind:
            case "embedding":
                return self.ids()
            case "linear":
                return torch.arange(1, S + 1, dtype=DTYPE).view(1, S, 1).expand(1, S, H).contiguous()
            case "norm":
                return (
                    _grid(S, H, row=1, first=1) * torch.tensor([1.0, -1.0], dtype=DTYPE).repeat(H // 2)
                ).unsqueeze(0)
            case _:
                return torch.eye(S, dtype=DTYPE).unsqueeze(0)

    def whole_output_gradient(self) -> Tensor:
        """[1, S, H]: 100, 101, 102, 103 for token 0, and so on."""
        match self.kind:
            case "embedding":
                return _grid(self.sequence, self.hidden, row=100, first=100).unsqueeze(0)
            case _:
                return _grid(self.sequence, self.hidden, row=10, first=10).unsqueeze(0)

    @property
    def input_dim(self) -> int | None:
        """The dim along which the input is cut; None where every rank has it whole."""
        return {Subject.LINEAR_COLWISE: 1, Subject.LINEAR_ROWWISE: 2, Subject.NORM_SEQUENCE_PARALLEL: 1}.get(
            self.subject
        )

    @property
    def output_dim(self) -> int:
        return 2 if self.subject is Subject.LINEAR_COLWISE else 1

    def _logits(self) -> Tensor:
        S, V = self.sequence, VOCABULARY
        return torch.tensor(
            [[float((3 * token + 5 * column) % 7) for column in range(V)] for token in range(S)], dtype=DTYPE
        )


@dataclass(slots=True)
class Run:
    """What one rank had (or the unsharded module): tensors without the batch, [S, ...]; collectives by phase."""

    parameter: Tensor
    input: Tensor
    output: Tensor
    output_gradient: Tensor
    input_gradient: Tensor
    gradient: Tensor
    shown: dict[str, Tensor]
    forward: list[Exchanged]
    backward: list[Exchanged]


def run_whole(toy: Toy) -> Run:
    return _run(toy, toy.build(), toy.whole_input(), toy.whole_output_gradient(), {}, [])


def run_rank(toy: Toy, rank: int, mesh: DeviceMesh, log: list[Exchanged]) -> Run:
    model = toy.build()
    plan = Plan(str(toy.subject), (Rule("module", toy.style),), reduce_scatter=ReduceScatter.BACKEND)
    parallelize(model, plan, mesh)
    shown: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        shown[name] = value.detach().clone()

    x = toy.whole_input()
    if toy.input_dim is not None:
        x = x.chunk(toy.ranks, toy.input_dim)[rank].contiguous()
    with watched_by(keep):
        return _run(
            toy,
            model,
            x,
            toy.whole_output_gradient().chunk(toy.ranks, toy.output_dim)[rank].contiguous(),
            shown,
            log,
        )


def _run(
    toy: Toy,
    model: nn.ModuleDict,
    x: Tensor,
    output_gradient: Tensor,
    shown: dict[str, Tensor],
    log: list[Exchanged],
) -> Run:
    if x.is_floating_point():
        x.requires_grad_()
    module = model["module"]
    if toy.kind == "loss":
        # the head makes the logits; the walk-through is of the loss, from there on
        x = module(x).detach().requires_grad_()
        log.clear()
        y = loss_of(model)(x, toy.labels())
        forward = len(log)
        with loss_of(model).backward_context():
            y.backward()
        parameter, gradient, y, output_gradient = x, _grad(x), y.view(1, 1), torch.ones(1, 1, dtype=DTYPE)
    else:
        y = module(x)
        forward = len(log)
        y.backward(output_gradient)
        weight = module.get_parameter("weight")
        parameter, gradient = _local(weight), _local(_grad(weight))
    return Run(
        parameter=parameter.detach().clone().squeeze(0) if toy.kind == "loss" else parameter.detach().clone(),
        input=x.detach()[0],
        output=y.detach()[0],
        output_gradient=output_gradient[0],
        input_gradient=_grad(x)[0] if x.requires_grad else torch.empty(0),
        gradient=gradient.detach().clone().squeeze(0) if toy.kind == "loss" else gradient.detach().clone(),
        shown=shown,
        forward=log[:forward],
        backward=log[forward:],
    )


def _grad(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise RunError("a walk-through's backward left no gradient. This is a bug in a style.")
    return tensor.grad


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    with torch.no_grad():
        module.get_parameter("weight").copy_(weight)
    return module


def _grid(rows: int, columns: int, *, row: int, first: int = 0) -> Tensor:
    """Row r, column c: first + row x r + c."""
    return first + row * torch.arange(rows, dtype=DTYPE).unsqueeze(1) + torch.arange(columns, dtype=DTYPE)
