"""One model under one plan, on this rank: built twice with the same weights, proved, counted; and many such cases after each other.

float64 first; a model that mixes dtypes so that it doesn't run in it is proved in float32. Too large a model is proved by its small twin. A case
that fails on all ranks alike is that case's answer; where a rank fails alone the others hang in a collective, so the whole launch ends, and run.py
starts another for what is left.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import msgspec
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.core.errors import InputError, ModelError, OptionError, RunError, ShardwiseError
from shardwise.core.finding import Finding, FindingKind
from shardwise.core.mesh import TENSOR_AXIS, Mesh
from shardwise.core.plan import AnyPlan, Plan, TheirPlan
from shardwise.core.sharded import Sharded
from shardwise.core.shown import shown, told
from shardwise.core.verification import Proof, Verification
from shardwise.launch import RankContext
from shardwise.models.factory import sharding_factory
from shardwise.models.source import ModelSource, find_model, vocab_size_of
from shardwise.parallel.any_plan import apply_any
from shardwise.parallel.apply import applied_to
from shardwise.parallel.loss import IGNORED
from shardwise.parallel.parameters import part_of_dtensor
from shardwise.parallel.resolve import tied_parameters
from shardwise.step.build import device_mesh
from shardwise.torch_private import default_store
from shardwise.verify.expected import Unsharded, shake, unsharded
from shardwise.verify.held import local
from shardwise.verify.observe import Batch, LogitsError, ModuleError, Portion
from shardwise.verify.proof import prove
from shardwise.verify.reasons import ungathered, with_ties
from shardwise.verify.static import of_model, untied

SEED = 0
# float64 weights, gradients and Adam's state of both models on each of a laptop's ranks
MOST_PARAMETERS = 40_000_000
# special ids have rows and effects of their own in some models: padding, images
FIRST_ID = 8
NO_PLAN = "transformers has no tensor-parallel plan for it"
_ALONE_S = 20.0
# what a plan, and the code that it puts into a model, may raise
FAILURES = (
    ShardwiseError,
    RuntimeError,
    AssertionError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
)


@dataclass(frozen=True, slots=True)
class Case:
    """plan: TOML, or the name of a plan that isn't ours. twin: None takes the small twin where the model is large. dtype: None is float64, then float32."""

    model: str
    plan: str
    label: str
    twin: bool | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """Cases from `first` on, all on one mesh."""

    cases: tuple[Case, ...]
    first: int
    mesh: str
    batch: int
    seq: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What rank 0 reports of a case. alone: a rank failed and the others didn't, so this launch ends."""

    number: int
    verification: Verification
    alone: bool = False


def run(context: RankContext, payload: bytes) -> bytes:
    """Entry of every rank."""
    job = msgspec.json.decode(payload, type=Job)
    mesh = device_mesh(Mesh.parse(job.mesh), context.device.type)
    for number in range(job.first, len(job.cases)):
        case = job.cases[number]
        context.note(f"{case.model} under {case.label}")
        verification = _Examination(case, job, mesh, context.device).verification()
        is_alone = not _all_came(context, number)
        answer = msgspec.msgpack.encode(
            Answer(number, verification, is_alone)
        )  # an error may be infinite, which JSON has no word for
        has_failed = any(finding.kind is FindingKind.CRASHES for finding in verification.findings)
        if context.rank == 0 or (is_alone and has_failed):
            context.report(answer)
        if is_alone:
            time.sleep(
                1.0
            )  # so that the rank that failed is heard before this one's end takes the launch down
            raise RunError(f"{case.model} under {case.label}: the ranks parted.")
    return b""


def _all_came(context: RankContext, number: int) -> bool:
    """Whether all ranks are done with the case. A rank that stays in a collective which another has left doesn't come."""
    store = default_store()
    store.set(f"verified/{number}/{context.rank}", "")
    try:
        store.wait(
            [f"verified/{number}/{rank}" for rank in range(context.world_size)], timedelta(seconds=_ALONE_S)
        )
    except RuntimeError:
        return False
    return True


