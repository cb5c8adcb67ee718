"""torchtitan's decoders as its trainer builds and shards them, on any machine.

What its tensor and expert parallelism do is carried out (`Module.parallelize`); its FSDP, compiler and
checkpointing aren't: FSDP is Shardwise's own, over the mesh's fsdp axis. Of its backends two leave DTensors;
`spmd_types`, the default, leaves plain tensors, whose placements its types tell: S(dim) is a shard, R a
parameter that is whole and whose gradient each rank has a summand of, I one whose gradient is whole too.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from shardwise.core.errors import ModelError
from shardwise.core.layer_name import any_layer
from shardwise.core.mesh import EXPERTS_AXIS, TENSOR_AXIS
from shardwise.core.plan import suggest
from shardwise.core.shown import shown
from shardwise.models.frameworks.framework import Framework, FrameworkModel, Make
from shardwise.models.self_sharded import SelfSharded, ShardsItself
from shardwise.models.spmd_types import changes_of, placements_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BACKENDS = ("spmd_types", "partial_dtensor", "full_dtensor")
# its rotary tables are as long as this, for every layer; a flavor's own length may be 131,072
MAX_SEQ = 8192
_MOST_EXPERTS, _EXPERTS_PER_CHOICE = 8, 4


@dataclass(frozen=True, slots=True)
class Wanted:
    """What may stand behind the question mark. layers: the first so many. experts: of each mixture; a token
    then chooses a quarter of them at most. expert_parallel: ranks of tp that share experts out. attention:
    its attn_backend. max_seq_len: of the rotary tables; 0 is the model's own, and 8,192 at most."""

    backend: str = BACKENDS[0]
    layers: int = 0
    experts: int = 0
    sequence_parallel: bool = True
    expert_parallel: int = 1
    attention: str = "flex"
    max_seq_len: int = 0


NAMINGS = (
    (
        "titan:FAMILY/FLAVOR",
        "a model of torchtitan as it shards it itself, such as titan:llama3/debugmodel (under plan own)",
    ),
    (
        "titan:...?KEY=VALUE,...",
        f"with another backend ({', '.join(BACKENDS)}) or other numbers: "
        f"{', '.join(field.name for field in fields(Wanted)[1:])}; such as "
        "titan:llama3/debugmodel?backend=partial_dtensor,layers=2,sequence_parallel=false",
    ),
)


def find(framework: Framework, asked: str) -> ShardsItself:
    """Raises ModelError for a family, a flavor or a key that isn't known."""
    name, _, query = asked.partition("?")
    family, _, flavor = name.partition("/")
    where = f'model "{framework.named(asked)}"'
    wanted = _wanted(query, where)
    try:
        source = _family(family, where)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        raise framework.failed(asked, "can't be imported", error) from error
    flavors = _flavors(source)
    if flavor not in flavors:
        raise ModelError(
            f'{where}: {framework.name}\'s {family} has no flavor "{flavor}".{suggest(flavor, flavors)} '
            f"Known: {', '.join(flavors)}."
        )
    try:
        config = _config(source, flavor, wanted, 1)
    except ValueError as error:
        raise framework.failed(asked, "can't make its configuration", error) from error
    return FrameworkModel(
        framework,
        asked,
        f"torchtitan's {family}, {flavor}, by its backend {wanted.backend}",
        partial(_make, source, flavor, wanted),
        vocab_size=config.vocab_size,
        max_seq=_longest(config, wanted),
        make_small=_smaller(source, flavor, wanted),
    )


FRAMEWORK = Framework("titan", "torchtitan", "torchtitan", "titan", ("0.3.0",), NAMINGS, find)


def _wanted(query: str, where: str) -> Wanted:
    known: dict[str, type] = {field.name: type(getattr(Wanted(), field.name)) for field in fields(Wanted)}
    found: dict[str, Any] = {}
    for part in query.split(",") if query else ():
        key, equals, text = (each.strip() for each in part.partition("="))
        if key not in known or not equals:
            raise ModelError(
                f'{where}: no key "{shown(key)}".{suggest(key, known)} Known: {", ".join(known)}.'
            )
        if known[key] is bool and text in ("true", "false"):
            found[key] = text == "true"
        elif known[key] is int and text.isdecimal():
            found[key] = int(text)
        elif known[key] is str:
            found[key] = text
        else:
            kind = "true or false" if known[key] is bool else "a number"
            raise ModelError(f'{where}: {key} is "{shown(text)}". Write {kind}.')
    wanted = Wanted(**found)
    if wanted.backend not in BACKENDS:
        raise ModelError(
            f'{where}: backend is "{shown(wanted.backend)}".{suggest(wanted.backend, BACKENDS)} Allowed: '
            f"{', '.join(BACKENDS)}."
        )
    return wanted


