"""Loop: a training step and all that goes with it, and how each is called, whole and on ranks."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from shardwise.core.batch_part import part_of_batch
from shardwise.core.errors import ModelError, OptionError
from shardwise.core.mesh import NAMES, role_of, sees_other_tokens
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.models.factory import FactoryModel
from shardwise.models.source import ModelSource, vocab_size_of
from shardwise.parallel.any_plan import apply_any
from shardwise.parallel.loss import IGNORED
from shardwise.parallel.self_sharded import build_sharded
from shardwise.step.build import set_in_place
from shardwise.step.groups import mesh_of, rank_in
from shardwise.step.portion import micro_batches_of
from shardwise.torch_private import tree_map
from shardwise.verify.examine import seeded

SEED = 0
_OFFERED = ("model", "batch", "optimizer", "mesh", "number")


@dataclass(frozen=True)
class Loop:
    """step: called by the names of its arguments. source: of the whole model, and of the sharded one, unless
    a plan shards it. optimizer: from a model to what the step is given. batches: from a step's number, from
    0, to the global batch. deal: from (global batch, mesh) to this rank's. data: axes whose ranks see other
    parts of the batch; None goes by their names. shape: (batch, seq) of random ids, where nobody gives
    batches."""

    step: Callable[..., Any]
    source: ModelSource
    optimizer: Callable[[nn.Module], Any] | None
    batches: Callable[[int], Any] | None
    deal: Callable[..., Any] | None
    plan: AnyPlan | None
    data: tuple[str, ...] | None
    steps: int
    shape: tuple[int, int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Raises OptionError for a step that needs what nobody gives it."""
        for each in inspect.signature(self.step).parameters.values():
            is_open = each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
            if each.name not in _OFFERED and each.default is each.empty and not is_open:
                raise OptionError(
                    f'step: it needs an argument "{each.name}". It may take {", ".join(_OFFERED)}, each by '
                    "that name; give any other a default."
                )

    def run(self, **given: Any) -> Any:
        """One step: what it returns."""
        takes = inspect.signature(self.step).parameters
        return self.step(**{name: value for name, value in given.items() if name in takes})

    def whole(self, device: torch.device) -> nn.Module:
        """The same on every rank."""
        return seeded(self.source, self.dtype, device)

    def sharded(self, mesh: DeviceMesh, device: torch.device) -> nn.Module:
        """As the factory, or the plan, shards it, with the whole one's weights. All ranks call it."""
        whole = self.whole(device)
        if self.plan is not None and self.plan is not TheirPlan.OWN:
            return apply_any(whole, self.plan, mesh).train()
        if not isinstance(self.source, FactoryModel) or not self.source.takes_mesh:
            raise ModelError(
                f"{self.source.name}: nothing shards it. Have the factory take a mesh=None, and shard its "
                "model over it; or give a plan."
            )
        torch.manual_seed(SEED)
        model = build_sharded(self.source, dtype=self.dtype, device=device, mesh=mesh)
        values = dict(whole.named_parameters(remove_duplicate=False))
        shapes = {name: value.shape for name, value in values.items()}
        set_in_place(bare(model), lambda name, _: values[name].detach(), shapes)
        return model.train()

    def make_optimizer(self, model: nn.Module) -> Any:
        if self.optimizer is None:
            return torch.optim.AdamW(model.parameters(), lr=1e-3)
        return self.optimizer(model)

    def batch(self, number: int, device: torch.device) -> Any:
        """The global one of a step."""
        made = self._random_ids(number) if self.batches is None else self.batches(number)
        return tree_map(lambda each: each.to(device) if isinstance(each, Tensor) else each, made)

    def _random_ids(self, number: int) -> tuple[Tensor, Tensor]:
        """Ids and the label of each, [B, S]. Later sequences are padded more, so that parts of the batch have
        other numbers of labels."""
        generator, (batch, seq) = torch.Generator().manual_seed(SEED + 1 + number), self.shape
        ids = torch.randint(self._vocabulary, (batch, seq + 1), generator=generator)
        labels = ids[:, 1:].clone()
        for row in range(batch):
            labels[row, seq - row * (seq // 2) // batch :] = IGNORED
        return ids[:, :-1].contiguous(), labels

    @cached_property
    def _vocabulary(self) -> int:
        return vocab_size_of(self.source.build(dtype=torch.float32))

    def data_axes(self, mesh: DeviceMesh) -> tuple[str, ...]:
        """Axes whose ranks see other parts of the batch. Raises OptionError where their names don't tell."""
        names = tuple(mesh.mesh_dim_names or ())
        if self.data is not None:
            for name in self.data:
                if name not in names:
                    raise OptionError(f'data: the mesh has no axis "{name}", but {", ".join(names)}.')
            return self.data
        if len(names) > 1 and any(role_of(name) is None for name in names):
            raise OptionError(
                f"data: nobody knows over which of the axes {', '.join(names)} the batch is cut. Name those "
                'whose ranks see other sequences: data=("replicas",).'
            )
        return tuple(name for name in names if sees_other_tokens(name))

    def part(self, whole: Any, mesh: DeviceMesh) -> Any:
        """Of a global batch, what this rank is given: of each tensor an equal part along its first dim."""
        if self.deal is not None:
            return self.deal(whole, mesh)
        names, axes = tuple(mesh.mesh_dim_names or ()), self.data_axes(mesh)
        if self.data is None and set(names) <= set(NAMES):
            of_batch = part_of_batch(mesh_of(mesh), rank_in(mesh))
            return tree_map(lambda each: _cut(each, lambda t: micro_batches_of(t, of_batch, 1)[0]), whole)
        place, places = 0, prod(mesh.size(names.index(name)) for name in axes)
        for name in axes:
            place = place * mesh.size(names.index(name)) + mesh.get_local_rank(name)
        return tree_map(lambda each: _cut(each, lambda t: _chunk(t, place, places)), whole)


def _cut(value: Any, cut: Callable[[Tensor], Tensor]) -> Any:
    return cut(value) if isinstance(value, Tensor) and value.dim() else value


def _chunk(tensor: Tensor, place: int, places: int) -> Tensor:
    if len(tensor) % places:
        raise OptionError(
            f"batch: {len(tensor)} sequences can't be dealt to {places} ranks. Use a multiple, or give deal=."
        )
    return tensor.chunk(places)[place]


def bare(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile, under its own names."""
    while True:
        is_ddp = isinstance(model, DistributedDataParallel)
        inner = model.module if is_ddp else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def optimizers_in(made: Any) -> list[torch.optim.Optimizer]:
    """Those that the user's function has made, also beside a scheduler, in a tuple or a dict."""
    if isinstance(made, torch.optim.Optimizer):
        return [made]
    if isinstance(made, Mapping):
        made = tuple(made.values())
    if isinstance(made, Sequence) and not isinstance(made, str):
        return [each for part in made for each in optimizers_in(part)]
    return []
