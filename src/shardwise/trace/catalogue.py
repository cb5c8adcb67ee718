"""What is known of an op by its name: its kind, its FLOPs, the bytes that it reads and writes, and which op
another device runs instead.

Names are PyTorch's, without overload: "aten::mm". The one table of what differs between devices is
CUDA_NAMES; an op that isn't in KINDS is of the kind that PyTorch's tags or its name's family say, else
`unknown`: it keeps its name, shapes and bytes, and nobody guesses more.

FLOPs: see core/program.py. Sources: matmul 2 m n k (Golub & Van Loan, Matrix Computations, 1.2.4); triangular
solve n^2 per right-hand side (3.1.2 there); attention forward two matmuls and backward five (Dao et al. 2022,
FlashAttention, section 3 and appendix B, which recomputes the scores), half of them where causal.
"""

import re
from collections.abc import Collection, Sequence
from math import prod

from shardwise.core.grouped import grouped_product
from shardwise.core.op_names import FSDP_COPY_IN, FSDP_COPY_OUT, FSDP_REDUCE_IN
from shardwise.core.program import OpKind, TensorSpec

_NAMES: dict[OpKind, str] = {
    OpKind.MATMUL: (
        "mm addmm bmm baddbmm _grouped_mm convolution convolution_backward dot mv addmv "
        "linalg_solve_triangular"
    ),
    OpKind.ATTENTION: (
        "_scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention "
        "_scaled_dot_product_flash_attention_backward _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_efficient_attention_backward"
    ),
    OpKind.EMBEDDING: "embedding embedding_dense_backward",
    OpKind.NORM: (
        "_fused_rms_norm _fused_rms_norm_backward native_layer_norm native_layer_norm_backward "
        "native_group_norm native_group_norm_backward"
    ),
    OpKind.SOFTMAX: (
        "_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data logsumexp "
        "nll_loss_forward nll_loss_backward _safe_softmax"
    ),
    OpKind.ELEMENTWISE: (
        "add sub mul div neg pow rsqrt sqrt exp log log1p expm1 sigmoid sigmoid_backward tanh "
        "tanh_backward silu silu_backward gelu gelu_backward relu threshold_backward softplus "
        "softplus_backward leaky_relu leaky_relu_backward where masked_fill clamp clamp_min clamp_max "
        "abs sign sgn sin cos tan erf floor ceil round reciprocal maximum minimum lt gt le ge eq ne "
        "isnan isinf bitwise_and bitwise_or bitwise_not bitwise_xor logical_and logical_or "
        "logical_not __or__ __and__ __xor__ floor_divide remainder addcmul addcdiv lerp rsub polar "
        "native_dropout native_dropout_backward "
        "log_sigmoid_forward log_sigmoid_backward hardtanh elu elu_backward mish square atan2 fmod"
    ),
    OpKind.REDUCTION: (
        "sum mean amax amin max min prod var std any all argmax argmin cumsum cumprod "
        "linalg_vector_norm norm topk sort bincount histc count_nonzero logcumsumexp aminmax mode "
        "median unique_consecutive searchsorted cummax"
    ),
    OpKind.INDEX: (
        "index index_put index_select index_copy index_add gather scatter scatter_add nonzero "
        "masked_select slice_scatter select_scatter select_backward slice_backward take "
        "masked_scatter scatter_reduce _unsafe_index _unsafe_index_put"
    ),
    OpKind.COPY: (
        "clone _to_copy to cat stack repeat tril triu roll flip constant_pad_nd contiguous "
        "split_with_sizes_copy all_gather_copy_in chunk_cat split_with_sizes_copy_out unfold_backward "
        "repeat_interleave copy"
    ),
    OpKind.FILL: (
        "zeros zeros_like ones ones_like full full_like zero_ new_zeros new_ones new_full arange "
        "scalar_tensor linspace eye fill bernoulli_ normal_ uniform_ exponential_ rand randn randint "
        "rand_like randn_like one_hot"
    ),
    OpKind.OPTIMIZER: "_fused_adamw_ _fused_adam_ _fused_sgd_",
}
KINDS: dict[str, OpKind] = {
    f"aten::{name}": kind for kind, names in _NAMES.items() for name in names.split()
} | {
    FSDP_COPY_IN: OpKind.COPY,
    FSDP_COPY_OUT: OpKind.COPY,
    FSDP_REDUCE_IN: OpKind.COPY,
    "higher_order::flex_attention": OpKind.ATTENTION,
    "higher_order::flex_attention_backward": OpKind.ATTENTION,
}

_BY_TAG = {"pointwise": OpKind.ELEMENTWISE, "reduction": OpKind.REDUCTION, "view_copy": OpKind.COPY}
# New ops come with old names: these say what an op does to memory
_FAMILIES = {
    OpKind.INDEX: re.compile("_?(unsafe_)?(masked_)?(index|scatter|gather|select|slice)_"),
    OpKind.FILL: re.compile("fill_|new_|(.+_(fill|like)_?$)"),
    OpKind.COPY: re.compile(".+_copy_?$"),
}

_FLASH_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"
_HALF = frozenset({"bfloat16", "float16"})

# What CUDA runs where a CPU runs something else, and PyTorch chooses by the device below where a tracer
# without one can steer it. RMSNorm, DTensor's all-to-all and the native engine's own choices differ too; they
# are steered (trace/fakes.py), so they need no entry.
CUDA_NAMES: dict[str, dict[str, str]] = {
    _FLASH_CPU: {
        "flash": "aten::_scaled_dot_product_flash_attention",
        "efficient": "aten::_scaled_dot_product_efficient_attention",
    },
    f"{_FLASH_CPU}_backward": {
        "flash": "aten::_scaled_dot_product_flash_attention_backward",
        "efficient": "aten::_scaled_dot_product_efficient_attention_backward",
    },
}


