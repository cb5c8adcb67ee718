"""What an event is, by its category and name. Categories decide first: a CPU op can carry a stream.

Sources: Kineto's activity types (libkineto/include/ActivityType.h) and their older spellings; kernel names as
NCCL, RCCL, vLLM, FlashInfer, DeepEP, NVSHMEM and MSCCL give them.
"""

import re

from shardwise.core.timeline import SpanKind

_BY_CATEGORY = {
    "kernel": SpanKind.COMPUTE,
    "gpu_memcpy": SpanKind.COPY,
    "memcpy": SpanKind.COPY,
    "gpu_memset": SpanKind.COPY,
    "memset": SpanKind.COPY,
    "mtia_ccp_events": SpanKind.COMPUTE,
    "xpu_kernel": SpanKind.COMPUTE,
    "cpu_op": SpanKind.OP,
    "operator": SpanKind.OP,
    "user_annotation": SpanKind.RANGE,
    "cuda_runtime": SpanKind.LAUNCH,
    "cuda_driver": SpanKind.LAUNCH,
    "runtime": SpanKind.LAUNCH,
    "mtia_runtime": SpanKind.LAUNCH,
    "xpu_runtime": SpanKind.LAUNCH,
    "privateuse1_runtime": SpanKind.LAUNCH,
    # as files/perfetto.py writes a Timeline
    **{kind.name.lower(): kind for kind in SpanKind},
}

_COMMUNICATES = re.compile(
    r"nccl|rccl|msccl|nvshmem|cross_device_reduce|multimem_|deep_ep::.{0,200}(?:dispatch|combine)|"
    r"all_?reduce_fusion|"
    r"(?:all_?reduce|all_?gather|reduce_?scatter|all_?to_?all).{0,200}kernel|memcpy ptop|one_shot_|two_shot_",
    re.IGNORECASE,
)
# kernels that work on what a collective sends, or that are named after one and send nothing
_ONLY_NAMED_SO = re.compile(r"triton_(?:poi|red|per)_fused", re.IGNORECASE)
_COPIES = re.compile(
    r"^(?:__amd_rocclr_(?:copy|fill)Buffer|MEMORY_COPY_|fillBuffer|Memcpy|Memset)", re.IGNORECASE
)

_OPS = (
    ("reducescatter", "reduce_scatter"),
    ("allgather", "all_gather"),
    ("allreduce", "all_reduce"),
    ("alltoall", "all_to_all"),
    ("broadcast", "broadcast"),
    ("barrier", "barrier"),
    ("sendrecv", "send_recv"),
    ("send", "send_recv"),
    ("recv", "send_recv"),
    ("crossdevicereduce", "all_reduce"),
    ("oneshot", "all_reduce"),
    ("twoshot", "all_reduce"),
    ("ptop", "send_recv"),
    ("dispatch", "all_to_all"),
    ("combine", "all_to_all"),
    ("scatter", "scatter"),
    ("gather", "gather"),
    ("reduce", "reduce"),
)
UNKNOWN = "unknown collective"
# all ranks' kernels end when the data has moved: only of these waiting can be told from transfer
SYMMETRIC = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")

# bytes per second that one GPU's links carry in one direction: NVLink 2 to 5 and Infinity Fabric, by the
# makers' data sheets of these products
LINK_BYTES_PER_S = (
    ("V100", 150e9),
    ("A100", 300e9),
    ("H100", 450e9),
    ("H200", 450e9),
    ("GH200", 450e9),
    ("B200", 900e9),
    ("MI300X", 448e9),
)

_ISSUES = ("nccl:", "gloo:", "c10d::", "shardwise.", "_c10d_functional::", "mpi:", "ucc:")
_WAITS = ("c10d::", "_c10d_functional::", "_c10d_functional_autograd::", "_dtensor::", "gloo:")


def kind_of(category: str, name: str) -> SpanKind | None:
    """None: of no interest here (Python's call stacks, flows, the GPU's copy of ranges, overhead)."""
    kind = _BY_CATEGORY.get(category)
    if kind is None:
        kind = _BY_CATEGORY.get(category.lower())
    if kind is SpanKind.COMPUTE or kind is SpanKind.COPY:
        if communicates(name):
            return SpanKind.COLLECTIVE
        if kind is SpanKind.COMPUTE and _COPIES.match(name):
            return SpanKind.COPY
    elif kind is SpanKind.RANGE and name.startswith("gloo:"):
        return SpanKind.COLLECTIVE
    return kind


