"""How a dim is cut into a chunk for each rank."""

from torch import Tensor

from shardwise.parallel.axis import Axis


def chunk_sizes(size: int, parts: int) -> list[int]:
    """Sizes of `parts` chunks of `size` as torch.chunk and DTensor cut: all ceil(size/parts) but the last
    ones, which may be empty."""
    full = -(-size // parts)
    return [max(0, min(full, size - full * part)) for part in range(parts)]


def own_chunk(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's chunk, a view."""
    sizes = chunk_sizes(x.shape[dim], axis.size)
    return x.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank])
