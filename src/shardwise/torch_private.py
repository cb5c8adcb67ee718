"""PyTorch's private names, all of those that Shardwise uses, and whether this PyTorch has them.

Nobody else writes one. A name that a version lacks doesn't break the import: check() says in one line what is
missing, and in which version, before anything is traced, sharded or timed. To follow a new version, mend the
name here.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.core.errors import TorchError

_missing: list[str] = []


class _Absent:
    """What stands for a name that this PyTorch hasn't."""


def _find(module: str, path: str) -> Any:
    """module.path, or _Absent, which is noted."""
    try:
        owner: Any = importlib.import_module(module)
        for name in path.split("."):
            owner = getattr(owner, name)
    except (ImportError, AttributeError):
        _missing.append(f"{module}.{path}")
        return _Absent
    return owner


def _place(module: str, name: str) -> tuple[Any, str]:
    """A module and what it calls so, for a patch."""
    return _Absent if _find(module, name) is _Absent else sys.modules[module], name


def check() -> None:
    """Raises TorchError where this PyTorch lacks a name."""
    if _missing:
        raise TorchError(complaint(torch.__version__, _missing))


def complaint(version: str, missing: list[str]) -> str:
    """One line: what PyTorch `version` lacks."""
    return (
        f"torch {version} has no {', '.join(missing)}, which Shardwise uses. "
        "Use a version that it is tested with (README), or a newer Shardwise."
    )


# ------------------------------------------------------------------------------------------ the dispatcher

try:  # classes, which others inherit from and ask for
    from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
    from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.distributed._functional_collectives import AsyncCollectiveTensor as AsyncCollectiveTensor
    from torch.distributed.tensor.placement_types import _StridedShard
    from torch.nn.modules.dropout import _DropoutNd
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
except ImportError as error:
    # cannot import name 'x' from 'torch.y', or No module named 'torch.y'
    quoted = str(error).split("'")[1::2]
    raise TorchError(complaint(torch.__version__, [".".join(quoted[1::-1])])) from None
StridedShard, AnyDropout = _StridedShard, _DropoutNd

has_kernel: Callable[[str, str], bool] = _find("torch._C", "_dispatch_has_kernel_for_dispatch_key")
"""(op, dispatch key) -> whether there is a kernel."""
device_factories: Callable[[], Any] = _find("torch.utils._device", "_device_constructors")
"""Functions that make a tensor where their `device` says."""
_dispatch_modes = _find("torch._C", "_len_torch_dispatch_stack")
_disable_torch_function = _find("torch._C", "DisableTorchFunction")
_cpu_key = _find("torch._C", "DispatchKey.CPU")
in_meta_kernels: Callable[[FakeTensorMode], AbstractContextManager[None]] = _find(
    "torch._subclasses.fake_tensor", "in_kernel_invocation_manager"
)
"""Inside, ops on a mode's fakes run on their meta tensors, and give meta tensors."""


def is_dispatching() -> bool:
    """Whether a mode stands at the dispatcher now, in this thread."""
    return bool(_dispatch_modes() > 0)


def schema_of(func: Any) -> Any:
    """Of a dispatcher op."""
    return func._schema


HigherOrderOperator = _find("torch._ops", "HigherOrderOperator")
"""What a dispatcher op that takes functions is; it has no schema."""
without_modes: Callable[[], Any] = _find("torch.utils._python_dispatch", "_disable_current_modes")
"""A context in which no mode stands at the dispatcher."""


def is_higher_order(func: Any) -> bool:
    return isinstance(func, HigherOrderOperator)


def is_sum(reduction: Any) -> bool:
    """Whether a reduction, as c10d's ops are given one, is a sum."""
    of_sums: Any = torch.distributed.ReduceOp.SUM
    return bool(reduction.op() == int(of_sums))


def overload_of(func: Any) -> str:
    """The name of a dispatcher op's overload."""
    return str(func._overloadname)