def _family(family: str, where: str) -> ModuleType:
    """The package of a family's models. Raises ModelError where there is none of that name."""
    models = importlib.import_module("torchtitan.models")
    folders = (folder for path in models.__path__ for folder in Path(path).iterdir())
    names = sorted(folder.name for folder in folders if (folder / "parallelize.py").is_file())
    found = importlib.import_module(f"{models.__name__}.{family}") if family in names else None
    if not hasattr(found, "model_registry"):
        raise ModelError(
            f'{where}: torchtitan has no model "{family}".{suggest(family, names)} Known: '
            f"{', '.join(names)}; write FAMILY/FLAVOR."
        )
    assert found is not None
    return found


def _flavors(family: ModuleType) -> list[str]:
    tables = (value for name, value in vars(family).items() if name.endswith("_configs"))
    return [flavor for table in tables if isinstance(table, Mapping) for flavor in table]


def _config(family: ModuleType, flavor: str, wanted: Wanted, tp: int, experts: int = 1) -> Any:
    """A model's configuration for so many ranks of tp and of experts."""
    from torchtitan.config import ParallelismConfig

    config = family.model_registry(flavor, attn_backend=wanted.attention).model
    if wanted.layers:
        config.layers = config.layers[: wanted.layers]
    longest = _longest(config, wanted)
    for layer in config.layers:
        if (rope := getattr(layer.attention, "rope", None)) is not None:
            layer.attention.rope = replace(rope, max_seq_len=longest)
        if wanted.experts and layer.moe is not None:
            _share_out(layer.moe, wanted.experts)
    parallelism = ParallelismConfig(
        tensor_parallel_degree=tp,
        expert_parallel_degree=experts,
        enable_sequence_parallel=wanted.sequence_parallel,
        spmd_backend=wanted.backend,
    )
    with _without_trainer():
        config.update_from_config(config=SimpleNamespace(parallelism=parallelism))
    return config


@contextmanager
def _without_trainer() -> Iterator[None]:
    """A configuration asks whether it is the trainer that changes it, and to know that imports all of it:
    datasets, boards, seconds."""
    name = "torchtitan.trainer"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name])["Trainer"] = SimpleNamespace(Config=type("Config", (), {}))
    try:
        yield
    finally:
        del sys.modules[name]


def _longest(config: Any, wanted: Wanted) -> int:
    longest: int = wanted.max_seq_len or min(config.max_seq_len, MAX_SEQ)
    return longest


