"""A world without devices: a fake process group, fake tensors, and the choices that PyTorch would make on
another device.

Weights are FakeTensors on "cpu": they have shapes and no memory. Token ids stay real, on the host, because
the styles decide by them. What comes onto the device (`.to(device)`, or made there) is fake.

What is compiled is traced as it is written, and flex attention as one op (higher_order.py).

A grouped matmul takes half precision and float32 wherever it runs; its fake takes bfloat16 alone, so it is
steered.

Inside `fake_world(...)` of device "cuda", choices that PyTorch makes by the device below Python are steered:
RMSNorm is one fused op, DTensor's all-to-all is a real one (on a CPU it gathers everything instead),
attention and dropout run the kernels that CUDA has (cuda_kernels.py), and the native engine takes NCCL's way.
The rest is mapped by name in catalogue.py. All of it is undone on the way out.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from shardwise.core.errors import RunError
from shardwise.core.mesh import Mesh
from shardwise.models.flex_attention import by_formula
from shardwise.parallel.axis import Target, as_if_on
from shardwise.parallel.parameters import fill
from shardwise.torch_private import (
    ALL_TO_ALL,
    GROUPED_MM_SHAPES,
    FakeStore,
    FakeTensorMode,
    forget_library,
    forget_meshes,
)
from shardwise.trace.cuda_kernels import kernels_of_cuda

TARGETS = {"cpu": Target("cpu", "gloo"), "cuda": Target("cuda", "nccl")}


@contextmanager
def fake_world(mesh: Mesh, *, rank: int, device: str) -> Iterator[DeviceMesh]:
    """The device mesh of `mesh` as `rank` sees it, over a fake process group that ends with the context.

    Raises RunError in a process that has joined a process group already.
    """
    if dist.is_initialized():
        raise RunError(
            "trace: this process has joined a process group already. Trace in a process of its own, before "
            "init_process_group()."
        )
    forget_meshes()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.world_size)
    try:
        with ExitStack() as stack:
            stack.enter_context(_without_dtensor_s_advice())
            stack.enter_context(as_if_on(TARGETS[device]))
            stack.enter_context(_grouped_matmuls())
            stack.enter_context(by_formula())
            if device == "cuda":
                stack.enter_context(_fused_rms_norm())
                stack.enter_context(_real_all_to_all())
                stack.enter_context(kernels_of_cuda(making_on_device))
            names = tuple(name for name, _ in mesh.axes)
            yield init_device_mesh("cpu", tuple(size for _, size in mesh.axes), mesh_dim_names=names)
    finally:
        dist.destroy_process_group()
        forget_meshes()


def fill_with_fakes(model: nn.Module, fake_mode: FakeTensorMode) -> None:
    """Gives every parameter and buffer a fake tensor of its shape on "cpu"."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}

    def whole(name: str, shape: torch.Size) -> torch.Tensor:
        with fake_mode:
            return torch.empty(shape, dtype=dtypes[name])

    fill(model, whole, {})
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            setattr(module, name, _fake_like(buffer, fake_mode))


def _fake_like(buffer: torch.Tensor, fake_mode: FakeTensorMode) -> torch.Tensor:
    """A fake on "cpu"; of a DTensor one on its mesh, cut as it is."""
    local = buffer.to_local() if isinstance(buffer, DTensor) else buffer
    with fake_mode:
        fake = torch.empty(local.shape, dtype=local.dtype)
    if not isinstance(buffer, DTensor):
        return fake
    return DTensor.from_local(
        fake,
        buffer.device_mesh,
        buffer.placements,
        run_check=False,
        shape=buffer.shape,
        stride=buffer.stride(),
    )


@contextmanager
def _without_dtensor_s_advice() -> Iterator[None]:
    """DTensor logs warnings on how a redistribution could be faster. The program shows what it issues; the
    log would say it in between."""
    logger = logging.getLogger("torch.distributed.tensor")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _fused_rms_norm() -> Iterator[None]:
    """A CPU takes RMSNorm apart in C++ because it has no kernel for the fused op; with one registered,
    PyTorch dispatches as on CUDA."""

    def never_runs(*_: object) -> None:
        raise AssertionError("a fake tensor has no kernel to run")

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that a kernel is overridden
        for name in ("_fused_rms_norm", "_fused_rms_norm_backward"):
            library.impl(name, never_runs, "CPU")
    try:
        yield
    finally:
        forget_library(library)


@contextmanager
def _grouped_matmuls() -> Iterator[None]:
    """PyTorch's kernels take bfloat16, float16 and float32 (at::native::_grouped_mm_validate_inputs); what
    they would refuse of sizes is refused here."""
    original = getattr(*GROUPED_MM_SHAPES)

    def shapes(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if a.dtype != b.dtype or a.dtype not in (torch.float16, torch.float32):
            made: torch.Tensor = original(a, b, *args, **kwargs)
            return made
        _check_aligned(a, b)
        ends = kwargs.get("offs")
        rows, columns = a.shape[-2], b.shape[-1]
        groups = () if a.dim() != b.dim() else (a.shape[0],) if ends is None else ends.shape
        return torch.empty(
            (*groups, rows, columns), dtype=kwargs.get("out_dtype") or a.dtype, device=a.device
        )

    with patch.object(*GROUPED_MM_SHAPES, shapes):
        yield


def _check_aligned(*operands: torch.Tensor) -> None:
    """Rows or columns must be dense, and each begin at a multiple of 16 bytes."""
    for operand in operands:
        *_, rows, columns = operand.stride()
        step, dense = max(rows, columns), min(rows, columns)
        if dense != 1 or step * operand.element_size() % 16:
            raise RuntimeError(
                "grouped_mm takes operands whose rows or columns are dense and begin at multiples of 16 "
                f"bytes; strides are {operand.stride()} of {operand.dtype}"
            )


_on_device: ContextVar[bool] = ContextVar("_on_device", default=False)


@contextmanager
def making_on_device() -> Iterator[None]:
    """Factory ops inside make their tensors on the device."""
    token = _on_device.set(True)
    try:
        yield
    finally:
        _on_device.reset(token)


def is_made_on_device() -> bool:
    """Whether a factory op's tensor lies on the device: where the program names it, and the mask of attention
    that is decomposed."""
    return _on_device.get()


@contextmanager
def _real_all_to_all() -> Iterator[None]:
    def shard_dim_alltoall(
        input: torch.Tensor, gather_dim: int, shard_dim: int, mesh: DeviceMesh, mesh_dim: int
    ) -> torch.Tensor:
        group = mesh.get_group(mesh_dim)
        exchange = torch.ops._dtensor.shard_dim_alltoall
        return exchange(input, gather_dim, shard_dim, group.group_name)  # type: ignore[no-any-return]

    with patch.object(*ALL_TO_ALL, shard_dim_alltoall):
        yield
