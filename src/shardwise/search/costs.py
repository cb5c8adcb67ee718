"""What is known of candidates by the pieces that were traced so far: predictions, bounds, and what other
styles change."""

from dataclasses import replace

from shardwise.core.errors import InputError
from shardwise.core.mesh import Mesh, Role, role_of
from shardwise.core.pipeline import fewest_recomputed, recomputed_spans
from shardwise.core.prediction import Prediction, Term
from shardwise.core.program import Program
from shardwise.core.search import SEQUENCE, Candidate
from shardwise.predict.check import check_setup
from shardwise.predict.memory import forecast
from shardwise.predict.predict import predict
from shardwise.search.bounds import NO_SHARDING, NOTHING_LESS, Bounds, Sharding
from shardwise.search.composed import fewest_layers, singles
from shardwise.search.ends import Change, Pair, is_end
from shardwise.search.needs import Needs, pipeline_of
from shardwise.search.piece import Piece, Traced, Unfit
from shardwise.search.problem import Outcome, Problem
from shardwise.search.queue import Node, Stage
from shardwise.search.savings import Savings

SURE = 1.05
"""What is put together of pieces, and so many times a device's memory, doesn't fit; its own plan isn't
traced."""
SLACK = 0.005
"""A candidate that was put together may take so much less than its pieces give; tests hold it."""
MOST_FREED = 2.0
"""An allocator gives back at most so many times what tensors free: what lay between them too."""


