"""What the ranks of test_styles.py run. All ranks do the same; rank 0's answer is the one that is read, as
JSON."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from shardwise.core.collective import Origin
from shardwise.core.errors import PlanError
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Partial, Replicate, Shard
from shardwise.core.plan import Plan
from shardwise.core.verification import Agreement
from shardwise.launch import RankContext
from shardwise.models.specs import ModelSpec
from shardwise.parallel import collectives
from shardwise.parallel.apply import applied_to, loss_of, parallelize
from shardwise.parallel.axis import Axis
from shardwise.parallel.builtin import builtin_plan
from shardwise.parallel.recorder import CollectiveRecorder
from shardwise.step import clipping
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep
from shardwise.verify import expected as expectation
from shardwise.verify.proof import gradient_errors, prove
from shardwise.verify.ranks import disagreements, replicated_parameters
from tests.distributed.style_cases import (
    BATCH,
    MESHES,
    SEQ,
    WITH_SEQUENCE_PARALLEL,
    Case,
    Config,
    Ids,
    Mlp,
    MlpConfig,
    cases,
    is_telling,
    llama,
    llama_plans,
    mlp_plans,
)
from tests.distributed.style_faults import FAULTS, PART_FAULTS

ORIGIN = Origin("test", None, Partial(), Replicate())


@dataclass(frozen=True, slots=True)
class Unsharded:
    """One unsharded model, run: its weights, the batch (ids on the host, labels on the device) and the
    answer."""

    state: dict[str, Tensor]
    ids_BS: Tensor  # noqa: N815
    labels_BS: Tensor  # noqa: N815
    expected: expectation.Unsharded

    @property
    def gradients(self) -> dict[str, Tensor]:
        return {name: each for name, each in self.expected.observed.gradients.items() if each is not None}


def _model_of(config: Config) -> nn.Module:
    return Case("", config, builtin_plan("rowwise")).model()


@lru_cache(maxsize=4)
def unsharded(config: Config, kind: Ids, device: torch.device) -> Unsharded:
    torch.manual_seed(1)
    model = _model_of(config).double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.1)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(device)
    match kind:
        case Ids.RANDOM:
            ids_BS = torch.randint(0, config.vocab_size, (BATCH, SEQ))
        case Ids.HOT:
            ids_BS = torch.ones(BATCH, SEQ, dtype=torch.int64)
        case Ids.FEW:
            # multiples of 12: interleaved, rank 0's for 2, 3 and 4 ranks; small, so that contiguous ones are
            # the first ranks'
            ids_BS = torch.randint(0, config.vocab_size // 24, (BATCH, SEQ)) * 12
    labels_BS = torch.randint(0, config.vocab_size, (BATCH, SEQ))
    labels_BS[0, :7] = -100
    labels_BS = labels_BS.to(device)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = expectation.unsharded(model, [(ids_BS, labels_BS)], parts=2, with_steps=False)
    return Unsharded(state, ids_BS, labels_BS, expected)


def sharded(config: Config, plan: Plan, mesh: DeviceMesh, state: dict[str, Tensor]) -> nn.Module:
    model = _model_of(config).double().to(mesh.device_type)
    model.load_state_dict(state)
    return parallelize(model, plan, mesh)


def compare(case: Case, mesh: DeviceMesh, device: torch.device) -> Agreement:
    base = unsharded(case.config, case.ids, device)

    def whole() -> nn.Module:
        model = _model_of(case.config).double().to(device)
        model.load_state_dict(base.state)
        return model

    model = sharded(case.config, case.plan, mesh, base.state)
    portion = Portion(mesh, micro_batches=case.backwards)
    return Agreement.of(*prove(model, base.expected, whole, portion), plan=case.plan.name, layers=2)


def _run_cases(context: RankContext, mesh: DeviceMesh, *, telling: bool) -> dict[str, dict[str, Any]]:
    outcomes: dict[str, dict[str, Any]] = {}
    for case in cases(context.world_size):
        if case.is_telling != telling:
            continue
        context.note(case.name)
        try:
            outcomes[case.name] = {"agreement": asdict(compare(case, mesh, context.device))}
        except PlanError as error:
            outcomes[case.name] = {"refused": str(error)}
    return outcomes


def _run_faults(context: RankContext, mesh: DeviceMesh, *, telling: bool) -> dict[str, dict[str, Any]]:
    outcomes: dict[str, dict[str, Any]] = {}
    for fault in FAULTS:
        if fault.is_telling != telling:
            continue
        context.note(fault.name)
        unsharded(fault.config, Ids.RANDOM, context.device)  # before the fault is planted
        with fault.plant():
            outcomes[fault.name] = asdict(
                compare(Case(fault.name, fault.config, fault.plan), mesh, context.device)
            )
    return outcomes


def laws(context: RankContext, mesh: DeviceMesh) -> dict[str, float]:
    """What two collectives do together and what one of them, or nothing, does: the largest difference,
    forward and backward."""
    axis = Axis.of(mesh, "tp")
    t, device = axis.size, context.device
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(3 * t, 7, 5, generator=generator, dtype=torch.float64).to(device)
    own = torch.randn(
        3 * t, 7, 5, generator=generator.manual_seed(10 + context.rank), dtype=torch.float64
    ).to(device)

    def difference(run: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], x: Tensor) -> float:
        """Of outputs, and of the gradients for one random gradient of the output, the same on all ranks."""
        results = []
        for function in (run, expected):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.backward(torch.randn(y.shape, generator=generator.manual_seed(5), dtype=y.dtype).to(device))
            assert leaf.grad is not None
            results.append((y.detach(), leaf.grad))
        return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(*results, strict=True))

    def gathered(x: Tensor, dim: int) -> Tensor:
        size = whole.shape[dim]
        return collectives.all_gather(x, dim, axis, full_size=size, grad_placement=Replicate(), origin=ORIGIN)

    def cut(x: Tensor, dim: int) -> Tensor:
        return collectives.split(x, dim, axis, grad_placement=Shard(dim), origin=ORIGIN)

    def scattered(x: Tensor, dim: int) -> Tensor:
        return collectives.reduce_scatter(x, dim, axis, grad_placement=Shard(dim), origin=ORIGIN)

    def summed(x: Tensor) -> Tensor:
        return collectives.all_reduce(x, axis, grad_placement=Replicate(), origin=ORIGIN)

    def fanned_out(x: Tensor) -> Tensor:
        return collectives.fan_out(x, axis, grad_placement=Partial(), origin=ORIGIN)

    def swapped(x: Tensor, split_dim: int, concat_dim: int) -> Tensor:
        full = whole.shape[concat_dim]
        return collectives.all_to_all(
            x, split_dim, concat_dim, axis, full_size=full, grad_placement=Shard(split_dim), origin=ORIGIN
        )

    def sent(x: Tensor) -> Tensor:
        sends = [
            1 + (context.rank + other) % 3 for other in range(t)
        ]  # symmetric, so what is sent to a rank comes back
        return collectives.exchange_rows(
            x[: sum(sends)], sends, sends, axis, grad_placement=Shard(0), origin=ORIGIN
        )

    def times_ranks(x: Tensor) -> Tensor:
        return x + (t - 1) * x

    def cut_and_gathered(dim: int) -> Callable[[Tensor], Tensor]:
        return lambda x: gathered(cut(x, dim), dim)

    def there_and_back(split_dim: int, concat_dim: int) -> Callable[[Tensor], Tensor]:
        return lambda x: swapped(swapped(x, split_dim, concat_dim), concat_dim, split_dim)

    n_rows = sum(1 + (context.rank + other) % 3 for other in range(t))
    return {
        "all_gather after split is nothing": max(
            difference(cut_and_gathered(d), torch.clone, whole) for d in (0, 1, 2)
        ),
        "all_gather after reduce_scatter is all_reduce": difference(
            lambda x: gathered(scattered(x, 0), 0), summed, own
        ),
        "backends differ in nothing": difference(
            lambda x: collectives.reduce_scatter(
                x,
                0,
                replace(axis, size=t, pairwise_reduce_scatter=not axis.pairwise_reduce_scatter),
                grad_placement=Shard(0),
                origin=ORIGIN,
            ),
            lambda x: scattered(x, 0),
            own,
        ),
        "all_reduce of the same is t times it": difference(
            lambda x: fanned_out(summed(x)), lambda x: times_ranks(x), whole
        ),
        "all_to_all there and back is nothing": max(
            difference(there_and_back(i, j), torch.clone, cut(whole, j).contiguous())
            for i, j in ((0, 1), (1, 0), (1, 2), (2, 1), (0, 2))
        ),
        "all_to_all is a gather and a split": difference(
            lambda x: swapped(cut(x, 1), 2, 1), lambda x: cut(x, 2), whole
        ),
        "exchange_rows there and back is nothing": difference(
            lambda x: sent(sent(x)), lambda x: x[:n_rows].clone(), own
        ),
    }


def clip_errors(context: RankContext, mesh: DeviceMesh) -> dict[str, float]:
    """Per plan: relative difference of the norm, and of every clipped gradient, from
    torch.nn.utils.clip_grad_norm_ on the unsharded model."""
    errors = {}
    config = llama(tied=True)
    for plan in llama_plans():
        base = unsharded(config, Ids.RANDOM, context.device)
        model = sharded(config, plan, mesh, base.state)
        loss_of(model)(model(base.ids_BS), base.labels_BS).backward()
        max_norm = 0.05  # far below the norm, so that everything is scaled
        norm = clipping.clip_gradients(model.parameters(), max_norm)
        parameters = [nn.Parameter(torch.empty_like(gradient)) for gradient in base.gradients.values()]
        for parameter, gradient in zip(parameters, base.gradients.values(), strict=True):
            parameter.grad = gradient.clone()
        expected = nn.utils.clip_grad_norm_(parameters, max_norm)
        clipped = {name: each.grad for name, each in zip(base.gradients, parameters, strict=True)}
        gradients = {name: each.grad for name, each in model.named_parameters()}
        off = gradient_errors(model, gradients, clipped, {})
        errors[plan.name] = max(abs(float(norm / expected) - 1), *(each.relative for each in off.values()))
    return errors


def _steps(plan: Plan | None, mesh: DeviceMesh | None, device: torch.device, portion: Portion) -> Tensor:
    """[3 steps, loss and gradient norm] for a rank's portion of 8 sequences in 2 micro-batches; two have few
    valid labels."""
    generator = torch.Generator().manual_seed(8)
    ids_BS = torch.randint(0, 260, (8, SEQ), generator=generator)
    labels_BS = torch.randint(0, 260, (8, SEQ), generator=generator)
    labels_BS[1, 5:] = -100
    labels_BS[3, 1:] = -100
    if plan is None:
        ids_BS = ids_BS.to(device)
    micro_batches = portion.cut(ids_BS, labels_BS)
    model = build_model(
        ModelSpec("llama-test", llama(260), ""), plan, mesh, dtype=torch.float64, device=device, seed=4
    )
    step = TrainStep(model, mesh=mesh, learning_rate=1e-2, max_norm=0.5)
    results = [step(micro_batches) for _ in range(3)]
    return torch.stack([torch.stack((result.loss, result.gradient_norm)) for result in results]).cpu()


@lru_cache
def _unsharded_steps(device: torch.device) -> Tensor:
    expected = _steps(None, None, device, Portion(micro_batches=2))
    assert expected[:, 0].unique().numel() == 3  # it learns
    assert expected[:, 1].min() > 0.5  # it is clipped
    return expected


def step_errors(context: RankContext, mesh_text: str, *, only_one: bool = False) -> dict[str, float]:
    """Per plan, or of the first: the largest relative difference of 3 steps' losses and gradient norms from
    those of the unsharded model on one process."""
    mesh = device_mesh(Mesh.parse(mesh_text), context.device.type)
    expected = _unsharded_steps(context.device)
    # an interleaved table with an fsdp axis is refused
    names = ("rowwise", "colwise", "replicated", "routed" if "fsdp" in mesh_text else "routed-interleaved")
    plans = [*map(builtin_plan, names), builtin_plan("rowwise", sequence_parallel=False)]
    portion = Portion.on(mesh, micro_batches=2)
    return {
        plan.name: float((_steps(plan, mesh, context.device, portion) / expected - 1).abs().max())
        for plan in (plans[:1] if only_one else plans)
    }


def recorded(context: RankContext, mesh: DeviceMesh) -> dict[str, list[tuple[str, str, int, float]]]:
    """Per plan: (kind, phase, count, wire bytes) of one forward and backward, as rank 0 issued them. 2
    layers, batch 2, sequence 24."""
    found = {}
    axes: dict[str, str] = {mesh.get_group("tp").group_name: "tp"}
    for plan in llama_plans():
        base = unsharded(llama(), Ids.RANDOM, context.device)
        model = sharded(llama(), plan, mesh, base.state)
        with CollectiveRecorder(axes) as recorder:
            loss_of(model)(model(base.ids_BS), base.labels_BS).backward()
        counts: Counter[tuple[str, str]] = Counter()
        wire: dict[tuple[str, str], float] = {}
        for call in recorder.calls:
            key = (str(call.kind), call.phase)
            counts[key] += 1
            wire[key] = wire.get(key, 0.0) + call.wire_bytes
        found[plan.name] = [(*key, count, wire[key]) for key, count in sorted(counts.items())]
    return found


def state_dict_differences(context: RankContext, mesh: DeviceMesh) -> dict[str, int]:
    """Per plan: elements of state_dict() that differ from the unsharded model's, and of the local parameters
    after loading it back, whole and as DTensors, into a model with other weights."""
    found = {}
    for tied, names in ((False, WITH_SEQUENCE_PARALLEL), (True, ("colwise", "routed-interleaved"))):
        config = llama(tied=tied)
        base = unsharded(config, Ids.RANDOM, context.device)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in base.state.items()}
        for plan in map(builtin_plan, names):
            model = sharded(config, plan, mesh, base.state)
            saved = model.state_dict()
            wrong = sum(int((_whole(saved[name]) != tensor).sum()) for name, tensor in base.state.items())
            for state in (saved, base.state):
                other = sharded(config, plan, mesh, zeros)
                other.load_state_dict(state)
                wrong += sum(
                    int((_local(p) != _local(q)).sum())
                    for p, q in zip(model.parameters(), other.parameters(), strict=True)
                )
            found[f"{'tied' if tied else 'untied'} {plan.name}"] = wrong
    return found


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def disagreeing(context: RankContext, mesh: DeviceMesh) -> dict[str, list[str]]:
    """Subjects of the findings about tensors that are equal on all ranks, permuted on one, different on one;
    and about a model's norms."""
    group = mesh.get_group("tp")
    last = context.rank == context.world_size - 1
    same = torch.arange(6.0, device=context.device)
    tensors = [
        ("same", same),
        ("permuted on one rank", same.flip(0) if last else same),
        ("other on one rank", same + last),
        ("negative zero on one rank", torch.zeros(2, device=context.device) * (-1 if last else 1)),
    ]
    base = unsharded(llama(), Ids.RANDOM, context.device)
    model = sharded(llama(), builtin_plan("rowwise"), mesh, base.state)
    healthy = disagreements("replicated parameters", replicated_parameters(model, group).items(), group)
    if last:
        with torch.no_grad():
            _local(model.get_parameter("layers.1.ffn_norm.weight"))[3] += 1e-12
    drifted = disagreements("replicated parameters", replicated_parameters(model, group).items(), group)
    return {
        "tensors": [finding.subject for finding in disagreements("tensors", tensors, group)],
        "reasons": [finding.reason for finding in disagreements("tensors", tensors, group)],
        "healthy": [finding.subject for finding in healthy],
        "drifted": [finding.subject for finding in drifted],
        "checked": sorted(replicated_parameters(model, group)),
    }


