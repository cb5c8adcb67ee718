"""What an op that is several kernels makes for itself: gone when it is done.

    _safe_softmax           the softmax, which of its entries are minus infinity (a byte each), and which rows
                            are that whole; then its result (aten/src/ATen/native/SoftMax.cpp)
    _softmax_backward_data  on CUDA, behind its result, gradient times output (aten/src/ATen/native/cuda/
                            SoftMax.cu, softmax_backward_cuda_out)
    embedding_dense_backward  on CUDA, of more ids than FEW_IDS: ids in order and where they stood, and behind
                            its result sums of at most ROWS gradients each, in float32, as many as there can
                            be (aten/src/ATen/native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu)

What it does not know: what a kernel itself asks of the allocator (a sort's keys, split matmuls).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Inner:
    """Bytes of each storage that comes before the op's result, and behind it."""

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()


NOTHING = Inner()
FEW_IDS, ROWS = 3072, 10


def inner_of(name: str, device: str, inputs: Sequence[Tensor], made: Sequence[Tensor]) -> Inner:
    """made: the op's result."""
    if not made:
        return NOTHING
    result = made[0]
    match name:
        case "aten::_safe_softmax":
            rows = result.numel() // max(1, result.shape[-1] if result.ndim else 1)
            return Inner(before=(result.nbytes, result.numel(), rows))
        case "aten::_softmax_backward_data" if device == "cuda":
            return Inner(behind=(result.nbytes,))
        case "aten::embedding_dense_backward" if device == "cuda" and inputs[1].numel() > FEW_IDS:
            ids, (rows, width) = inputs[1], result.shape
            sums = ids.numel() // ROWS + min(ids.numel(), rows)
            return Inner(before=(ids.nbytes, ids.nbytes), behind=(sums * width * 4,))
        case _:
            return NOTHING
