"""Job: what is to be traced, and how its model, its rules and its batch are made."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.batch_part import check_batch, coordinate, part_of_batch
from shardwise.core.case import StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.mesh import STAGES_AXIS, Mesh
from shardwise.core.plan import ROOT, AnyPlan, Plan, TheirPlan
from shardwise.core.program import RuleUse, StageShare
from shardwise.core.rule import RuleRef
from shardwise.models.layers import Layers
from shardwise.models.source import ModelSource
from shardwise.parallel.any_plan import apply_any
from shardwise.parallel.ends import Ends
from shardwise.parallel.self_sharded import build_sharded
from shardwise.parallel.stages import cut_to_stage
from shardwise.step.groups import along
from shardwise.step.portion import micro_batches_of
from shardwise.step.train import mixed_precision, recompute_in, shard_with_fsdp
from shardwise.torch_private import FakeTensorMode
from shardwise.trace.fakes import fill_with_fakes
from shardwise.trace.stage_shares import shares_of


@dataclass(frozen=True, slots=True)
class Job:
    """One rank's step. device_mesh: of the fake world. on_model: told each model before its step runs,
    sharded and filled with fakes. ends: of the model, where the mesh has stages. shares: what those
    hold, once shard() has seen the model."""

    source: ModelSource
    plan: AnyPlan
    mesh: Mesh
    settings: StepSettings
    device: str
    rank: int
    ids: Tensor | None
    device_mesh: DeviceMesh
    on_model: Callable[[nn.Module], None]
    ends: Ends | None = None
    shares: list[StageShare] = field(default_factory=list)

    @property
    def stage(self) -> int:
        """This rank's, of the pipeline."""
        return coordinate(self.mesh, self.rank, STAGES_AXIS)

    def build(self) -> nn.Module:
        """The model on the meta device, as it was made; sharded only where the plan is the factory's own."""
        dtype: torch.dtype = getattr(torch, self.settings.dtype)
        if self.plan is TheirPlan.OWN:
            return build_sharded(self.source, dtype=dtype, mesh=self.device_mesh)
        return self.source.build(dtype=dtype)

    def shard(self, model: nn.Module, layers: Layers | None, fake_mode: FakeTensorMode, kept: "Kept") -> None:
        """Makes a built model what trains on this rank, of fake tensors."""
        apply_any(model, self.plan, self.device_mesh)
        if self.ends is not None:
            computed: torch.dtype = getattr(torch, self.settings.computed_dtype)
            pipeline, micro_batches = self.settings.pipeline(self.mesh), self.settings.accumulation
            self.shares[:] = shares_of(model, self.ends, pipeline, self.mesh, micro_batches)
            cut_to_stage(
                model, self.ends, pipeline, self.stage,
                tp=self.mesh.tp, dtype=computed, keep=kept.depth,
            )  # fmt: skip
        fill_with_fakes(model, fake_mode)
        numbered = list(layers.numbered(model)) if layers is not None else []
        layer_modules = [layer for _, layer in numbered]
        running_again = [layer for number, layer in numbered if number in kept.again]
        if self.settings.recompute != "none" and (running_again or not numbered):
            recompute_in(running_again, self.settings.recompute)
        if self.mesh.shard_axes:
            precision = mixed_precision(self.settings)
            shards = along(self.device_mesh, self.mesh.shard_axes)
            reshard = self.settings.reshard_after_forward
            shard_with_fsdp(model, layer_modules, shards, precision, reshard=reshard)
        model.train()
        self.on_model(model)

    def micro_batches(self, vocab_size: int) -> list[Tensor]:
        """Ids of this rank's micro-batches, real, on the host."""
        settings = self.settings
        ids_BS = self.ids
        if ids_BS is None:
            generator = torch.Generator().manual_seed(settings.seed)
            ids_BS = torch.randint(vocab_size, (settings.batch, settings.seq), generator=generator)
        if tuple(ids_BS.shape) != (settings.batch, settings.seq):
            raise OptionError(
                f"ids have shape {tuple(ids_BS.shape)}; the batch is {settings.batch} x {settings.seq}."
            )
        check_batch(self.mesh, settings.batch, settings.seq, settings.accumulation)
        part = part_of_batch(self.mesh, self.rank)
        return micro_batches_of(ids_BS, part, settings.accumulation)


@dataclass(frozen=True, slots=True)
class Kept:
    """Which layers are traced. depth: only the first so many of each part of a pipeline. again: numbers of
    those that run again in the backward."""

    depth: int | None = None
    again: Collection[int] = ()


def rules_of(plan: AnyPlan, model: nn.Module) -> tuple[RuleUse, ...]:
    """The plan's rules and the modules (or parameters) of the unsharded model that each holds for."""
    match plan:
        case Plan():
            by_rule: dict[str, list[str]] = {rule.pattern: [] for rule in plan.rules}
            for name, _ in model.named_modules():
                rule = plan.rule_for(name)
                if rule is not None:
                    by_rule[rule.pattern].append(name or ROOT)
            return tuple(
                RuleUse(
                    rule.pattern, str(rule.style.name), tuple(by_rule[rule.pattern]), rule.style.arguments
                )
                for rule in plan.rules
            )
        case TheirPlan.HF | TheirPlan.HF_EP:
            from shardwise.parallel.engines.hugging_face import hugging_face_rules

            return hugging_face_rules(model, plan)
        case TheirPlan.UNSHARDED | TheirPlan.OWN:
            return ()


def nearest_rule(rules: tuple[RuleUse, ...]) -> Callable[[str], RuleRef | None]:
    """The rule of a module, or of the nearest module around it."""
    by_module = {name: use.rule for use in rules for name in use.modules}

    @cache
    def rule_of(module: str) -> RuleRef | None:
        if not module or module in by_module:
            return by_module.get(module)
        return rule_of(module.rpartition(".")[0])

    return rule_of