def call_cpu_kernel(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a dispatcher op's kernel for a CPU with the tensors as they are, fake ones too."""
    with _disable_torch_function():
        return func._op_dk(_cpu_key, *args, **kwargs)


def forget_library(library: torch.library.Library) -> None:
    """Takes back what a Library registered."""
    library._destroy()


# --------------------------------------------------------------------------------------------- autograd

graph_task: Callable[[], int] = _find("torch._C", "_current_graph_task_id")
current_node: Callable[[], Any] = _find("torch._C", "_current_autograd_node")
"""None outside a backward and at its end, whatever its stub says."""
next_sequence: Callable[[], int] = _find("torch._C", "_autograd._get_sequence_nr")
NO_SEQUENCE = 2**63
"""From here on a node's sequence number is none: AccumulateGrad has none."""
_queue_callback = _find("torch.autograd", "Variable._execution_engine.queue_callback")


def in_backward() -> bool:
    return graph_task() != -1


def sequence_of(node: Any) -> int:
    """When an autograd node was made, as next_sequence() counted then."""
    return int(node._sequence_nr())


def after_backward(call: Callable[[], None]) -> None:
    """Runs `call` at the end of the backward that is running."""
    _queue_callback(call)


def is_profiling() -> bool:
    profiler: Any = torch.autograd.profiler
    return bool(profiler._is_profiler_enabled)


# ------------------------------------------------------------------------------------ tensors and modules

grouped_mm: Callable[..., Tensor] = _find("torch", "_grouped_mm")
foreach_norm: Callable[..., tuple[Tensor, ...]] = _find("torch", "_foreach_norm")
foreach_mul_: Callable[..., None] = _find("torch", "_foreach_mul_")
fused_adamw_: Callable[..., None] = _find("torch", "_fused_adamw_")
softmax_backward: Callable[..., Tensor] = _find("torch", "_softmax_backward_data")
cuda_sleep: Callable[[int], None] = _find("torch.cuda", "_sleep")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
tree_flatten: Callable[[Any], tuple[list[Any], Any]] = _find("torch.utils._pytree", "tree_flatten")
"""(leaves of nested containers, their structure)."""
tree_map: Callable[[Callable[[Any], Any], Any], Any] = _find("torch.utils._pytree", "tree_map")


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """What a module's own forward finds as its own parameters: what is put there, it reads."""
    found: dict[str, Any] = module._parameters
    return found


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """The same of its buffers."""
    found: dict[str, Any] = module._buffers
    return found


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that state_dict() has, under the names that it gives them, each tensor once."""
    known: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or id(buffer) in known:
                continue
            known.add(id(buffer))
            yield f"{prefix}.{name}" if prefix else name, buffer


def modules_in(module: nn.Module) -> dict[str, Any]:
    """The same of the modules in it: what a ModuleList's loop goes through."""
    found: dict[str, Any] = module._modules
    return found


def put_modules(module: nn.Module, modules: dict[str, Any]) -> None:
    """Puts other modules in their places, all at once: without the hooks of registering, and under any
    names."""
    module._modules = modules


def storage_key(storage: torch.UntypedStorage) -> int:
    """A storage's identity: equal for all tensors that share it."""
    return int(storage._cdata)


def hooks_of(parameter: Tensor) -> tuple[list[Any], list[Any]]:
    """(hooks on its gradient, hooks after that is accumulated)."""
    after = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return list((parameter._backward_hooks or {}).values()), list((after or {}).values())


def set_hooks_again(parameter: Tensor) -> None:
    """Module.to() leaves the dict of hooks behind without its tensor, which then calls none; set again, it is
    the new tensor's."""
    if parameter._backward_hooks is not None:
        parameter._backward_hooks = parameter._backward_hooks


def hook_counts(module: nn.Module) -> tuple[int, ...]:
    """How many hooks a module has of each kind."""
    return tuple(len(getattr(module, hooks)) for hooks in _HOOKS)


# -------------------------------------------------------------------------------------------- flex attention

_no_mask = _find("torch.nn.attention.flex_attention", "noop_mask")
FLEX_DEVICE_CHECK = _place("torch.nn.attention.flex_attention", "_validate_device")
"""(queries, keys, values): refuses a backward on a CPU, for which nothing is compiled."""
FLEX_UNCOMPILED = _place("torch.nn.attention.flex_attention", "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG")
"""Whether it runs by its formula, not compiled."""
FLEX_GRAPH = _place("torch._higher_order_ops.flex_attention", "create_fw_bw_graph")
"""(function on scores, examples, what it captures): where its backward is worked out."""
FLEX_MASK = _find("torch.nn.attention.flex_attention", "BlockMask")
_no_change = _find("torch.nn.attention.flex_attention", "_identity")


def changes_nothing(function: Any) -> bool:
    """Whether flex attention's function on scores is the one that it takes where none is given."""
    return function is _no_change


def masks_nothing(mask: Any) -> bool:
    """Whether flex attention's mask is the one that it takes where none is given."""
    return getattr(mask, "fn", mask) is _no_mask


# ------------------------------------------------------------------------------- process groups and DTensor

FakeStore = _find("torch.testing._internal.distributed.fake_pg", "FakeStore")
default_store: Callable[[], Any] = _find("torch.distributed.distributed_c10d", "_get_default_store")
group_named: Callable[[str], torch.distributed.ProcessGroup] = _find(
    "torch.distributed.distributed_c10d", "_resolve_process_group"
)
_set_default_group = _find("torch.distributed.distributed_c10d", "_update_default_pg")
_ranks_of_groups = _find("torch.distributed.distributed_c10d", "_world.pg_group_ranks")
local_shape_and_offset: Callable[..., tuple[tuple[int, ...], tuple[int, ...]]] = _find(
    "torch.distributed.tensor._utils", "compute_local_shape_and_global_offset"
)
_dtensor = _find("torch.distributed.tensor", "DTensor")
_clear_sharding_cache = _find("torch.distributed.tensor.debug", "_clear_sharding_prop_cache")
_transform_infos = _find("torch.distributed.tensor._redistribute", "_gen_transform_infos")
_propagator = _find("torch.distributed.tensor._sharding_prop", "ShardingPropagator")
_fsdp_buffers = _find("torch.distributed.fsdp._fully_shard._fsdp_collectives", "DefaultAllocMixin")
_placements = _find("torch.distributed.tensor", "placement_types")
_param_group = _find("torch.distributed.fsdp._fully_shard._fsdp_param_group", "FSDPParamGroup")
_fsdp_module = _find("torch.distributed.fsdp", "FSDPModule")
_find("torch.distributed.fsdp", "FSDPModule._get_fsdp_state")
_flight_record = _find("torch._C._distributed_c10d", "_dump_fr_trace_json")
# only PyTorch with CUDA has it
_nccl_flight_record = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
_find("torch.distributed.device_mesh", "DeviceMesh._flatten")
ALL_TO_ALL = (_placements, "shard_dim_alltoall")
"""Where DTensor swaps the dim that is cut: a gather of everything on a CPU."""
FSDP_ALLOCATION = (_fsdp_buffers, "allocate")
"""Where FSDP2 takes its communication buffers from the device."""
GROUPED_MM_SHAPES = (_find("torch", "_meta_registrations"), "_meta_grouped_mm_common")
"""What a grouped matmul gives, of tensors without data."""


def flattened(mesh: Any, names: tuple[str, ...], name: str) -> Any:
    """The 1-D mesh, of that name, of several dims of a device mesh together; the same one each time. All
    ranks call it."""
    return mesh[names]._flatten(name)


def root_of(mesh: Any) -> Any:
    """The mesh of which this one is a part; itself where it isn't."""
    root = getattr(mesh, "_get_root_mesh", None)
    return root() if callable(root) else mesh


def _places(owners: list[Any], *names: str) -> list[tuple[Any, str]]:
    """Those of the owners' names that there are; at least one must be."""
    places = [(owner, name) for owner in owners for name in names if hasattr(owner, name)]
    if not places:
        _missing.append(" or ".join(names))
    return places


REDISTRIBUTIONS = _places(
    [
        importlib.import_module(f"torch.distributed.tensor.{module}")
        for module in ("_api", "_dispatch", "_redistribute")
    ],
    "redistribute_local_tensor",
)
"""Where DTensor changes a placement: (local tensor, spec before, spec after, ...)."""
[PROPAGATION] = _places([_propagator], "propagate_op_sharding_non_cached")
"""Where DTensor works out what becomes of an op's placements."""
[SHAPE_PROPAGATION] = _places([_propagator], "_propagate_tensor_meta_non_cached")
"""Where it runs an op at its global shape to learn the shape of its result: (propagator, what runs)."""


@contextmanager
def default_group(group: torch.distributed.ProcessGroup) -> Iterator[None]:
    """Inside, `group` is the world: of one rank, a process is as if alone."""
    world = torch.distributed.group.WORLD
    _set_default_group(group)
    try:
        yield
    finally:
        _set_default_group(world)


@contextmanager
def told_ranks_of(group: torch.distributed.ProcessGroup, size: int) -> Iterator[None]:
    """A group that isn't registered is known to have ranks 0 to size - 1, as point-to-point calls ask."""
    _ranks_of_groups[group] = {rank: rank for rank in range(size)}
    try:
        yield
    finally:
        del _ranks_of_groups[group]


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; a plain one is that itself."""
    return tensor._local_tensor if isinstance(tensor, _dtensor) else tensor


def forget_meshes() -> None:
    """DTensor caches what it works out by mesh, and equal meshes count as one: the shapes and groups of one
    rank would be another's."""
    _clear_sharding_cache()
    _transform_infos.cache_clear()
    _dtensor._op_dispatcher.sharding_propagator._propagate_tensor_meta_cached.cache_clear()


def name_of_unit(thing: object) -> str:
    """The name of the module whose parameters FSDP gathers and reduces by this group of its; empty for
    anything else, and before the first forward."""
    return (thing._module_fqn or "") if isinstance(thing, _param_group) else ""


def replicas_of_fsdp(model: nn.Module) -> Iterator[tuple[Tensor, torch.distributed.ProcessGroup]]:
    """Parameters that FSDP2 holds on several meshes alike (hybrid sharding, replicate()), each with the group
    over which it adds their gradients itself."""
    for group in (group for module in model.modules() for group in _fsdp_groups(module)):
        replicas = getattr(group.mesh_info, "replicate_process_group", None)
        if replicas is not None:
            yield from ((each.sharded_param, replicas) for each in group.fsdp_params)


def keeps_parameters(module: object) -> bool:
    """Whether FSDP2 leaves a unit's parameters whole after its forward."""
    return any(group.post_forward_mesh_info is None for group in _fsdp_groups(module))


def _fsdp_groups(module: object) -> Any:
    state = module._get_fsdp_state() if isinstance(module, _fsdp_module) else None
    return state._fsdp_param_groups if state is not None else ()


def flight_records() -> list[bytes]:
    """What PyTorch's flight recorders noted of this rank's collectives, as JSON: gloo's, and NCCL's where
    PyTorch is built with it."""
    return [dump(True, True) for dump in (_flight_record, _nccl_flight_record) if dump is not None]


# ------------------------------------------------------------------------------------------------ pipelines


def run_micro_batches(schedule: Any, keywords: list[dict[str, Any]], losses: list[Tensor]) -> None:
    """Runs a schedule of torch.distributed.pipelining on micro-batches that are cut already, as its step()
    would after cutting. keywords: of each, for every stage's module. losses: those of the last stage come
    here."""
    stages = getattr(schedule, "_stages", None) or [schedule._stage]
    for stage in stages:
        stage.has_backward = True
        stage.clear_runtime_states()
    targets = [None] * len(keywords)
    schedule._step_microbatches(kwarg_mbs=keywords, target_mbs=targets, losses=losses, return_outputs=False)