def _share_out(moe: Any, experts: int) -> None:
    """Gives a mixture's configuration so many experts."""
    before = moe.num_experts
    for each in _configs_in(moe):
        if getattr(each, "num_experts", None) == before:
            each.num_experts = experts
        if getattr(each, "out_features", None) == before:
            each.out_features = experts
        if getattr(each, "top_k", None) is not None:
            each.top_k = min(each.top_k, max(1, experts // _EXPERTS_PER_CHOICE))


def _configs_in(config: Any) -> Iterator[Any]:
    yield config
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            yield from _configs_in(value)


def _smaller(family: ModuleType, flavor: str, wanted: Wanted) -> Callable[[int], Make] | None:
    """Of torchtitan's own small flavor of the same modules, with one layer of each kind and few experts; None
    where it has no such flavor."""
    kinds = _kinds(family, flavor, wanted)
    for small in (each for each in _flavors(family) if each.startswith("debug")):
        config = _config(family, small, wanted, 1)
        dense = sum(layer.moe is None for layer in config.layers)
        layers = min(len(config.layers), dense + 1 if 0 < dense < len(config.layers) else 2)
        experts = min((layer.moe.num_experts for layer in config.layers if layer.moe), default=0)
        fewer = replace(wanted, layers=layers, experts=min(experts, _MOST_EXPERTS))
        if _kinds(family, small, fewer) == kinds:
            return lambda _: partial(_make, family, small, fewer)
    return None


def _kinds(family: ModuleType, flavor: str, wanted: Wanted) -> set[tuple[str, str]]:
    with torch.device("meta"):
        model = _config(family, flavor, wanted, 1).build()
    return {(any_layer(name), type(module).__name__) for name, module in model.named_modules()}


def _make(family: ModuleType, flavor: str, wanted: Wanted, mesh: "DeviceMesh | None") -> SelfSharded:
    from torchtitan.distributed import utils

    utils.set_spmd_backend(wanted.backend)
    if mesh is None:
        model: Any = _config(family, flavor, wanted, 1).build()
        model.init_states()
        return SelfSharded(model, logits=partial(_logits, model, wanted, None, None))
    tp, experts = _size(mesh, TENSOR_AXIS), max(wanted.expert_parallel, _size(mesh, EXPERTS_AXIS))
    config, dims = _config(family, flavor, wanted, tp, experts), _dims(wanted, mesh, tp, experts)
    if wanted.backend == "spmd_types":
        model = _plain(config, dims)
        cut = _cut_over(mesh)
        placements, gradients = placements_of(model, cut)
        logits = partial(_logits, model, wanted, mesh, dims)
        return SelfSharded(
            model, placements=placements, gradients=gradients, mesh=cut, logits=logits, changes=changes_of
        )
    model = _of_dtensors(config, dims)
    return SelfSharded(model, logits=partial(_logits, model, wanted, mesh, dims))


def _of_dtensors(config: Any, dims: Any) -> Any:
    """In the order of torchtitan's trainer: made on the meta device, cut, given memory, initialised (which
    ties weights again)."""
    device = torch.get_default_device()
    with torch.device("meta"):
        model = config.build()
    model.parallelize(dims)
    if device.type != "meta":
        model.to_empty(device=device)
    model.init_states()
    return model


def _plain(config: Any, dims: Any) -> Any:
    """Initialised whole: a part, where no FSDP has made a DTensor of it, isn't what an initialiser takes."""
    model = config.build()
    model.init_states()
    model.parallelize(dims)
    if model.enable_weight_tying:
        model.tok_embeddings.weight = model.lm_head.weight
    return model


def _size(mesh: "DeviceMesh", axis: str) -> int:
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1 and axis == TENSOR_AXIS and EXPERTS_AXIS not in names:
        return mesh.size()
    return mesh.size(names.index(axis)) if axis in names else 1


def _cut_over(mesh: "DeviceMesh") -> "DeviceMesh":
    """The axes over which parameters are cut, and not by a step's FSDP."""
    names = tuple(name for name in mesh.mesh_dim_names or () if name in (EXPERTS_AXIS, TENSOR_AXIS))
    return mesh[names] if mesh.ndim > 1 else mesh


def _dims(wanted: Wanted, mesh: "DeviceMesh", tp: int, experts: int) -> Any:
    """Its meshes over the same ranks. It asks the machine for a device type, where it has a GPU another than
    the mesh's."""
    from torchtitan.distributed import parallel_dims

    dims = parallel_dims.ParallelDims(
        dp_replicate=1,
        dp_shard=mesh.size() // tp,
        cp=1,
        tp=tp,
        pp=1,
        ep=experts,
        world_size=mesh.size(),
        spmd_backend=wanted.backend,
    )
    with patch.object(parallel_dims, "device_type", mesh.device_type):
        dims.build_mesh()
    return dims


def _logits(
    model: Any,
    wanted: Wanted,
    mesh: "DeviceMesh | None",
    dims: Any,
    forward: Callable[..., Any],
    ids_BS: Tensor,
) -> Tensor:
    """Its forward wants positions and masks too, and each backend its own surroundings; a head that is cut by
    rows leaves each rank its part of the vocabulary."""
    from torchtitan.distributed import utils

    utils.set_spmd_backend(wanted.backend)
    positions = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(ids_BS.shape[0], -1)
    masks = model.get_attention_masks(positions)
    if mesh is None or dims is None:
        logits: Tensor = forward(ids_BS, positions, masks)
        return logits
    around: AbstractContextManager[Any] = nullcontext()
    if wanted.backend == "full_dtensor":
        from torchtitan.distributed.full_dtensor import parallelize_inputs

        ids_BS, _, more = parallelize_inputs(dims, ids_BS, ids_BS, {"positions": positions})
        positions = more["positions"]
    elif wanted.backend == "spmd_types":
        around = utils.get_spmd_context(parallel_dims=dims)()
    with around:
        logits = forward(ids_BS, positions, masks)
    tp = mesh[TENSOR_AXIS] if mesh.ndim > 1 and TENSOR_AXIS in (mesh.mesh_dim_names or ()) else mesh
    local = logits.to_local() if isinstance(logits, DTensor) else logits
    if local.shape[-1] == model.config.vocab_size:
        return local
    return DTensor.from_local(local, tp, [Shard(2)], run_check=False)
