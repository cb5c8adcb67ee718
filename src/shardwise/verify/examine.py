"""One claim, on this rank: the model built twice with the same weights, proved, counted; and many claims
after each other.

float64 first; a model that mixes dtypes so that it doesn't run in it is proved in float32, and one that
rounds more than a wrong plan shows, without its casts (attempts.py). Too large a model is proved by its small
twin. Claims about one model, one after the other, share its unsharded run. A claim that fails on all ranks
alike has that for its answer; where a rank fails alone the others hang in a collective, so the whole launch
ends, and run.py starts another for what is left.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import msgspec
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.case import StepSettings
from shardwise.core.errors import ModelError, RunError, ShardwiseError
from shardwise.core.finding import Cause, Finding
from shardwise.core.mesh import Mesh
from shardwise.core.named_path import HUGGING_FACE
from shardwise.core.pipeline import recomputed_of_fewer
from shardwise.core.plan import TheirPlan
from shardwise.core.sharded import Sharded
from shardwise.core.shown import shown
from shardwise.core.verification import Verification
from shardwise.launch import RankContext
from shardwise.models.flex_attention import calls_flex_attention
from shardwise.models.layers import find_layers
from shardwise.models.source import ModelSource, find_model, vocab_size_of
from shardwise.parallel.any_plan import apply_any
from shardwise.parallel.loss import IGNORED
from shardwise.parallel.resolve import tied_parameters
from shardwise.parallel.self_sharded import build_sharded
from shardwise.step.build import cut_over_stages, device_mesh, set_in_place, trainable
from shardwise.step.portion import Portion
from shardwise.step.train import mixed_precision
from shardwise.torch_private import AnyDropout, default_store
from shardwise.verify.attempts import Attempt, attempts
from shardwise.verify.claim import TWIN, Claim, no_plan
from shardwise.verify.expected import TooNoisyError, Unsharded, shake, unsharded
from shardwise.verify.failed import Failed, of_failed_ranks
from shardwise.verify.observe import Batch, LogitsError, ModuleError
from shardwise.verify.proof import prove
from shardwise.verify.reasons import ungathered, with_ties
from shardwise.verify.rounded import is_mixed, loosened
from shardwise.verify.static import dropout, of_model, untied

SEED = 0
# float64 weights, gradients and Adam's state of both models on each of a laptop's ranks
MOST_PARAMETERS = 40_000_000
# special ids have rows and effects of their own in some models: padding, images
FIRST_ID = 8
_ALONE_S = 20.0
_HEARD_S = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """Claims from `first` on, all on one mesh. also_smallest: see run.py."""

    claims: tuple[Claim, ...]
    first: int
    mesh: Mesh
    settings: StepSettings
    also_smallest: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What rank 0 reports of a claim. alone: a rank failed and the others didn't, so this launch ends."""

    number: int
    verification: Verification
    alone: bool = False


@dataclass(frozen=True, slots=True)
class _Whole:
    """An unsharded model that ran. expected: what it gives; smallest: what for the smallest batch, if that is
    asked for. make: makes it again. no_plans: why a plan of its library's can't be proved on it."""

    expected: Unsharded
    smallest: Unsharded | None
    make: Callable[[], nn.Module]
    attempt: Attempt
    parameters: int
    ties: frozenset[tuple[str, ...]]
    no_plans: Mapping[TheirPlan, str | None]


@dataclass(slots=True)
class _Last:
    """The whole of the claim before, which the next one is often about too: one is what memory has room for.
    of: which model, whether its twin, in which dtype."""

    of: tuple[str, bool, str | None] | None = None
    whole: _Whole | None = None


class NothingToProveError(RunError):
    """Why the unsharded model can't be held against anything."""