def communicates(name: str) -> bool:
    """Whether a kernel of this name exchanges data with other devices."""
    return _COMMUNICATES.search(name) is not None and _ONLY_NAMED_SO.search(name) is None


def collective_op(name: str) -> str:
    """A collective's name as PyTorch, NCCL or a kernel spells it -> "all_reduce", ...; else UNKNOWN."""
    plain = name.replace("(anonymous namespace)", "").partition("(")[0].partition("<")[0]
    letters = re.sub(r"[^a-z]", "", plain.lower().removeprefix("nccldevkernel_").removeprefix("ncclkernel_"))
    for part, op in _OPS:
        if part in letters:
            return op
    return UNKNOWN


def link_of(device: str) -> float | None:
    """Bytes per second in one direction of the device of this name; None where it isn't known."""
    return next((rate for name, rate in LINK_BYTES_PER_S if name in device), None)


def issues_collective(name: str) -> bool:
    """Whether a CPU op or range of this name is where a collective was called for."""
    return name.startswith(_ISSUES)


def is_handed_to_python(name: str) -> bool:
    """Whether a CPU op of this name hands the op around it to a subclass of Tensor, such as DTensor: what is
    inside are ops on what that holds."""
    return name == "PythonSubclass"


def waits(name: str) -> bool:
    """Whether a CPU op of this name only issues a collective or waits for one: no work of its own."""
    return name.startswith(_WAITS)


_CLASSES = {
    "attention": r"scaled_dot_product|flash|fmha|attention|attn",
    "convolution": r"conv(?:olution|2d|_)|miopen|winograd|implicit_gemm",
    "matmul": r"::(?:add)?(?:mm|bmm|matmul|linear|baddbmm|einsum|_scaled_mm)\b|gemm|cutlass|Cijk|nvjet|"
    r"cublas|matmul",
    "norm": r"norm",
    "embedding": r"embedding|index_select|gather",
    "optimizer": r"_foreach|fused_adam|multi_tensor|optimizer|adam",
    "softmax and loss": r"softmax|nll|cross_entropy|loss",
    "copy": r"::(?:copy_|contiguous|clone|cat|_to_copy|to|fill_|zero_)\b|copy|memcpy|memset|CatArray",
    "reduction": r"::(?:sum|mean|max|min|argmax|cumsum|any|all)\b|reduce_kernel",
}
_ONLY_COPIES = re.compile(r"^aten::(?:copy_|contiguous|clone|cat|_to_copy|to)$")


def class_of(op: str, kernel: str) -> str:
    """What kind of work it is, by the op that called for it, else by its own name."""
    for text in (op, kernel):
        for name, pattern in _CLASSES.items():
            if text and re.search(pattern, text, re.IGNORECASE):
                return name
    return "elementwise and other"


def only_copies(op: str) -> bool:
    """Whether an op of this name lays out or moves data and computes nothing."""
    return _ONLY_COPIES.match(op) is not None


def plain_name(name: str) -> str:
    """A kernel's name without return type, template arguments and parameters, which builds differ in."""
    bare = name.replace("(anonymous namespace)::", "").replace("{anonymous}::", "").removeprefix("void ")
    if bare.startswith(("Mem", "Cijk_", "triton_", "ampere_", "sm80_", "sm90_", "sm100_", "nvjet_")):
        return bare
    kept, depth = [], 0
    for character in bare:
        if character in "<(":
            depth += 1
        elif character in ">)":
            depth = max(0, depth - 1)
        elif depth == 0:
            kept.append(character)
    return "".join(kept).strip() or name


def short_name(name: str, most: int = 60) -> str:
    """plain_name without its namespaces, cut to `most` characters; ranges and ops are only cut."""
    plain = name
    if "<" in name or name.endswith(")"):
        plain = plain_name(name)
        plain = plain.rpartition("::")[2] if plain.count("::") > 1 else plain
    return plain if len(plain) <= most else f"{plain[: most - 12]}…{plain[-11:]}"
