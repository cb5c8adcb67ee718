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
from shardwise.parallel.parameters import replace_values
from shardwise.torch_private import (
    ALL_TO_ALL,
    GROUPED_MM_SHAPES,
    FakeStore,
    FakeTensorMode,
    forget_library,
    forget_meshes,
    local_part,
)
from shardwise.trace.cuda_kernels import kernels_of_cuda

TARGETS = {"cpu": Target("cpu", "gloo"), "cuda": Target("cuda", "nccl")}


class _Worlds:
    """The fake process group that this process has joined, and the mesh that DTensor's caches are of."""

    def __init__(self) -> None:
        self.are_kept = False
        self._joined: tuple[Mesh, int, str] | None = None
        self._device_mesh: DeviceMesh | None = None

    @contextmanager
    def joined(self, mesh: Mesh, rank: int, device: str) -> Iterator[DeviceMesh]:
        """Raises RunError in a process that has joined a group already."""
        if self._joined != (mesh, rank, device):
            self.leave()
        device_mesh, self._device_mesh = self._device_mesh, None  # taken: it can't be joined twice
        if device_mesh is None:
            device_mesh = _join(mesh, rank)
        try:
            yield device_mesh
        except BaseException:
            _leave()
            raise
        if self.are_kept:
            self._joined, self._device_mesh = (mesh, rank, device), device_mesh
        else:
            _leave()

    def leave(self) -> None:
        """That which was kept."""
        if self._device_mesh is not None:
            self._device_mesh = None
            _leave()


_worlds = _Worlds()


def keep_worlds(are_kept: bool = True) -> None:
    """From now on this process leaves a fake world only for another one: it does nothing but trace. What
    DTensor works out on a mesh is then worked out once, which is a sixth of a short trace's time. False: each
    ends with its context again."""
    _worlds.are_kept = are_kept
    if not are_kept:
        _worlds.leave()


@contextmanager
def fake_world(mesh: Mesh, *, rank: int, device: str) -> Iterator[DeviceMesh]:
    """The device mesh of `mesh` as `rank` sees it, over a fake process group that ends with the context
    (but see keep_worlds).

    Raises RunError in a process that has joined a process group already.
    """
    with _worlds.joined(mesh, rank, device) as device_mesh, ExitStack() as stack:
        for name, level in _LOGS.items():
            stack.enter_context(_at_least(name, level))
        stack.enter_context(as_if_on(TARGETS[device]))
        stack.enter_context(_grouped_matmuls())
        stack.enter_context(by_formula())
        if device == "cuda":
            stack.enter_context(_fused_rms_norm())
            stack.enter_context(_real_all_to_all())
            stack.enter_context(kernels_of_cuda(making_on_device))
        yield device_mesh


def _join(mesh: Mesh, rank: int) -> DeviceMesh:
    if dist.is_initialized():
        raise RunError(
            "trace: this process has joined a process group already. Trace in a process of its own, before "
            "init_process_group()."
        )
    forget_meshes()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.world_size)
    try:
        names, sizes = zip(*mesh.axes, strict=True)
        return init_device_mesh("cpu", sizes, mesh_dim_names=names)
    except BaseException:
        _leave()
        raise


def _leave() -> None:
    dist.destroy_process_group()
    forget_meshes()


def fill_with_fakes(model: nn.Module, fake_mode: FakeTensorMode) -> None:
    """Gives every parameter and buffer a fake tensor of its shape on "cpu"."""
    replace_values(model, lambda _, parameter: _fake_like(parameter, fake_mode))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            setattr(module, name, _fake_like(buffer, fake_mode))


def _fake_like(tensor: torch.Tensor, fake_mode: FakeTensorMode) -> torch.Tensor:
    """A fake on "cpu"; of a DTensor one on its mesh, cut as it is."""
    local = local_part(tensor)
    with fake_mode:
        fake = torch.empty(local.shape, dtype=local.dtype)
    if not isinstance(tensor, DTensor):
        return fake
    return DTensor.from_local(
        fake,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


_LOGS = {"torch.distributed.tensor": logging.ERROR, "torch._subclasses.fake_tensor": logging.CRITICAL}
"""What PyTorch logs in between, from which level on it is let through: DTensor warns of how a redistribution
could be faster, and the program shows what it issues; what an op's fake raises is ours to say."""


@contextmanager
def _at_least(name: str, level: int) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


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
        _check_aligned(a, b)
        if a.dtype != b.dtype or a.dtype not in (torch.float16, torch.float32):
            made: torch.Tensor = original(a, b, *args, **kwargs)
            return made
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
            dtype, size = str(operand.dtype).removeprefix("torch."), operand.element_size()
            raise RuntimeError(
                f"a grouped matmul takes rows of a multiple of 16 bytes, and {step:,} numbers of {dtype} are "
                f"{step * size:,}: a rank's part of its width must be a multiple of {16 // size}"
                if dense == 1
                else "a grouped matmul takes operands whose rows or columns lie close together, and strides "
                f"are {operand.stride()} of {dtype}"
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