def run(context: RankContext, payload: bytes) -> bytes:
    """Entry of every rank."""
    job = msgspec.json.decode(payload, type=Job)
    mesh, last = device_mesh(job.mesh, context.device.type), _Last()
    for number in range(job.first, len(job.claims)):
        claim = job.claims[number]
        began = time.perf_counter()
        verification = _Examination(claim, job, mesh, context, last).verification()
        verification = replace(verification, seconds=round(time.perf_counter() - began, 2))
        is_alone, failures = _met(context, number, Failed.of(verification))
        verification = of_failed_ranks(verification, failures, context.world_size)
        if context.rank == 0 or (is_alone and failures[context.rank].note):
            # an error may be infinite, which JSON has no word for
            context.report(msgspec.msgpack.encode(Answer(number, verification, is_alone)))
        if is_alone:
            time.sleep(_HEARD_S)  # the rank that failed is heard before this one's end takes the launch down
            raise RunError(f"{claim}: the ranks parted.")
    return b""


def _met(context: RankContext, number: int, own: Failed) -> tuple[bool, dict[int, Failed]]:
    """Whether some ranks aren't done with the claim, and how those that are have failed. A rank that stays in
    a collective which another has left doesn't come."""
    store = default_store()
    keys = [f"verified/{number}/{rank}" for rank in range(context.world_size)]
    store.set(keys[context.rank], msgspec.json.encode(own))
    try:
        store.wait(keys, timedelta(seconds=_ALONE_S))
        is_alone = False
    except RuntimeError:
        is_alone = True
    came = {rank: key for rank, key in enumerate(keys) if not is_alone or store.check([key])}
    return is_alone, {rank: msgspec.json.decode(store.get(key), type=Failed) for rank, key in came.items()}


