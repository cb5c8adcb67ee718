"""make_plan(): a model and a number of ranks -> a MadePlan: what is cut, by which rules, and why; what stays
whole, and why."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.core.dims import Dims
from shardwise.core.errors import ModelError, PlanError
from shardwise.core.held import Held
from shardwise.core.layer_name import any_layer
from shardwise.core.made_plan import LeftWhole, MadePlan
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Placement, Replicate, Shard
from shardwise.core.plan import Plan, Style, StyleName
from shardwise.dims.by_data import BY_ID
from shardwise.dims.factors import Factor, leaves
from shardwise.dims.record import Entered, Record
from shardwise.dims.spans import Spans
from shardwise.dims.trace import record_of, seq_within
from shardwise.models.layers import Layers, find_layers
from shardwise.models.source import ModelSource, vocab_size_of
from shardwise.planner.alone import cut_alone, listed
from shardwise.planner.candidates import Candidate, candidates, choose, pattern_of
from shardwise.planner.classes import dims_of, held_by_rank
from shardwise.planner.constants import constants_in_the_way
from shardwise.planner.counts import Count, divided
from shardwise.planner.experts import experts_in, shared_out
from shardwise.planner.few import few_with_inner, has_few
from shardwise.planner.gradients import Gradients, MixedError, gradient_kinds
from shardwise.planner.names import EXPERTS, HEADS, HIDDEN, Names
from shardwise.planner.outer import head_of, read_in, tables_of
from shardwise.planner.patterns import everywhere
from shardwise.planner.regions import Region, UnfitError, place_of, region_of
from shardwise.planner.rules import Cuts, rules_of
from shardwise.planner.sequence import SequenceCut, cut_sequence

ASKED = "it was asked to stay whole"
_TRIES = 16


@dataclass(frozen=True, slots=True)
class Wish:
    """What a plan is asked for. sequence: cut it where the model allows it. table: the style of the look-up
    of ids. seq: the length at which costs are weighed. whole: modules that aren't to be cut, as patterns of
    equal ones (`layers.*.attention`), each a place that groups.py names."""

    mesh: Mesh
    sequence: bool = True
    table: StyleName = StyleName.ROWWISE
    seq: int = 4096
    whole: frozenset[str] = frozenset()


def make_plan(
    source: ModelSource,
    wish: Wish,
    *,
    forward: "Forward | None" = None,
    progress: Callable[[str], None] = lambda _: None,
) -> MadePlan:
    """The plan for a model. forward: the model's, for who makes several plans of it. Raises ModelError where
    its forward can't be traced; PlanError where nothing can be cut."""
    traced = traced_model(source, wish, progress, forward)
    progress("choosing what to cut")
    cuts, reasons = traced.making.cuts()
    return _made(source, traced, cuts, reasons, wish)


def make_dims(source: ModelSource, wish: Wish, *, progress: Callable[[str], None] = lambda _: None) -> Dims:
    """A model's classes of dims, whether a plan can be made or not. Raises ModelError where its forward can't
    be traced."""
    traced = traced_model(source, wish, progress)
    progress("choosing what to cut")
    try:
        cuts, _ = traced.making.cuts()
    except PlanError:
        return traced.dims(source, None, wish)
    return traced.dims(source, cuts, wish)


