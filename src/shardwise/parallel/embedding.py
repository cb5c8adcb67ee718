"""What the embedding styles of the native engine share: a sharded table, whose rows are whose, and how its
ids come in.

Suffixes: B batch, S sequence, H hidden, T ranks of the axis (a block per destination or source), L the own
part of S. Under sequence parallelism every style leaves [B, S/T, H]; look-ups are made in the order of their
destination, so that what goes over the wire is contiguous already. Ids are the same on every rank of the
axis; give them on the host where you can: then nothing waits for the device to learn which rows are its own.

A gradient row is added to the table only where this rank owns the id and the id isn't padding_idx
(F.embedding's rule).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor.parallel import ParallelStyle

from shardwise.core.errors import InputError, PlanError
from shardwise.core.held import Held
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.plan import Ownership
from shardwise.parallel import chunks, collectives
from shardwise.parallel.axis import Site
from shardwise.parallel.counts import divide_counts
from shardwise.parallel.ownership import Order, RowOwnership
from shardwise.parallel.parameters import local_weight, to_torch
from shardwise.parallel.sharder import Assignment, Fit, Sharder, Work, check_no_empty_shard


class TableSharder(Sharder):
    """A style of nn.Embedding."""

    outputs = (Shard(1), Replicate())

    def twin(self, assignment: Assignment, *, keeps_dtensor: bool) -> ParallelStyle | None:
        output = to_torch(self.output_of(assignment.style))
        if self.twin_style is None:
            return None
        return self.twin_style(input_layouts=to_torch(Replicate()), output_layouts=output)

    def look_up(self, shard: "EmbeddingShard", ids_BS: Tensor, weight: Tensor) -> Tensor:
        """ids [B, S] and the local table -> [B, S/T, H] under sequence parallelism, else [B, S, H]."""
        raise NotImplementedError

    def check(self, assignment: Assignment, fit: Fit) -> None:
        module, rule, name = assignment.module, assignment.rule, assignment.name
        check_table_options(assignment)
        if rule.style.gradient is not None:
            raise PlanError(
                f"rule {rule}: gradient is partial, and all ranks take what {name} gives for whole. Leave "
                "gradient out."
            )
        if self.cut_dim == 0:
            check_no_empty_shard(assignment, fit, module.num_embeddings, "rows")
        if rule.style.ownership is Ownership.INTERLEAVED and fit.fsdp > 1:
            raise PlanError(
                f"rule {rule} interleaves the rows of {name}, and no checkpoint could tell their order once "
                'FSDP cuts them again. Use ownership = "contiguous", or no fsdp axis.'
            )

    def held(self, assignment: Assignment) -> dict[str, Held]:
        if self.cut_dim is not None:
            return {"weight": Held(Shard(self.cut_dim))}
        # each rank looked up a part of the tokens only
        return {
            "weight": Held(Replicate(), gradient=Partial() if self.cuts_sequence(assignment.style) else None)
        }

    def apply(self, assignment: Assignment, work: Work) -> None:
        module, style = assignment.module, assignment.style
        ownership = RowOwnership(module.num_embeddings, work.axis.size, style.ownership)
        sequence_parallel = self.cuts_sequence(style)
        shard = EmbeddingShard(
            work.site(assignment),
            self,
            ownership,
            module.padding_idx,
            sequence_parallel,
            self.held(assignment)["weight"],
        )
        work.hold(assignment, shard)
        divide_counts(assignment, work.axis.size)
        module.forward = lambda ids: shard(ids, local_weight(module.weight, shard.grad_placement))


@dataclass(frozen=True, slots=True)
class EmbeddingShard:
    """One sharded embedding: `sequence_parallel` says whether its output is Shard(1) or Replicate."""

    site: Site
    sharder: TableSharder
    ownership: RowOwnership
    padding_idx: int | None
    sequence_parallel: bool
    held: Held

    @property
    def weight_placement(self) -> Placement:
        return self.held.placement

    @property
    def grad_placement(self) -> Placement:
        """What one rank's gradient of its table is."""
        return self.held.gradient_on(self.site.axis.size)

    @property
    def order(self) -> Order | None:
        """The order of its rows, where that isn't theirs."""
        is_interleaved = self.ownership.kind is Ownership.INTERLEAVED and self.site.axis.size > 1
        return self.ownership if is_interleaved else None

    def __call__(self, ids_BS: Tensor, weight: Tensor) -> Tensor:
        """See TableSharder.look_up."""
        if ids_BS.dim() != 2:
            raise InputError(
                f"{self.site.module}: ids have shape {tuple(ids_BS.shape)}. Give [batch, sequence]."
            )
        n_ranks = self.site.axis.size
        if self.sequence_parallel and ids_BS.shape[1] % n_ranks:
            raise InputError(
                f"{self.site.module}: sequence {ids_BS.shape[1]} is no multiple of tp={n_ranks}, which "
                "sequence parallelism needs."
            )
        return self.sharder.look_up(self, ids_BS, weight)

    def rows_for_head(self, site: Site, n_rows: int, hidden: int) -> Callable[[Tensor], Tensor]:
        """How a head that is tied to this table gets its rows [V/T, H]; gradients go back the same way."""
        axis = site.axis
        match self.weight_placement:
            case Shard(0):
                return lambda weight: weight
            case Shard(1):
                origin = site.origin(Shard(1), Shard(0))
                return lambda weight: collectives.all_to_all(
                    weight, 0, 1, axis, full_size=hidden, grad_placement=Shard(0), origin=origin
                )
            case _ if self.grad_placement == Partial():
                sizes = chunks.chunk_sizes(n_rows, axis.size)
                return lambda weight: weight.narrow(0, sum(sizes[: axis.rank]), sizes[axis.rank])
            case _:
                origin = site.origin(Replicate(), Shard(0))
                return lambda weight: collectives.split(
                    weight, 0, axis, grad_placement=Shard(0), origin=origin
                )

    def padding_row(self) -> int | None:
        """padding_idx as a local row, if this rank owns it."""
        if self.padding_idx is None:
            return None
        padding = torch.tensor(self.padding_idx)
        is_own = int(self.ownership.owner(padding)) == self.site.axis.rank
        return int(self.ownership.local(padding)) if is_own else None


def check_table_options(assignment: Assignment) -> None:
    """Raises PlanError for what a table does beside looking up, of any class."""
    if any(
        getattr(assignment.module, option, None) for option in ("max_norm", "sparse", "scale_grad_by_freq")
    ):
        raise PlanError(
            f"rule {assignment.rule}: {assignment.shown} uses max_norm, sparse or scale_grad_by_freq, which "
            "no style carries out. Switch them off."
        )


def by_destination(ids_BS: Tensor, n_ranks: int) -> Tensor:
    """[B, S] -> [T, B, S/T]: block d is what rank d keeps."""
    return ids_BS.unflatten(1, (n_ranks, -1)).movedim(1, 0).contiguous()  # type: ignore[no-any-return]