class _Examination:
    """Of one claim, on one rank; all ranks come to the same answer. known: the answer so far."""

    def __init__(self, claim: Claim, job: Job, mesh: DeviceMesh, context: RankContext, last: _Last) -> None:
        self._note = context.note
        self._claim = claim
        self._job = job
        self._mesh = mesh
        self._device = context.device
        self._tp = job.mesh.tp
        self._plan = claim.parsed_plan
        self._known = Verification(claim.model, claim.label, self._tp)
        self._last = last
        self._ties: frozenset[tuple[str, ...]] = frozenset()
        self._dropout: list[Finding] = []
        self._twin: ModelSource | None = None
        self._attempt = Attempt("float64")

    def verification(self) -> Verification:
        try:
            self._note(f"{self._claim}, unsharded")
            source = self._source()
            whole = self._whole(source)
        except NothingToProveError as error:
            return replace(self._known, note=str(error))
        except (ShardwiseError, RuntimeError) as error:
            return self._claim.unproved(self._known, error)
        self._note(f"{self._claim}, sharded")
        try:
            model = self._sharded(source, whole.make)
        except Exception as error:  # a plan, and the code that it puts into a model, may raise anything
            return self._claim.crashed(self._known, error)
        sharded, findings = self._looked_at(model)
        known = replace(self._known, sharded=sharded, findings=tuple(findings))
        try:
            model = self._trainable(model, source)
            with self._attempt.entered():
                proof, differences = prove(model, whole.expected, whole.make, self._portion(), whole.smallest)
            proof = replace(proof, dtype=self._computed_in(proof.dtype), otherwise=self._attempt.otherwise)
        except LogitsError as error:
            return replace(known, findings=(*ungathered(str(error)), *findings), note=str(error))
        except RuntimeError as error:
            return self._claim.crashed(known, error)
        except ModuleError as error:
            return self._claim.crashed(known, error, error.module)
        explained = with_ties(differences, findings)
        told = {each.subject for each in explained if each.cause is Cause.UNTIED}
        rest = (each for each in findings if each.cause is not Cause.UNTIED or each.subject not in told)
        return replace(known, proof=proof, findings=(*explained, *rest))

    def _source(self) -> ModelSource:
        claim = self._claim
        source = find_model(claim.model)
        small = source.small(self._tp) if claim.twin is not False else None
        if small is None or (claim.twin is None and _size(source) <= MOST_PARAMETERS):
            return source
        self._known = replace(self._known, twin=TWIN)
        self._twin = small
        return small

    def _trainable(self, model: nn.Module, source: ModelSource) -> nn.Module:
        settings, policy = self._job.settings, mixed_precision(self._job.settings)
        pipeline = settings.pipeline(self._job.mesh)
        if pipeline.stages > 1:
            computed = policy.param_dtype or next(model.parameters()).dtype
            cut_over_stages(model, source, self._mesh, pipeline, computed)
        return trainable(
            model,
            self._mesh,
            policy=policy,
            reshard=settings.reshard_after_forward,
            recompute=settings.recompute,
            recompute_layers=self._recomputed(model),
        )

    def _recomputed(self, model: nn.Module) -> int | None:
        """Of how many layers the recompute is; of a twin's as large a share as of the model's."""
        recomputed, found = self._job.settings.recompute_layers, find_layers(model)
        if recomputed is None or found is None or self._twin is None:
            return recomputed
        named = find_layers(find_model(self._claim.model).build(dtype=torch.float32))
        return recomputed_of_fewer(recomputed, named.count if named else found.count, found.count)

    def _computed_in(self, dtype: str) -> str:
        """dtype: of the parameters."""
        computed = self._job.settings.param_dtype
        return dtype if computed in (None, dtype) else f"{computed}, kept in {dtype}"

    def _portion(self) -> Portion:
        settings = self._job.settings
        return Portion.on(self._mesh, settings.accumulation, reduce_once=settings.reduce_once)

    def _looked_at(self, model: nn.Module) -> tuple[Sharded, list[Finding]]:
        """How much of the model is sharded, and what is found without running it: of the model as it was
        named, if it can be built without weights; else of the one that is proved."""
        named = model
        if self._known.twin:
            with suppress(ShardwiseError, RuntimeError):
                source = find_model(self._claim.model)
                named = self._sharded(source, lambda: source.build(dtype=torch.float32))
        sharded, findings = of_model(named, self._plan, self._tp)
        return sharded, [*untied(self._ties, model), *findings, *self._dropout]

    def _whole(self, source: ModelSource) -> _Whole:
        """The last claim's, where that was about the same model."""
        of, last = (self._claim.model, source is self._twin, self._claim.dtype), self._last
        if last.of != of or last.whole is None:
            last.of, last.whole = of, None  # what is kept makes room first
            last.whole = self._unsharded(source)
        whole = last.whole
        self._known = replace(self._known, parameters=whole.parameters)
        self._ties, self._attempt = whole.ties, whole.attempt
        self._check_plan(whole.no_plans)
        return whole

    def _check_plan(self, no_plans: Mapping[TheirPlan, str | None]) -> None:
        if isinstance(self._plan, TheirPlan) and (why := no_plans.get(self._plan)) is not None:
            raise NothingToProveError(why)

    def _unsharded(self, source: ModelSource) -> _Whole:
        """Run as `self._attempt` then says."""
        failures: dict[str, str] = {}
        is_noisy = False
        for attempt in attempts(self._claim.dtype):
            if is_noisy and not attempt.unrounded:
                continue  # what rounds too much in float64 does so in float32
            try:
                return self._tried(source, attempt)
            except NothingToProveError:
                raise
            except (ModuleError, RunError) as error:
                is_noisy = isinstance(error, TooNoisyError)
                failures[str(self._attempt)] = shown(error, 300)
        if len(set(failures.values())) == 1 < len(failures):
            raise NothingToProveError(f"unsharded, however it is run, {next(iter(failures.values()))}")
        raise NothingToProveError(f"unsharded {' '.join(f'{how}, {why}' for how, why in failures.items())}")

    def _tried(self, source: ModelSource, attempt: Attempt) -> _Whole:
        def make() -> nn.Module:
            return seeded(source, attempt.torch_dtype, self._device, cast=attempt.unrounded)

        model = make()
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._known = replace(self._known, parameters=n_parameters)
        ties = frozenset(tied_parameters(model).values())
        no_plans = {plan: no_plan(model, plan) for plan in TheirPlan}
        self._check_plan(no_plans)
        batches, portion = self._batches(model), self._portion().of_one_process
        is_by_formula = self._device.type == "cpu" and calls_flex_attention(model, batches[0][0])
        self._attempt = replace(attempt, by_formula=is_by_formula)
        with self._attempt.entered():
            found = unsharded(model, batches, parts=self._tp, portion=portion)
            smallest = self._smallest(model, batches)
            return _Whole(
                self._as_rounded(found, make),
                smallest and self._as_rounded(smallest, make),
                make,
                self._attempt,
                n_parameters,
                ties,
                no_plans,
            )

    def _smallest(self, model: nn.Module, batches: Sequence[Batch]) -> Unsharded | None:
        """What it gives for one sequence in each micro-batch: where a dim is 1, a tensor needs no copy to be
        contiguous, and other code runs."""
        portion = self._portion()
        first, n = batches[0], portion.smallest_batch
        if not self._job.also_smallest or n >= len(first[0]):
            return None
        one = (first[0][:n], first[1][:n])
        return unsharded(model, [one], parts=self._tp, portion=portion.of_one_process, with_steps=False)

    def _as_rounded(self, expected: Unsharded, make: Callable[[], nn.Module]) -> Unsharded:
        """With what FSDP's mixed precision may do, where there is any."""
        policy = mixed_precision(self._job.settings)
        if not is_mixed(policy) or not self._job.mesh.shard_axes:
            return expected
        return loosened(expected, make, policy, self._device.type)

    def _batches(self, model: nn.Module) -> list[Batch]:
        """Two batches of random ids, and as labels what follows each; one label is ignored."""
        generator = torch.Generator().manual_seed(SEED + 1)
        vocab = vocab_size_of(model)
        first = FIRST_ID if self._claim.model.startswith(HUGGING_FACE) and vocab > 2 * FIRST_ID else 0
        batches, settings = [], self._job.settings
        for _ in range(2):
            ids = torch.randint(first, vocab, (settings.batch, settings.seq + 1), generator=generator)
            labels = ids[:, 1:].clone()
            labels[0, settings.seq // 3] = IGNORED
            batches.append((ids[:, :-1].contiguous().to(self._device), labels.to(self._device)))
        return batches

    def _sharded(self, source: ModelSource, make: Callable[[], nn.Module]) -> nn.Module:
        model = self._own(source, make()) if self._plan is TheirPlan.OWN else make()
        self._dropout = list(dropout(model, self._plan))
        for module in model.modules():
            if isinstance(module, AnyDropout):
                module.p = 0.0  # a proof runs without, and our engine refuses masks that would differ
        is_twin = source is self._twin
        return apply_any(model, self._claim.parsed_twin_plan if is_twin else self._plan, self._mesh)

    def _own(self, source: ModelSource, whole: nn.Module) -> nn.Module:
        """The model as its factory shards it, with the weights of `whole`; without any where that has
        none."""
        torch.manual_seed(SEED)
        first = next(whole.parameters())
        device = first.device if first.is_meta else self._device
        model = build_sharded(source, dtype=first.dtype, device=device, mesh=self._mesh)
        model = model.to(first.dtype) if self._attempt.unrounded else model
        if first.is_meta:
            return model
        values = dict(whole.named_parameters(remove_duplicate=False))
        shapes = {name: value.shape for name, value in values.items()}
        set_in_place(model, lambda name, _: values[name].detach(), shapes)
        return model


def seeded(source: ModelSource, dtype: torch.dtype, device: torch.device, *, cast: bool = False) -> nn.Module:
    """The model with weights that no two parameters share by accident, the same on every rank: its own
    initialisation, shaken. cast: to dtype, whatever it is made in."""
    torch.manual_seed(SEED)
    model = source.build(dtype=dtype, device="cpu")
    model = model.to(dtype) if cast else model
    for name, parameter in model.named_parameters():
        shake(name, parameter)
    return model.to(device).train()


def _size(source: ModelSource) -> float:
    """Parameters; infinite for a configuration that leaves open what its twin fills in."""
    try:
        return sum(parameter.numel() for parameter in source.build(dtype=torch.float32).parameters())
    except ModelError:
        return float("inf")
