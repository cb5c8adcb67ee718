"""What one rank sees of a global batch: a pure function of the mesh and the rank. Standard library only.

Axes that split the batch number its parts as the mesh numbers ranks, the outermost slowest. Axes that cut
sequences do so in head-tail pairs: of 2n chunks rank r sees chunks r and 2n-1-r, so that under a causal mask,
where late tokens attend to many and early ones to few, all ranks have the same work (Llama 3, section 3.3.2).
"""

from dataclasses import dataclass
from math import lcm

from shardwise.core.errors import OptionError
from shardwise.core.mesh import AXES, Cuts, Mesh


@dataclass(frozen=True, slots=True)
class BatchPart:
    """Part `place` of `places` equal ones along the batch; and of each sequence, cut into n_chunks equal
    ones, those of these numbers, in this order."""

    place: int = 0
    places: int = 1
    chunks: tuple[int, ...] = (0,)
    n_chunks: int = 1

    @property
    def cuts_sequence(self) -> bool:
        return self.n_chunks > 1

    def sequences(self, batch: int) -> slice:
        """Which of a global batch's."""
        size = batch // self.places
        return slice(self.place * size, (self.place + 1) * size)

    def tokens(self, seq: int) -> tuple[slice, ...]:
        """Which of each sequence's, a slice for each chunk, in the order in which this rank has them."""
        size = seq // self.n_chunks
        return tuple(slice(chunk * size, (chunk + 1) * size) for chunk in self.chunks)

    def positions(self, seq: int) -> tuple[int, ...]:
        """The place in its sequence of each token that this rank has of a sequence of `seq`."""
        return tuple(at for part in self.tokens(seq) for at in range(part.start, part.stop))


def part_of_batch(mesh: Mesh, rank: int) -> BatchPart:
    """What `rank` sees. Ranks along axes that cut nothing see the same."""
    kinds = {axis.name: axis.cuts for axis in AXES}
    place, places, turn, turns = 0, 1, 0, 1
    for name, size in mesh.axes:
        index = coordinate(mesh, rank, name)
        match kinds[name]:
            case Cuts.BATCH:
                place, places = place * size + index, places * size
            case Cuts.SEQUENCE:
                turn, turns = turn * size + index, turns * size
            case Cuts.NOTHING:
                pass
    if turns == 1:
        return BatchPart(place, places)
    return BatchPart(place, places, (turn, 2 * turns - 1 - turn), 2 * turns)


def coordinate(mesh: Mesh, rank: int, axis: str) -> int:
    """The rank's place along an axis of the mesh, whose last axis changes fastest."""
    inner = 1
    for name, size in reversed(mesh.axes):
        if name == axis:
            return rank // inner % size
        inner *= size
    return 0


def sequence_step(context: int, tp: int) -> int:
    """What sequences are a multiple of where `context` ranks share each, and tp ranks have a part of what one
    rank has of it."""
    return context * lcm(2, tp) if context > 1 else tp


def check_batch(mesh: Mesh, batch: int, seq: int, accumulation: int = 1) -> None:
    """Raises OptionError for a batch or a sequence that can't be cut into equal parts; 0 is one that is still
    to be chosen."""
    parts = mesh.data_parallel * accumulation
    if batch % parts:
        raise OptionError(
            f"--batch {batch} can't be cut into {mesh.data_parallel} data-parallel parts of {accumulation} "
            f"micro-batches. Use a multiple of {parts}."
        )
    chunks = 2 * mesh.context
    if mesh.context > 1 and seq % chunks:
        raise OptionError(
            f"--seq {seq} can't be cut into {chunks} chunks, two for each of {mesh.context} ranks that share "
            f"a sequence. Use a multiple of {chunks}."
        )


def padded(seq: int, found: int, ranks: int) -> str:
    """Why `seq` positions became `found`, in words, where that is since each of the ranks takes its part to
    be as long as the first one's; else empty."""
    if ranks == 1 or found == seq or found != -(-seq // ranks) * ranks:
        return ""
    return (
        f"{seq} positions became {found}: {seq} is no multiple of tp={ranks}, and what puts parts of the "
        f"sequence together takes all of them for as long as the first. Use a sequence that is a multiple of "
        f"{ranks}"
    )
