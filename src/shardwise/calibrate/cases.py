"""Which kernels calibrate times on a device, the telling ones first: who runs out of time has them.

Sizes are of no model in particular: linear layers from 64 to 16384 wide, rows of tokens from 64 up, tensors
from what a cache holds to what only memory does.
"""

from collections.abc import Iterator
from itertools import product

from shardwise.calibrate import kernels
from shardwise.calibrate.case import Case

LAYOUTS = ("tn", "nn", "nt")

# (n, k) of linear layers, whole and cut over tp
LINEARS = (
    (4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336), (512, 4096), (128, 4096), (4096, 512),
    (1792, 4096), (4096, 1792), (16032, 4096), (128256, 4096), (8192, 8192), (10240, 8192), (28672, 8192),
    (8192, 28672), (1024, 8192), (8192, 1024), (3584, 8192), (8192, 3584), (16032, 8192), (1024, 1024),
    (4096, 1024), (1024, 4096), (2048, 2048), (8192, 2048), (2048, 8192), (3072, 3072), (9216, 3072),
    (12288, 3072), (3072, 12288), (16384, 16384), (2048, 16384), (16384, 2048), (768, 3072), (1536, 6144),
    (12288, 12288),
)  # fmt: skip
# batch, m, n, k of attention without a fused kernel
SCORES = (
    (32, 2048, 2048, 64),
    (32, 2048, 64, 2048),
    (64, 1024, 1024, 64),
    (64, 2048, 2048, 128),
    (64, 2048, 128, 2048),
)
# rows, width, which rows are met
TABLES = (
    (128256, 512, "any"), (16032, 4096, "one"), (16032, 4096, "any"), (128256, 4096, "any"),
    (50304, 1024, "any"), (16032, 8192, "one"),
)  # fmt: skip
NOT_ON_CPU = ("aten::_fused_rms_norm_backward",)
MOST_FLOPS = {"cpu": 2.0e10, "cuda": 1.6e13}


def cases_for(device_type: str, *, quick: bool = False) -> list[Case]:
    """quick: a few of each, to see that all of it works."""
    by_device = {"cuda": _cuda, "cpu": _cpu}
    cases = _quick(device_type) if quick else by_device[device_type]()
    return [case for case in cases if device_type != "cpu" or case.op not in NOT_ON_CPU]


def _quick(device_type: str) -> Iterator[Case]:
    dtypes = ("float32",) if device_type == "cpu" else ("bfloat16", "float32")
    large = 1 << (18 if device_type == "cpu" else 24)
    for dtype in dtypes:
        for m, n, k in ((128, 128, 128), (512, 256, 256), (256, 512, 1024)):
            yield kernels.matmul(m, n, k, dtype, "tn")
        for backward in (False, True):
            yield kernels.attention(2, 4, 4, 256, 64, dtype, backward=backward)
            yield kernels.embedding(4096, 256, 1024, dtype, hit="any", backward=backward)
        for n in (1 << 10, large):
            yield from kernels.memory_bound(n, 256, dtype)


def _cpu() -> Iterator[Case]:
    """float32 first, and its matmuls, which make most of a step, at the end again: a machine that others
    share changes its pace. Up to sizes that no cache holds and whose memory the allocator takes afresh each
    time."""
    for dtype in ("float32", "bfloat16"):
        yield from _cpu_matmuls(dtype)
        yield from _cpu_others(dtype)
    yield from _cpu_matmuls("float32")


def _cpu_matmuls(dtype: str) -> Iterator[Case]:
    sides = (64, 192, 512, 1024, 4096) if dtype == "float32" else (192, 512, 1024)
    for m, (n, k) in product(
        (64, 256, 1024, 4096) if dtype == "float32" else (256, 1024), product(sides, sides)
    ):
        for layout in LAYOUTS if m == 1024 else ("tn",):
            if 2 * m * n * k <= MOST_FLOPS["cpu"] / 4:
                yield kernels.matmul(m, n, k, dtype, layout)
    for m, n, k in ((1024, 16384, 512), (1024, 512, 16384), (16384, 512, 1024)):
        yield kernels.matmul(m, n, k, dtype, "tn")