def interleaved_table(context: RankContext, mesh: DeviceMesh) -> list[int]:
    """First elements of the table's rows as rank 0 keeps them, where row i of the whole table is filled with
    i."""
    config = MlpConfig(vocab_size=10)
    model = Mlp(config).double().to(context.device)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.arange(10.0)[:, None].expand(10, config.hidden))
    parallelize(model, mlp_plans()["routed interleaved"], mesh)
    assert list(applied_to(model).row_order) == (["embedding.weight"] if context.world_size > 1 else [])
    return [int(value) for value in _local(model.embedding.weight)[:, 0]]


def run(context: RankContext, payload: bytes) -> bytes:
    """For one number of ranks what is telling, or (payload "rest") the rest of the matrix."""
    mesh = init_device_mesh(context.device.type, (context.world_size,), mesh_dim_names=("tp",))
    telling = payload != b"rest"
    answer: dict[str, Any] = {"cases": _run_cases(context, mesh, telling=telling)}
    parts: dict[str, Callable[[], Any]] = {
        "laws": partial(laws, context, mesh),
        "clip": partial(clip_errors, context, mesh),
        "recorded": partial(recorded, context, mesh),
        "state_dict": partial(state_dict_differences, context, mesh),
        "ranks": partial(disagreeing, context, mesh),
        "interleaved": partial(interleaved_table, context, mesh),
        **{f"steps {text}": partial(step_errors, context, text) for text in MESHES[context.world_size]},
    }
    for name, part in parts.items():
        if is_telling(name, context.world_size) == telling:
            context.note(name)
            answer[name] = part()
    if context.world_size == 2:
        answer["faults"] = _run_faults(context, mesh, telling=telling)
    if context.world_size == 2 and telling:
        for name, (part_name, plant) in PART_FAULTS.items():
            context.note(name)
            with plant():
                answer[f"fault: {name}"] = (
                    step_errors(context, part_name.removeprefix("steps "), only_one=True)
                    if part_name.startswith("steps ")
                    else parts[part_name]()
                )
    return json.dumps(answer).encode()
