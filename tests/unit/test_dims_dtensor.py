"""The rules of dims against PyTorch's own: each example's inputs as DTensors that are cut where a leaf is,
over two ranks that don't exist; what DTensor says of the output, where it need not communicate, is what the
rule says. Where the two differ, the reason stands here."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from shardwise.core.mesh import Mesh
from shardwise.dims.factors import ConflictError, Factor, layout, leaves
from shardwise.dims.record import Value
from shardwise.trace.fakes import fake_world
from tests.unit.op_example import RANKS, Example, listed, part
from tests.unit.op_examples import EXAMPLES

OTHER_SUMS = "a part of another reduction than a sum, which no style adds up"
WE_BLOCK = {
    **dict.fromkeys(("mean", "amax", "amin", "max", "prod", "linalg_vector_norm", "norm"), OTHER_SUMS),
    **dict.fromkeys(("aminmax", "count_nonzero", "nansum", "all", "any"), OTHER_SUMS),
    "embedding": "rows that a rank lacks are zeros in a sum: what the style of a table does",
    "gather": "an index that is shorter than what it takes from: rows wouldn't meet",
    "_local_scalar_dense": "DTensor isn't asked when Python reads a number",
}
THEY_GATHER = {
    "slice": "DTensor slices no dim that is cut, not even between pieces",
    "diagonal": "whatever dim the diagonal isn't of",
    "bmm": "a broadcast matmul that DTensor flattens",
    "addmv": "no strategy for a sum of it",
    "tril": "whatever dim it isn't of",
    "native_group_norm": "over groups",
}
THEY_CAN_T = {
    "convolution": "DTensor takes channels for whole; it cuts the batch and the windows only",
    "linalg_inv_ex": "it gathers to check for errors, and there is nothing to gather here",
    "t_": "from PyTorch 2.14 on no op in place may change how a tensor is cut",
}
NO_STRATEGY = ("does not have a sharding strategy registered", "got mixed torch.Tensor and DTensor")


@dataclass(frozen=True)
class Found:
    """What DTensor gives, and what the rule says of it; None: that no rank may have a part."""

    names: tuple[str, ...]
    given: Sequence[object]
    communicates: bool
    expected: Sequence[object] | None
    error: str = ""

    @property
    def agrees(self) -> bool:
        if self.expected is None:
            return bool(self.error) or self.communicates or all(each == Replicate() for each in self.given)
        return not self.error and not self.communicates and list(self.given) == self.expected


def placement(value: Value, leaf: Factor) -> Shard | Replicate | None:
    """How a tensor is held where a leaf is cut; None where DTensor has no word for it."""
    own = [at for at, dim in enumerate(value.dims) if leaf in set(leaves(dim))]
    if not own:
        return Replicate()
    pieces = layout(value.dims[own[0]], frozenset({leaf}))
    return Shard(own[0]) if len(own) == 1 and [piece.is_cut for piece in pieces] == [True] else None


def compared(example: Example, mesh: DeviceMesh) -> Iterator[Found]:
    traced = example.traced
    names = tuple(op.name for op in traced.ops)
    for leaf in dict.fromkeys(leaf for value in traced.inputs for leaf in value.leaves()):
        try:
            places: list[Any] = [placement(value, leaf) for value in traced.inputs]
            expected = [_said(example, value, leaf) for value in traced.outputs]
        except ConflictError:
            continue
        if leaf.size % RANKS or None in places or (None in expected and leaf not in traced.blocked):
            continue
        said = None if leaf in traced.blocked else expected
        tensors = [
            DTensor.from_local(
                part(tensor, value, leaf, 0), mesh, [place], run_check=False,
                shape=tensor.shape, stride=tensor.stride(),
            )
            for tensor, value, place in zip(example.tensors, traced.inputs, places, strict=True)
        ]  # fmt: skip
        try:
            with torch.no_grad(), warnings.catch_warnings(), CommDebugMode() as communication:
                warnings.simplefilter("ignore")  # it takes a constant for one that all ranks have
                out = listed(example.call(tensors, example.whole_arguments))
        except (RuntimeError, NotImplementedError) as error:
            yield Found(names, [], False, said, str(error))
            continue
        given = [each.placements[0] if isinstance(each, DTensor) else None for each in out]
        yield Found(names, given, communication.get_total_counts() > 0, said)


def _said(example: Example, value: Value, leaf: Factor) -> Any:
    if leaf in example.traced.summed and leaf not in set(value.leaves()):
        return Partial()
    return placement(value, leaf)


def test_dtensor_says_the_same_of_each_example_or_the_reason_stands_here() -> None:
    with fake_world(Mesh.parse(f"tp={RANKS}"), rank=0, device="cpu") as mesh:
        found = [
            each
            for group in EXAMPLES.values()
            for example in group
            if not example.traced.record.unknown
            for each in compared(example, mesh)
        ]
    known = [each for each in found if not any(why in each.error for why in NO_STRATEGY)]
    differences = [each for each in known if not each.agrees]
    assert [each for each in differences if not _is_listed(each)] == []
    assert len(known) - len(differences) > 400


def _is_listed(found: Found) -> bool:
    if not THEY_CAN_T.keys().isdisjoint(found.names):
        return True
    if found.expected is None:
        return not WE_BLOCK.keys().isdisjoint(found.names)
    return found.communicates and not THEY_GATHER.keys().isdisjoint(found.names)