def _cpu_others(dtype: str) -> Iterator[Case]:
    for batch, m, n, k in ((16, 256, 256, 64), (16, 256, 64, 256), (8, 1024, 1024, 64)):
        yield kernels.batched_matmul(batch, m, n, k, dtype)
    for seq, head_dim in ((128, 32), (256, 32), (256, 64), (512, 64), (1024, 64), (1024, 128)):
        for kv_heads in (2, 8):
            for backward in (False, True):
                yield kernels.attention(2, 8, kv_heads, seq, head_dim, dtype, backward=backward)
    for exponent in (8, 12, 14, 16, 18, 20, 22, 23, 24):
        n = 1 << exponent
        yield from kernels.memory_bound(n, min(n, 512), dtype)
    for rows, width in ((16, 1024), (256, 4096), (1024, 16384), (1024, 32768)):
        yield kernels.log_softmax(rows, width, dtype)
        yield kernels.softmax(rows, width, dtype)
    for rows, width, ids in (
        (8192, 128, 256),
        (8192, 512, 1024),
        (16384, 256, 4096),
        (32768, 512, 1024),
        (32768, 512, 4096),
    ):
        for hit in ("any", "one"):
            yield kernels.embedding(rows, width, ids, dtype, hit=hit)
            yield kernels.embedding(rows, width, ids, dtype, hit=hit, backward=True)
        yield kernels.row_look_up(rows, width, ids, dtype)
        yield kernels.row_adding(rows, width, ids, dtype)


def _cuda() -> Iterator[Case]:
    for dtype in ("bfloat16", "float32"):
        for exponent in (14, 18, 20, 22, 24, 26, 28):
            yield from kernels.memory_bound(1 << exponent, min(1 << exponent, 4096), dtype)
    for m, (n, k), layout in product((8192, 2048, 32768), LINEARS, LAYOUTS):
        if 2 * m * n * k <= MOST_FLOPS["cuda"]:
            yield kernels.matmul(m, n, k, "bfloat16", layout)
    for (seq, batch), head_dim, (heads, kv_heads) in product(
        ((1024, 16), (2048, 8), (4096, 4), (8192, 2)), (128, 64), ((32, 32), (32, 8), (4, 4), (4, 1), (8, 1))
    ):
        for backward in (False, True):
            yield kernels.attention(batch, heads, kv_heads, seq, head_dim, "bfloat16", backward=backward)
    for rows, width, hit in TABLES:
        for ids, dtype, backward in product((4096, 32768), ("float32", "bfloat16"), (False, True)):
            yield kernels.embedding(rows, width, ids, dtype, hit=hit, backward=backward)
    for (n, k), layout in product(LINEARS[::2], ("tn", "nt")):
        if 2 * 4096 * n * k <= MOST_FLOPS["cuda"] / 8:
            yield kernels.matmul(4096, n, k, "float32", layout)
    for heads, kv_heads, seq, backward in product((4,), (4, 1), (2048, 8192), (False, True)):
        yield kernels.attention(4, heads, kv_heads, seq, 128, "float32", backward=backward)
    for m, (n, k) in product((512, 1024, 4096), LINEARS[::2]):
        yield kernels.matmul(m, n, k, "bfloat16", "tn")
    for dtype in ("float32", "bfloat16"):
        for rows, width in ((4096, 16032), (4096, 128256)):
            yield kernels.log_softmax(rows, width, dtype)
            yield kernels.softmax(rows, width, dtype)
    for batch, m, n, k in SCORES:
        yield kernels.batched_matmul(batch, m, n, k, "bfloat16")
    for n, k in LINEARS[::4]:
        yield kernels.matmul(8192, n, k, "float16", "tn")
    for n, width, dtype in product((1 << 20, 1 << 24), (1024, 16384), ("bfloat16", "float32")):
        yield from kernels.memory_bound(n, width, dtype)