class _Examination:
    """Of one case, on one rank; all ranks come to the same answer."""

    def __init__(self, case: Case, job: Job, mesh: DeviceMesh, device: torch.device) -> None:
        self._case = case
        self._job = job
        self._mesh = mesh
        self._device = device
        self._tp = mesh[TENSOR_AXIS].size() if mesh.ndim > 1 else mesh.size()
        self._plan = plan_of(case.plan)
        self._began = time.perf_counter()
        self._parameters: int | None = None
        self._twin = ""
        self._ties: set[tuple[str, ...]] = set()

    def verification(self) -> Verification:
        try:
            source = self._source()
            expected, make = self._unsharded(source)
        except (ShardwiseError, RuntimeError) as error:
            if isinstance(error, InputError) and not self._case.model.startswith("hf:"):
                raise
            return self._answer(note=shown(error, 300))
        if isinstance(expected, str):
            return self._answer(note=expected)
        try:
            model = self._sharded(source, make)
        except OptionError:
            raise
        except FAILURES as error:
            return self._crashed("", error)
        sharded, findings = self._looked_at(model)
        try:
            proof, differences = prove(model, expected, make, Portion(self._mesh))
        except LogitsError as error:
            return self._answer((*ungathered(str(error)), *findings), None, sharded, str(error))
        except ModuleError as error:
            return self._crashed(error.module, error, findings, sharded)
        except RuntimeError as error:
            return self._crashed("", error, findings, sharded)
        return self._answer((*with_ties(differences, findings), *findings), proof, sharded)

    def _crashed(
        self, module: str, error: Exception, findings: Sequence[Finding] = (), sharded: Sharded | None = None
    ) -> Verification:
        """For a plan of ours, which says before it starts what it can't do, an InputError is the user's to see."""
        if isinstance(error, InputError) and isinstance(self._plan, Plan):
            raise error
        text = shown(error, 300) if isinstance(error, ShardwiseError) else told(error, 300)
        return self._answer(
            (Finding(FindingKind.CRASHES, module or "model", text), *findings), None, sharded, text
        )

    def _answer(
        self,
        findings: Sequence[Finding] = (),
        proof: Proof | None = None,
        sharded: Sharded | None = None,
        note: str = "",
    ) -> Verification:
        case = self._case
        seconds = time.perf_counter() - self._began
        return Verification(
            case.model,
            case.label,
            self._tp,
            self._twin,
            self._parameters,
            sharded,
            proof,
            tuple(findings),
            note,
            round(seconds, 2),
        )

    def _source(self) -> ModelSource:
        source = find_model(self._case.model)
        small = source.small(self._tp) if self._case.twin is not False else None
        if small is None or (self._case.twin is None and _size(source) <= MOST_PARAMETERS):
            return source
        self._twin = "its small twin"
        return small

    def _looked_at(self, model: nn.Module) -> tuple[Sharded, list[Finding]]:
        """How much of the model is sharded, and what is found without running it: of the model as it was named, if it can be built without
        weights; else of the one that is proved."""
        named = model
        if self._twin:
            with suppress(ShardwiseError, RuntimeError):
                source = find_model(self._case.model)
                named = self._sharded(source, lambda: source.build(dtype=torch.float32))
        sharded, findings = of_model(named, self._plan, self._tp)
        return sharded, [*untied(self._ties, model), *findings]

    def _unsharded(self, source: ModelSource) -> tuple[Unsharded | str, Callable[[], nn.Module]]:
        """(what it gives, or why there is nothing to prove; how to make it again)"""
        failures = []
        for name in [self._case.dtype] if self._case.dtype else ["float64", "float32"]:
            dtype: torch.dtype = getattr(torch, name)

            def make(dtype: torch.dtype = dtype) -> nn.Module:
                return seeded(source, dtype, self._device)

            model = make()
            self._parameters = sum(parameter.numel() for parameter in model.parameters())
            self._ties = set(tied_parameters(model).values())
            if self._plan is TheirPlan.HF and not getattr(model, "tp_plan", None):
                return NO_PLAN, make
            try:
                return unsharded(model, self._batches(model), parts=self._tp), make
            except (ModuleError, RunError) as error:
                failures.append(f"in {name}, {shown(error, 300)}")
        return f"unsharded {' '.join(failures)}", make

    def _batches(self, model: nn.Module) -> list[Batch]:
        """Two batches of random ids, and as labels what follows each; one label is ignored."""
        generator = torch.Generator().manual_seed(SEED + 1)
        vocab = vocab_size_of(model)
        first = FIRST_ID if self._case.model.startswith("hf:") and vocab > 2 * FIRST_ID else 0
        batches = []
        for _ in range(2):
            ids = torch.randint(first, vocab, (self._job.batch, self._job.seq + 1), generator=generator)
            labels = ids[:, 1:].clone()
            labels[0, self._job.seq // 3] = IGNORED
            batches.append((ids[:, :-1].contiguous().to(self._device), labels.to(self._device)))
        return batches

    def _sharded(self, source: ModelSource, make: Callable[[], nn.Module]) -> nn.Module:
        if self._plan is TheirPlan.UNSHARDED:
            raise OptionError('plan "unsharded" has nothing to verify. Name a plan that shards.')
        model = self._own(source, make()) if self._plan is TheirPlan.OWN else make()
        return apply_any(model, self._plan, self._mesh)

    def _own(self, source: ModelSource, whole: nn.Module) -> nn.Module:
        """The model as its factory shards it, with the weights of `whole`."""
        torch.manual_seed(SEED)
        model = sharding_factory(source).build(
            dtype=next(whole.parameters()).dtype, device=self._device, mesh=self._mesh
        )
        values = dict(whole.named_parameters(remove_duplicate=False))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in values or parameter.shape != values[name].shape:
                of_whole = list(values[name].shape) if name in values else "none of that name"
                raise ModelError(
                    f'plan "own": parameter {name} is {list(parameter.shape)}, the unsharded model has {of_whole}. '
                    "Make sharded parameters DTensors of the whole's shape, under the same names."
                )
            with torch.no_grad():  # in place: hooks that the factory has put on its parameters stay
                kept = values[name].detach()
                if isinstance(parameter, DTensor):
                    kept = local(part_of_dtensor(kept, parameter, applied_to(model).row_order.get(name)))
                local(parameter).copy_(kept)
        return model


def seeded(source: ModelSource, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model with weights that no two parameters share by accident, the same on every rank: its own initialisation, shaken."""
    torch.manual_seed(SEED)
    model = source.build(dtype=dtype, device="cpu")
    for name, parameter in model.named_parameters():
        shake(name, parameter)
    return model.to(device).train()


def plan_of(text: str) -> AnyPlan:
    return TheirPlan(text) if text in list(TheirPlan) else Plan.from_toml(text)


def _size(source: ModelSource) -> float:
    """Parameters; infinite for a configuration that leaves open what its twin fills in."""
    try:
        return sum(parameter.numel() for parameter in source.build(dtype=torch.float32).parameters())
    except ModelError:
        return float("inf")
