"""A trace of any size, of the shape that Kineto writes for a training step on a GPU: made, not recorded, the
same every time.

Of its events a third are CPU ops, a quarter are launches and kernels, and the rest are the flows between
them, about 220 bytes each.
"""

import random
from collections.abc import Iterator
from pathlib import Path

_KERNELS = [
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_{0}x128_32x5_tn_align8>"
    "(cutlass_80_tensorop_bf16_s16816gemm::Params)",
    "void at::native::vectorized_elementwise_kernel<{0}, at::native::CUDAFunctor_add<c10::BFloat16>, "
    "std::array<char*, 3ul> >(int)",
    "void at::native::elementwise_kernel<128, {0}, "
    "at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda>>(int)",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, {0}>(int, "
    "float)",
]
_OPS = [
    "aten::linear",
    "aten::addmm",
    "aten::mm",
    "aten::add",
    "aten::copy_",
    "aten::mul",
    "aten::_to_copy",
    "aten::native_layer_norm",
]
_STEP_US, _STEPS = 100_000.0, 10


def write_trace(path: Path, events: int, *, rank: int = 0, world_size: int = 8) -> None:
    """A trace of about `events` events at `path`."""
    with path.open("w", encoding="utf-8") as file:
        file.write(
            '{\n  "schemaVersion": 1,\n  "deviceProperties": [{"id": 0, "name": "NVIDIA H100 80GB HBM3"}],\n'
        )
        file.write(
            f'  "distributedInfo": {{"backend": "nccl", "rank": {rank}, "world_size": {world_size}}},\n  '
            '"traceEvents": [\n'
        )
        first = True
        for event in _events(events):
            file.write(event if first else ",\n" + event)
            first = False
        file.write(
            '\n  ],\n  "traceName": "trace.json",\n  "displayTimeUnit": "ms",\n  "baseTimeNanoseconds": '
            "1711964646000000000\n}\n"
        )


def _events(count: int) -> Iterator[str]:
    choose = random.Random(7)
    per_step = count // (6 * _STEPS)  # launches; each stands for six events
    correlation = 0
    for step in range(_STEPS):
        begin = 4_458_676_522_690.0 + step * _STEP_US
        yield _complete(
            "user_annotation",
            f"ProfilerStep#{step}",
            5,
            5,
            begin,
            _STEP_US - 1,
            f'"External id": {correlation + 1}',
        )
        pitch = _STEP_US / (per_step + 1)
        for number in range(per_step):
            correlation += 1
            at = begin + number * pitch
            rows = 128 * choose.randint(1, 40)
            shapes = (
                f'"Input Dims": [[{rows}, 4096], [4096, {choose.choice((1024, 4096, 14336))}], []], '
                '"Input '
                'type": ["c10::BFloat16", "c10::BFloat16", "Scalar"]'
            )
            ids = (
                f'"External id": {correlation}, "Record function id": {correlation}, "Sequence number": '
                f'{correlation}, "Fwd thread id": 0'
            )
            yield _complete(
                "cpu_op", choose.choice(_OPS), 5, 5, at, pitch * 0.9, f'{ids}, "Ev Idx": {number}'
            )
            yield _complete(
                "cpu_op",
                choose.choice(_OPS),
                5,
                5,
                at + pitch * 0.05,
                pitch * 0.8,
                f'{ids}, {shapes}, "Ev Idx": {number}',
            )
            yield _complete(
                "cuda_runtime",
                "cudaLaunchKernel",
                5,
                5,
                at + pitch * 0.1,
                pitch * 0.3,
                f'"External id": {correlation}, "cbid": 211, "correlation": {correlation}',
            )
            yield _flow("s", correlation, 5, 5, at + pitch * 0.1)
            yield _flow("f", correlation, 0, 7, at + pitch * 0.6)
            about = (
                f'"External id": {correlation}, "queued": 0, "device": 0, "context": 1, "stream": 7, '
                f'"correlation": {correlation}'
            )
            if number % 100 == 99:
                yield _complete(
                    "kernel",
                    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
                    0,
                    20,
                    at,
                    pitch * 10 + 5,
                    f'{about}, "Collective name": "allreduce", "In msg nelems": 4194304, "Out msg nelems": '
                    '4194304, "Group size": 8, "dtype": "BFloat16", '
                    '"Process Group Name": "0", "Process Group Description": "default_pg", "Process Group '
                    'Ranks": "[0, 1, 2, 3, 4, 5, 6, 7]"',
                )
            else:
                name = choose.choice(_KERNELS).format(choose.choice((64, 128, 256)))
                launch = (
                    '"registers per thread": 40, "shared memory": 400, "blocks per SM": 4.74, "grid": '
                    '[512, 1, 1], "block": [512, 1, 1]'
                )
                yield _complete(
                    "kernel",
                    name,
                    0,
                    7,
                    at + pitch * 0.6,
                    pitch * 0.7,
                    f'{about}, {launch}, "est. achieved occupancy %": 75',
                )


def _complete(cat: str, name: str, pid: int, tid: int, at: float, duration: float, args: str) -> str:
    return (
        f'  {{\n  "ph": "X", "cat": "{cat}", "name": "{name}", "pid": {pid}, "tid": {tid}, "ts": {at:.3f}, '
        f'"dur": {duration:.3f}, "args": {{{args}}}\n  }}'
    )


def _flow(phase: str, number: int, pid: int, tid: int, at: float) -> str:
    ends = ', "bp": "e"' if phase == "f" else ""
    return (
        f'  {{\n    "ph": "{phase}", "id": {number}, "pid": {pid}, "tid": {tid}, "ts": {at:.3f},\n    '
        f'"cat": "ac2g", "name": "ac2g"{ends}\n  }}'
    )