class Costs:
    """pieces: as they were traced. changes: by a candidate with the default styles and without recompute,
    what each other style of one group changes (seconds, bytes). ends: those of what lies outside the
    layers."""

    def __init__(self, problem: Problem, outcome: Outcome) -> None:
        self.problem, self.outcome = problem, outcome
        self.pieces: dict[Piece, Traced] = {}
        self.changes: dict[Candidate, dict[Pair, tuple[float, float]]] = {}
        self.ends: dict[Candidate, tuple[Change, ...]] = {}
        self._bounds: dict[Piece, Bounds] = {}
        self._sharding: dict[tuple[tuple[tuple[str, int], ...], bool], Piece] = {}
        self._smallest = min((each.micro_batch for each in problem.candidates), default=1)
        self._savings: dict[Piece, Savings] = {}
        self._foreseen: dict[Candidate, Prediction | Unfit] = {}
        self._predictions: dict[Candidate, Prediction | None] = {}
        self._reserved: dict[Candidate, Prediction] = {}

    def program(self, piece: Piece) -> Program | None:
        """None where it can't be traced."""
        found = self.pieces[piece]
        return None if isinstance(found, Unfit) else found

    def reserving(self, candidate: Candidate, found: Prediction) -> Prediction:
        """With what the allocator reserves, where that decides whether it fits: where tensors alone do."""
        if self.fits(found) and candidate not in self._reserved:
            traced = self.pieces[self.problem.piece_of(candidate)]
            assert not isinstance(traced, Unfit)
            memory = forecast(traced, self.problem.machine, self.problem.setup_of(candidate))
            self._reserved[candidate] = replace(found, memory=memory)
        return self._reserved.get(candidate, found)

    def predicted(self, candidate: Candidate) -> Prediction | None:
        """Of its own piece, which is traced, with the memory that tensors take. None, and refused, where it
        can't be."""
        if candidate not in self._predictions:
            found = self.foreseen(candidate)
            if isinstance(found, Unfit):
                self.outcome.refused[found.reason] += 1
            else:
                self.outcome.predicted += 1
            self._predictions[candidate] = None if isinstance(found, Unfit) else found
        return self._predictions[candidate]

    def foreseen(self, candidate: Candidate) -> Prediction | Unfit:
        """The same, and nothing is counted."""
        if candidate not in self._foreseen:
            traced = self.pieces[self.problem.piece_of(candidate)]
            found: Prediction | Unfit
            if isinstance(traced, Unfit):
                found = traced
            else:
                setup = self.problem.setup_of(candidate)
                try:
                    check_setup(traced, self.problem.machine, setup)
                    found = predict(traced, self.problem.machine, setup, replays=False)
                except InputError as error:
                    found = Unfit(str(error))
            self._foreseen[candidate] = found
        return self._foreseen[candidate]

    def missing(self, node: Node) -> list[Piece]:
        """What must be traced before the node can be looked at."""
        needed = [] if node.stage is Stage.KNOWN else [node.candidate]
        if node.stage is Stage.RECOMPUTED:
            if not self.problem.is_default(node.candidate):  # it tells what the others take at least
                default = self.problem.with_defaults(node.candidate)
                if self.problem.piece_of(default) not in self.pieces:
                    return [self.problem.piece_of(default)]
                if self.least_bytes(node.candidate, default) > self.problem.memory_bytes:
                    return []
                if self.recomputed_s(node.candidate, node.without) > node.bound:
                    return []
            if self.problem.partly:
                needed.append(node.candidate.without_recompute())
        if node.stage is Stage.STYLES:
            needed += self.singles(node.candidate)
        if node.stage is Stage.COMPOSED and 0 < node.candidate.recomputed < self.problem.layers:
            whole = replace(node.candidate, recomputed=self.problem.layers)
            needed = [whole.without_recompute(), whole, node.candidate]
        pieces = dict.fromkeys(map(self.problem.piece_of, needed))
        return [piece for piece in pieces if piece not in self.pieces]

    def looked_at(self) -> set[Candidate]:
        """Those with the default styles and without recompute of which something was predicted."""
        return {self.problem.with_defaults(each).without_recompute() for each in self._predictions}

    def bounds_of(self, piece: Piece) -> Bounds:
        if piece not in self._bounds:
            program, problem = self.program(piece), self.problem
            assert program is not None
            self._bounds[piece] = Bounds(
                program, problem.machine, problem.setup, gathers=problem.gathers_keys
            )
        return self._bounds[piece]

    def sharding_piece_of(self, candidate: Candidate) -> Piece | None:
        """The piece that tells FSDP's collectives; None where it has none."""
        if not candidate.mesh.shard_axes:
            return None
        inner = self.problem.piece_of(candidate).root.axes
        key = inner, candidate.reshard
        if key not in self._sharding:
            self._sharding[key] = self.problem.sharding_piece(Mesh(inner), candidate, self._smallest)
        return self._sharding[key]

    def sharding(self, candidate: Candidate) -> Sharding:
        """What FSDP adds to a micro-batch at least, by the default styles, which cut most; nothing where it
        isn't known."""
        piece = self.sharding_piece_of(candidate)
        if piece is None or isinstance(self.pieces.get(piece, Unfit("")), Unfit):
            return NO_SHARDING
        return self.bounds_of(piece).sharding(candidate.mesh)

    def default_root(self, candidate: Candidate) -> Piece:
        return self.problem.piece_of(self.problem.with_defaults(candidate)).root

    def again_s(self, candidate: Candidate, layers: int, waits: Prediction | None) -> float:
        """What its recompute of so many layers adds at least. waits: tells what of FSDP's collectives it
        waits for without, which what runs again may hide; None where that is as by the bounds."""
        bounds = self.bounds_of(self.default_root(candidate))
        sharding = self.sharding(candidate)
        if waits is not None:
            sharding = replace(sharding, beside_s=0.0)
        none_s, again_s = (
            bounds.step_s(replace(candidate, recomputed=count), sharding=sharding) for count in (0, layers)
        )
        return max(0.0, again_s - none_s - (waits_s(waits) if waits is not None else 0.0))

    def needs(self, candidate: Candidate) -> Needs:
        """What it holds at least, by its root and, with other styles than the default ones, by that of one
        tp rank, which has all."""
        root = self.default_root(candidate)
        found = self.bounds_of(root).needs
        return found if self.problem.is_default(candidate) else found.in_other_styles(self._whole(root))

    def at_first(self) -> dict[tuple[Piece, ...], list[Candidate]]:
        """All candidates, by what bounds them at first: what tells FSDP's collectives, the root of one tp
        rank, where that is some candidate's, and their own root."""
        roots = {candidate: self.problem.piece_of(candidate).root for candidate in self.problem.candidates}
        known, found = set(roots.values()), dict[tuple[Piece, ...], list[Candidate]]()
        for candidate, root in roots.items():
            sharding, whole = self.sharding_piece_of(candidate), _whole_of(root)
            pieces = [sharding] if sharding is not None else []
            pieces += [whole, root] if whole in known else [root]
            found.setdefault(tuple(pieces), []).append(candidate)
        return found

    def _whole(self, root: Piece) -> Needs | None:
        """None where it isn't known."""
        whole = _whole_of(root)
        known = not isinstance(self.pieces.get(whole, Unfit("")), Unfit)
        return self.bounds_of(whole).needs if known else None

    def recomputes(self, candidate: Candidate, needs: Needs) -> list[Candidate]:
        """With each recompute that could make it fit, by what tensors take, of as few layers as could."""
        found = []
        for kind in self.problem.recompute:
            few = needs.fewest_layers(candidate, kind, self.problem.memory_bytes)
            if kind != "none" and few is not None and self.problem.layers:
                layers = few if self.problem.partly else self.problem.layers
                found.append(replace(candidate, recompute=kind, recomputed=layers))
        return found

    def freed_bytes(self, candidate: Candidate, none: Prediction, every: Prediction) -> float:
        """By which a device holds less, at most, for each of its layers that is recomputed. none, every: with
        none and all of them."""
        needs = self.bounds_of(self.problem.piece_of(candidate.without_recompute())).needs
        by_all = (none.memory.device_bytes - every.memory.device_bytes) / self.problem.layers
        return MOST_FREED * (needs.freed_bytes(candidate.recompute) or by_all)

    def fewest_by(self, found: Prediction, way: Candidate, more_bytes: float) -> int:
        """So many layers that must be recomputed, the recompute being way's. found: without, of the default
        styles, than which its own ones hold so many bytes more, in other layers or in each."""
        needs = found.memory.device_bytes + more_bytes
        if more_bytes:
            needs /= SURE
        mesh, layers = way.mesh, self.problem.layers
        more = max(0.0, more_bytes) * mesh.stages / (layers * min(mesh.stages, way.micro_batches))
        freed = MOST_FREED * (self.bounds_of(self.default_root(way)).needs.freed_bytes(way.recompute) + more)
        return self.asked_for(way, fewest_layers(needs - self.problem.memory_bytes, freed, layers))

    def run_again(self, candidate: Candidate, recomputed: int) -> int:
        """How many layers, where so many are asked for: each part's are rounded up."""
        spans = pipeline_of(candidate.mesh.stages, candidate.chunks).spans(self.problem.layers)
        return sum(span.count for span in recomputed_spans(spans, recomputed)) if recomputed else 0

    def asked_for(self, candidate: Candidate, at_least: int) -> int:
        """How few layers to ask for, so that at least so many run again."""
        pipeline = pipeline_of(candidate.mesh.stages, candidate.chunks)
        return fewest_recomputed(pipeline, self.problem.layers, at_least)

    def restyled_s(self, candidate: Candidate) -> float | None:
        """That it takes at least with other styles than the default ones, which it has, and as much recompute
        as would make it fit; None where none could save anything, or none fits."""
        root, mesh = self.problem.piece_of(candidate).root, candidate.mesh
        less = self.savings_of(root, candidate).less(mesh.context)
        if less == NOTHING_LESS:
            return None
        bounds, sharding = self.bounds_of(root), self.sharding(candidate)
        needs = bounds.needs.in_other_styles(self._whole(root))
        fits = needs.device_bytes(candidate) <= self.problem.memory_bytes
        ways = [candidate] if fits else self.recomputes(candidate, needs)
        return min((bounds.step_s(way, sharding=sharding, less=less) for way in ways), default=None)

    def recomputed_s(self, candidate: Candidate, without: tuple[float, int]) -> float:
        """At least, of other styles than the default ones, by what the same recompute adds to these; 0 where
        that isn't known. What a style saves, its recompute saves once more at most. without: see Node."""
        default = self.problem.with_defaults(candidate)
        plain = default.without_recompute()
        changed, changes = set(candidate.styles) - set(default.styles), self.changes.get(plain, {})
        if not changed or not all(pair in changes for pair in changed):
            return 0.0
        again, none = self.predicted(default), self.predicted(plain)
        if again is None or none is None:
            return 0.0
        without_s, few = without
        saved_s = sum(min(0.0, changes[pair][0]) for pair in changed)
        more_s = added_s(none, again, few / self.problem.layers, saved_s)
        return (without_s + more_s) * (1 - SLACK) - self.ends_save_s(candidate)

    def saved_s(self, candidate: Candidate) -> float:
        """That other styles save at most, by its own piece."""
        piece = self.problem.piece_of(candidate)
        less = self.savings_of(piece, candidate).less(candidate.mesh.context)
        bounds = self.bounds_of(piece)
        return bounds.step_s(candidate) - bounds.step_s(candidate, less=less)

    def savings_of(self, piece: Piece, candidate: Candidate) -> Savings:
        if piece not in self._savings:
            program, groups = self.program(piece), self.problem.groups(candidate)
            assert program is not None
            setup = replace(self.problem.setup, mesh=None)
            is_cut = dict(candidate.styles).get(SEQUENCE) == "cut"
            self._savings[piece] = Savings(program, self.problem.machine, setup, groups, is_cut=is_cut)
        return self._savings[piece]

    def singles(self, candidate: Candidate) -> list[Candidate]:
        """With another style of one group each, of those that could save anything."""
        savings = self.savings_of(self.problem.piece_of(candidate), candidate)
        groups = [group for group in self.problem.groups(candidate) if savings.is_worth(group)]
        found = singles(candidate.styles, groups)
        return [replace(candidate, styles=styles) for styles in found]

    def least_bytes(self, candidate: Candidate, default: Candidate) -> float:
        """That it holds: what the default styles hold with the same recompute, and what its styles change
        without any, where that is known, else what they leave whole."""
        found, none = self.predicted(default), default.without_recompute()
        if found is None:
            return 0.0
        changed, known = set(candidate.styles) - set(default.styles), self.changes.get(none, {})
        if all(pair in known for pair in changed):
            more = sum(known[pair][1] for pair in changed)
            return (found.memory.device_bytes + more) / SURE
        root = self.problem.piece_of(none).root
        shards = self.bounds_of(root).needs.shards(candidate.mesh) * candidate.mesh.stages
        return found.memory.device_bytes + self.savings_of(root, none).more_bytes(candidate.styles) / shards

    def ends_of(self, candidate: Candidate) -> tuple[Change, ...]:
        """What may be changed outside its layers, as far as is known; nothing where that is not as by
        default."""
        default = self.problem.with_defaults(candidate)
        if any(map(is_end, set(candidate.styles) - set(default.styles))):
            return ()
        return self.ends.get(default.without_recompute(), ())

    def ends_save_s(self, candidate: Candidate) -> float:
        """Of a step, by the best of them."""
        return max((-change.seconds for change in self.ends_of(candidate)), default=0.0)

    def fits(self, found: Prediction) -> bool:
        return found.memory.device_bytes <= self.problem.memory_bytes


def _whole_of(root: Piece) -> Piece:
    """The root of one tp rank, which has all of what this one's ranks have."""
    axes = tuple(pair for pair in root.axes if role_of(pair[0]) is not Role.CUTS_TENSORS)
    return replace(root, axes=axes, styles=()).root


def waits_s(found: Prediction) -> float:
    """For FSDP's collectives, which work may hide."""
    return dict(found.terms).get(Term.DATA, 0.0)


def added_s(none: Prediction, every: Prediction, share: float, saved_s: float = 0.0) -> float:
    """That recomputing a share of the layers adds at least, if all of them make `every` of `none`. What all
    of them hide of FSDP's collectives, fewer may hide as well. saved_s: what it is more, a negative one."""
    hidden_s = max(0.0, waits_s(none) - waits_s(every))
    whole_s = max(0.0, every.step_s - none.step_s + saved_s + hidden_s)
    return max(0.0, share * whole_s - hidden_s)
