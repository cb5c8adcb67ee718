"""Job: what is exported: a plan resolved on its model, the mesh, the step, and how the model's modules are
called. Written: what a format makes of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import ModelError, OptionError, PlanError
from shardwise.core.export import File, LeftOut
from shardwise.core.layer_name import any_layer
from shardwise.core.mesh import Mesh
from shardwise.core.plan import Plan
from shardwise.dims.trace import record_of
from shardwise.models.layers import Layers, find_layers
from shardwise.models.model_source import ModelSource
from shardwise.models.source import vocab_size_of
from shardwise.parallel.resolve import resolve, tied_parameters
from shardwise.parallel.sharder import Assignment


@dataclass(frozen=True, slots=True)
class Called:
    """How a module's forward is called. places: arguments given by place. keyword: the name by which its
    first tensor is given, where that isn't by place. gives: how many things come out; 0 is one alone."""

    places: int
    keyword: str | None = None
    gives: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """model: unsharded, on the meta device. plan: None for a mesh without tp ranks, over which nothing is cut
    by rules. assignments: its rules by module, in the model's order. command: that makes the files again.
    folder: where they will lie, if that is known."""

    source: ModelSource
    model: nn.Module
    plan: Plan | None
    case: Case
    command: str
    assignments: tuple[Assignment, ...] = ()
    folder: Path | None = None

    @property
    def mesh(self) -> Mesh:
        return self.case.mesh

    @property
    def step(self) -> StepSettings:
        return self.case.step

    @property
    def layers(self) -> Layers | None:
        return find_layers(self.model)

    def under(self, plan: Plan) -> "Job":
        """The same job with another plan. Raises PlanError where the model can't carry it."""
        return replace(self, plan=plan, assignments=resolved(self.model, plan, self.case))

    def tied(self) -> Iterator[tuple[str, str]]:
        """(a parameter's first name, another one of the same)."""
        for names in dict.fromkeys(tied_parameters(self.model).values()):
            for other in names[1:]:
                yield names[0], other

    def called(self, names: set[str]) -> dict[str, Called]:
        """How one forward calls these modules; those that it doesn't come to, for it can't run on without
        data, as it calls one in another layer."""
        found: dict[str, Called] = {}
        handles = []
        for name, module in self.model.named_modules():
            if name in names:
                before, after = _noting(found, name)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
        try:
            record_of(self.model, vocab_size_of(self.model))
        except ModelError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        alike = {any_layer(name): each for name, each in found.items()}
        return {name: alike[any_layer(name)] for name in names if any_layer(name) in alike} | found

    def patterns(self, names: Mapping[str, Any]) -> dict[str, Any]:
        """Values by module -> by pattern, layers' numbers as `*`, where all modules that the pattern matches
        have an equal value; else by module."""
        matched: dict[str, list[str]] = {}
        for name, _ in self.model.named_modules():
            matched.setdefault(any_layer(name), []).append(name)
        found: dict[str, Any] = {}
        for name, value in names.items():
            pattern = any_layer(name)
            is_shared = all(each in names and names[each] == value for each in matched[pattern])
            found[pattern if is_shared else name] = value
        return found


@dataclass(frozen=True, slots=True)
class Written:
    """files: the first is the one that a reader begins with. left_out: what they don't say; said: the plan
    that they say then. prove: what `shardwise verify own --model` takes, where the first file can be proved:
    a function in it."""

    files: tuple[File, ...]
    left_out: tuple[LeftOut, ...] = ()
    said: Plan | None = None
    prove: str | None = None
    notes: tuple[str, ...] = ()


class Format(Protocol):
    """A module of formats/."""

    ABOUT: str

    def write(self, job: Job) -> Written:
        """Raises InputError for what it can't say."""


def resolved(model: nn.Module, plan: Plan, case: Case) -> tuple[Assignment, ...]:
    """The plan's rules on the model. Raises PlanError."""
    mesh = case.mesh
    fsdp = 1
    for axis in mesh.shard_axes:
        fsdp *= mesh.size(axis)
    return resolve(
        model,
        plan,
        tp=mesh.tp,
        seq=case.step.seq or None,
        fsdp=fsdp,
        experts=mesh.experts,
        context=mesh.context,
    )


def check_axes(job: Job, form: str, *, allowed: str = "dp, fsdp and tp") -> None:
    """Raises OptionError for axes that only Shardwise's own step carries out."""
    mesh = job.mesh
    for size, what in (
        (mesh.stages, "pipeline stages"),
        (mesh.context, "ranks that share a sequence"),
        (mesh.experts, "ranks that share experts out"),
    ):
        if size > 1:
            raise OptionError(
                f"--as {form}: mesh {mesh} has {what}, and its files say nothing near that. Use a mesh of "
                f"{allowed}, or --as toml."
            )


def refuse(job: Job, form: str, asked: str, why: str) -> PlanError:
    """The error for a rule near which nothing can be said."""
    assert job.plan is not None
    return PlanError(
        f'--as {form}: plan "{job.plan.name}": {asked}: {why}, and nothing near it can be said. Use another '
        "style for it, or --as toml."
    )


def _noting(found: dict[str, Called], name: str) -> tuple[Any, Any]:
    """Hooks before a module's forward and after it."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_by_place = bool(args) and isinstance(args[0], Tensor)
        keys = () if is_by_place else (key for key, value in kwargs.items() if isinstance(value, Tensor))
        found.setdefault(name, Called(len(args), next(iter(keys), None)))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple | list):
            found[name] = replace(found[name], gives=len(output))

    return before, after