def kind_of(name: str, device: str, tags: Collection[str] = ()) -> OpKind:
    """The kind of an op as `device` runs it; one that works in place (`exp_`) or on a list (`_foreach_exp`)
    is of its plain form's.

    tags: PyTorch's own of the op ("pointwise", "reduction"), for those that no name here tells.
    """
    namespace, _, base = name.partition("::")
    of_one = base.removeprefix("_foreach_")
    for known in (base, base.removesuffix("_"), of_one, of_one.removesuffix("_")):
        if f"{namespace}::{known}" in KINDS:
            return KINDS[f"{namespace}::{known}"]
    tagged = (kind for tag, kind in _BY_TAG.items() if tag in tags)
    of_family = (kind for kind, family in _FAMILIES.items() if family.match(base))
    return next(tagged, None) or next(of_family, OpKind.UNKNOWN)


def name_on(name: str, device: str, inputs: Sequence[TensorSpec]) -> str:
    """The op that `device` runs where a CPU runs `name`; "unknown in place of NAME" where the catalogue can't
    tell.

    Source of the attention rules: PyTorch's aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: flash
    attention takes half precision and no mask, the memory-efficient kernel masks and float32 too, but no
    grouped heads, and neither takes float64.
    """
    if device != "cuda" or name not in CUDA_NAMES:
        return name
    q, k, _ = _attended(name, inputs)
    has_mask = len(inputs) > (
        6 if name.endswith("_backward") else 3
    )  # it comes last; a backward takes two results and a gradient more
    if q.dtype in _HALF and not has_mask:
        return CUDA_NAMES[name]["flash"]
    if q.dtype in {*_HALF, "float32"} and q.shape[1] == k.shape[1]:
        return CUDA_NAMES[name]["efficient"]
    return f"unknown in place of {name}"


def flops_of(name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], *, causal: bool) -> int:
    """FLOPs by the op's CPU name and shapes; 0 for what is bound by memory."""
    shapes = [spec.shape for spec in inputs]
    match name.removeprefix("aten::"):
        case "mm" | "bmm":
            return 2 * prod(shapes[0]) * shapes[1][-1]
        case "addmm" | "baddbmm":
            return 2 * prod(shapes[1]) * shapes[2][-1]
        case "_grouped_mm":
            return grouped_product(inputs).flops
        case "mv" | "dot":
            return 2 * prod(shapes[0])
        case "addmv":
            return 2 * prod(shapes[1])
        case "linalg_solve_triangular":  # n^2 for each right-hand side of a matrix [n, n]
            return shapes[0][-1] * prod(outputs[0].shape)
        case "convolution":  # every output element is a dot product over one filter
            return 2 * prod(outputs[0].shape) * prod(shapes[1][1:])
        case "convolution_backward":  # gradients of the input and of the weight, each as many as the forward
            return sum(
                2 * prod(shapes[0]) * prod(shapes[2][1:]) for output in outputs if len(output.shape) > 1
            )
        case base if base.startswith(("_scaled_dot_product", "higher_order::flex_attention")):
            q, k, v = _attended(name, inputs)
            # scores and their gradients go over the keys' width; values, and what is weighted, over theirs
            by_keys, by_values = (3, 2) if base.endswith("_backward") else (1, 1)
            width = by_keys * q.shape[-1] + by_values * v.shape[-1]
            whole = 2 * prod(q.shape[:-1]) * width * k.shape[-2]
            return whole // 2 if causal else whole
        case _:
            return 0


def traffic_of(
    name: str,
    inputs: Sequence[TensorSpec],
    input_bytes: Sequence[int],
    output_bytes: Sequence[int],
    written: Sequence[int],
) -> tuple[int, int]:
    """(bytes read, bytes written). input_bytes, output_bytes: of each tensor; written: those of the inputs
    that are written in place."""
    read, write = sum(input_bytes), sum(output_bytes) + sum(written)
    match name.removeprefix("aten::"):
        case "_grouped_mm":  # the rows, and the matrices of the groups that some row meets
            share = grouped_product(inputs).matrix_share
            parts = zip(inputs, input_bytes, strict=True)
            return sum(round(n * share) if len(spec.shape) == 3 else n for spec, n in parts), write
        case "embedding":  # the rows that it takes, not the table
            return input_bytes[1] + output_bytes[0], write
        case "index_select" | "index" | "gather":
            return sum(input_bytes[1:]) + sum(output_bytes), write
        case "index_add_" | "scatter_add_":  # reads and writes the rows that it meets
            return sum(input_bytes[1:]) + input_bytes[-1], input_bytes[-1]
        case "index_fill_":  # writes one value to the rows that it meets
            rows, count = inputs[0].shape[:1], prod(inputs[1].shape)
            return input_bytes[1], input_bytes[0] * min(count, rows[0]) // max(1, rows[0]) if rows else write
        case "index_copy_" | "index_put_" | "scatter_":
            return sum(input_bytes[1:]), input_bytes[-1] if len(input_bytes) > 1 else write
        case "embedding_dense_backward":  # zeroes the table's gradient, then adds a row per token to it
            return sum(input_bytes) + input_bytes[0], write + input_bytes[0]
        case (
            "zero_"
            | "fill_"
            | "zeros_like"
            | "ones_like"
            | "full_like"
            | "new_zeros"
            | "new_ones"
            | "new_full"
        ):
            return 0, write
        case "copy_":
            return sum(input_bytes[1:]), sum(written)
        case _:
            return read, write


def _attended(name: str, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """Queries, keys and values."""
    first = 1 if name.endswith("_backward") else 0  # its first input is the output's gradient
    return inputs[first], inputs[first + 1], inputs[first + 2]