def _built(source: ModelSource, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(the model with all its layers, and with one of each kind)"""
    whole = source.build(dtype=dtype)
    layers = find_layers(whole)
    if layers is None:
        return whole, whole
    model = source.build(dtype=dtype)
    layers.shorten(model, min(layers.count, max(2, layers.kinds(whole))))
    return whole, model


@dataclass(frozen=True, slots=True)
class TracedModel:
    """whole: the model with all its layers; making has what was traced, which has one of each kind."""

    whole: nn.Module
    layers: Layers | None
    making: "Making"

    def dims(self, source: ModelSource, cuts: Cuts | None, wish: Wish) -> Dims:
        making = self.making
        return dims_of(
            source.name, (wish.mesh, wish.seq), making.record, making.spans, making.candidates, cuts,
            self.whole, self.layers,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Forward:
    """A model with all its layers, and with one of each kind; the forward of this one. Nothing changes it."""

    whole: nn.Module
    model: nn.Module
    record: Record
    seq: int


def forward_of(source: ModelSource, progress: Callable[[str], None] = lambda _: None) -> Forward:
    """Raises ModelError where it can't be traced."""
    progress(f"building {source.name}")
    whole, model = _built(source, torch.bfloat16)
    progress("tracing its forward")
    seq = seq_within(source.max_seq)
    try:
        record = record_of(model, vocab_size_of(model), seq=seq)
    except ModelError as error:
        try:  # a grouped matmul takes half precision alone, and other forwards none
            whole, model = _built(source, torch.float32)
            record = record_of(model, vocab_size_of(model), seq=seq)
        except ModelError:
            raise ModelError(
                f"{source.name}: {error} So no plan can be made of it; write one by hand."
            ) from error
    return Forward(whole, model, record, seq)


def traced_model(
    source: ModelSource, wish: Wish, progress: Callable[[str], None], forward: Forward | None = None
) -> TracedModel:
    forward = forward or forward_of(source, progress)
    whole, model, record, seq = forward.whole, forward.model, forward.record, forward.seq
    called = {event.module for event in record.events if isinstance(event, Entered)}
    layers = find_layers(whole, among=called)
    making = Making(record, model, whole, layers, wish)
    apart = constants_in_the_way(record, making.spans, making.candidates, making.covered())
    if apart:
        progress("tracing it again, the constants that modules are given told apart")
        record = record_of(model, vocab_size_of(model), seq=seq, apart=apart)
        again = Making(record, model, whole, layers, wish)
        making = max(making, again, key=Making.reach)
    if has_few(record, wish.mesh.tp):
        progress("tracing it again, to share out what is fewer than ranks")
        record = record_of(model, vocab_size_of(model), seq=seq, apart=apart)
        again = Making(record, model, whole, layers, wish, few_with_inner(record, wish.mesh.tp))
        making = max(again, making, key=Making.reach)
    return TracedModel(whole, layers, making)


class Making:
    """The search for cuts that every check lets pass. inner: see few_with_inner(). why_not: of the
    sequence."""

    def __init__(
        self,
        record: Record,
        model: nn.Module,
        whole: nn.Module,
        layers: Layers | None,
        wish: Wish,
        inner: Mapping[Factor, Factor] | None = None,
    ) -> None:
        self.record, self.model, self.whole, self.layers = record, model, whole, layers
        self.wish, self.ranks = wish, wish.mesh.tp
        self.spans, self.names = Spans(record), Names(record)
        self._found: tuple[Cuts, dict[str, str]] | None = None
        self.candidates = candidates(record, self.spans, self.ranks, seq=wish.seq, inner=inner)
        self.tables = tables_of(record, model)
        self.head, self.head_output = head_of(record, model)
        by_vocabulary = {name for module in (*self.tables, self.head) for name in read_in(record, module)}
        for each in self.candidates:
            if not by_vocabulary.isdisjoint(each.parameters) and not self._is_table_s(each):
                each.obstacles.append("the table of ids, or the head, has it, and is cut by vocabulary")
        self.why_not: str | None = None if wish.sequence else "it wasn't asked for"

    def covered(self) -> frozenset[str]:
        """The parameters that are cut together with others."""
        try:
            cuts, _ = self.cuts()
        except PlanError:
            return frozenset()
        return frozenset(name for region in cuts.regions for name in region.candidate.parameters)

    def reach(self) -> int:
        """How many elements these have."""
        return sum(math.prod(self.record.parameters[name].shape) for name in self.covered())

    def cuts(self) -> tuple[Cuts, dict[str, str]]:
        """What to cut, and why of other parameters nothing is. Raises PlanError where nothing can be."""
        if self._found is None:
            self._found = self._search()
        return self._found

    def _search(self) -> tuple[Cuts, dict[str, str]]:
        for _ in range(_TRIES):
            regions = self._regions()
            try:
                cuts, reasons = self._cuts(regions), self._reasons()
                cuts.alone = cut_alone(cuts, self.spans, self.whole, reasons, self.wish.whole)
                return cuts, reasons
            except UnfitError as error:
                self._drop(regions, error)
        raise PlanError("no choice of what to cut passes every check. Shard it by a plan of your own.")

    def _regions(self) -> list[Region]:
        while True:
            chosen = [each for each in choose(self.record, self.candidates) if not self._is_table_s(each)]
            cut = frozenset[Factor]().union(*(each.leaves for each in chosen))
            found = []
            for candidate in chosen:
                try:
                    region = region_of(self.record, self.spans, candidate, cut)
                except UnfitError as error:
                    candidate.obstacles.append(str(error))
                    continue
                if place_of(region) in self.wish.whole:
                    candidate.obstacles.append(ASKED)
                else:
                    found.append(region)
            if len(found) == len(chosen):
                return found

    def _is_table_s(self, candidate: Candidate) -> bool:
        """Rows of a table that is looked up by id: its module's style cuts them."""
        return any(
            why == BY_ID and candidate.leaf in set(leaves(factor))
            for op in self.record.ops
            for factor, why in op.blocked
        )

    def _cuts(self, regions: list[Region]) -> Cuts:
        sequence = self._sequence(regions)
        counts = divided(self.record, regions, self.ranks)
        try:
            kinds = gradient_kinds(self.record, self.spans, regions, sequence)
        except MixedError as error:
            if sequence is None:
                raise
            # what fails without it, too, isn't the sequence's fault
            kinds = gradient_kinds(self.record, self.spans, regions, None)
            self.why_not, sequence = str(error), None
        cuts = self._put_together(regions, sequence, counts, kinds)
        rules_of(cuts)
        return cuts

    def _sequence(self, regions: list[Region]) -> SequenceCut | None:
        if self.why_not is not None:
            return None
        if self.layers is None or self.head is None:
            self.why_not = "it has no list of layers" if self.layers is None else "it has no head of its own"
            return None
        try:
            return cut_sequence(self.record, self.spans, regions, self.layers.prefix, self.head)
        except UnfitError as error:
            self.why_not = str(error)
            return None

    def _put_together(
        self,
        regions: list[Region],
        sequence: SequenceCut | None,
        counts: frozenset[Count],
        gradients: Gradients,
    ) -> Cuts:
        output: Placement = Shard(1) if sequence is not None and sequence.is_at_embedding else Replicate()
        takes_output = "output" in self.wish.table.arguments
        style = Style(self.wish.table, output=output if takes_output else None)
        return Cuts(
            self.record, self.model, regions, sequence, counts, gradients,
            self.tables, None if self.head in self.wish.whole else self.head, style, self.head_output,
            self.ranks, self.names,
        )  # fmt: skip

    def _drop(self, regions: list[Region], error: UnfitError) -> None:
        """Gives up the candidates that an error is about, in every layer; where it doesn't say, the
        dearest."""
        guilty = [region for region in regions if not error.leaves.isdisjoint(region.candidate.leaves)]
        if not guilty:
            guilty = [region for region in regions if self._fails_alone(region)]
        if not guilty:
            guilty = sorted(regions, key=lambda region: region.candidate.sums)[-1:]
        if not guilty:
            raise PlanError(f"nothing of it can be cut: {error}.") from error
        patterns = {pattern_of(self.record, region.candidate) for region in guilty}
        for candidate in self.candidates:
            if pattern_of(self.record, candidate) in patterns:
                candidate.obstacles.append(str(error))

    def _fails_alone(self, region: Region) -> bool:
        try:
            divided(self.record, [region], self.ranks)
            kinds = gradient_kinds(self.record, self.spans, [region], None)
            rules_of(self._put_together([region], None, frozenset(), kinds))
        except UnfitError:
            return True
        return False

    def _reasons(self) -> dict[str, str]:
        """Parameter -> why a rank has all of it: what stood in the way of its largest candidate."""
        found: dict[str, str] = {}

        def says_most(candidate: Candidate) -> tuple[bool, bool, bool, int]:
            name = self.names.of(candidate.leaf)
            return name != HIDDEN, name == EXPERTS, name == HEADS, candidate.leaf.size

        for candidate in sorted(self.candidates, key=says_most):
            for name in candidate.parameters:
                if candidate.obstacles:
                    needs_all = name.rpartition(".")[0] in candidate.gathered
                    why = "its module needs all of it" if needs_all else any_layer(candidate.obstacles[0])
                    what = f"the {self.names.of(candidate.leaf)} ({candidate.leaf.size:,})"
                    found[name] = f"{what}: {why}"
        return found


def _made(
    source: ModelSource, traced: TracedModel, cuts: Cuts, reasons: dict[str, str], wish: Wish
) -> MadePlan:
    whole, layers, making = traced.whole, traced.layers, traced.making
    shared = shared_out(rules_of(cuts), making.model, wish.mesh)
    rules, comments = everywhere(shared, dict(making.model.named_modules()), whole, layers)
    over = f"ep={wish.mesh.experts},tp={wish.mesh.tp}" if wish.mesh.experts > 1 else f"tp={wish.mesh.tp}"
    name = f"made for {source.name.partition('?')[0]} at {over}"
    sharded, total, left = _shares(whole, layers, cuts, reasons, wish.mesh)
    sequence, like = None, layers.representative(whole) if layers is not None else (lambda name: name)
    if cuts.sequence is not None:
        where = "the look-up" if cuts.sequence.is_at_embedding else f"the input of {cuts.sequence.begins}"
        sequence = f"from {where} to {cuts.sequence.ends}"
    return MadePlan(
        source.name, str(wish.mesh), Plan(name, rules), comments, traced.dims(source, cuts, wish), left,
        total, sharded / total, sequence, making.why_not, source.notes, listed(cuts, whole, like),
    )  # fmt: skip


def _shares(
    whole: nn.Module, layers: Layers | None, cuts: Cuts, reasons: dict[str, str], mesh: Mesh
) -> tuple[int, int, tuple[LeftWhole, ...]]:
    """(elements of which a rank holds its part alone, all, what is whole)"""
    like = layers.representative(whole) if layers is not None else (lambda name: name)
    experts = experts_in(whole, mesh)
    total = sharded = 0
    left: dict[tuple[str, str], int] = {}
    for name, parameter in whole.named_parameters():
        total += parameter.numel()
        traced = like(name)
        kept = Held.parse(held_by_rank(cuts, traced)).kept_on(cuts.ranks)
        is_cut = mesh.tp > 1 and isinstance(kept, Shard)
        if is_cut or name.rpartition(".")[0] in experts:
            sharded += parameter.numel()
        else:
            owner = traced.rpartition(".")[0]
            is_gathered = any(owner in region.candidate.gathered for region in cuts.regions)
            why = "it gathers what is cut" if is_gathered else "nothing that is cut comes by it"
            if mesh.tp == 1:
                is_gathered, why = True, "there is one tp rank, which has it whole"
            key = (any_layer(name), why if is_gathered else reasons.get(traced, why))
            left[key] = left.get(key, 0) + parameter.numel()
    found = (LeftWhole(pattern, n, why) for (pattern, why), n in left.items())
    return sharded, total, tuple(sorted(found, key=lambda each: -each.elements))
