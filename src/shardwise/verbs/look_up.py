"""look_up: a model's table of token ids alone, under each style -> LookUps: which is best from how many ranks
on. What is traced is the table between nothing but a norm and a head, so a point costs a fraction of a
second."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import InputError, ModelError, OptionError
from shardwise.core.look_up import LookUpPoint, LookUps
from shardwise.core.machine import Machine
from shardwise.core.mesh import Mesh, Role
from shardwise.core.prediction import Setup
from shardwise.core.program import Program
from shardwise.core.shown import shown
from shardwise.core.sweep import Refusal
from shardwise.verbs.predict import MACHINE, SEQ, PredictOptions
from shardwise.verbs.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from shardwise.core.plan import Plan
    from shardwise.models.source import ModelSource
    from shardwise.models.specs import ModelSpec

STYLES = ("rowwise", "colwise", "routed", "routed-interleaved", "replicated")
TABLE, HEAD = "tok_embeddings", "output"
MOST_DEGREE = 1024
MOST_POINTS = 500


@dataclass(frozen=True, slots=True)
class LookUpOptions:
    """degrees: tensor-parallel ranks; empty: 2, 4, 8 ... up to a node's devices. batches: sequences that a
    rank's group looks up in a step; empty: the case's batch, or 1."""

    degrees: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """A model's table of token ids."""

    vocab: int
    hidden: int
    is_tied: bool


def look_up(
    case: Case,
    options: LookUpOptions | None = None,
    run: PredictOptions | None = None,
    progress: Progress = silent,
) -> LookUps:
    """The case's plans, by default the native engine's five styles. Token ids are of the case's text, which
    decides what routed sends. Raises InputErrors of the model, the text and names that aren't known; what one
    plan can't be at some degree is among `refused`."""
    from shardwise.models.source import find_model
    from shardwise.parallel.builtin import builtin_names, builtin_plan
    from shardwise.predict.check import check_setup
    from shardwise.predict.contrast import facts_of
    from shardwise.predict.machines import load_machine
    from shardwise.text.batches import Batches
    from shardwise.text.traced_ids import check_traced, stream_of

    options, machine = options or LookUpOptions(), load_machine(case.machine or MACHINE)
    degrees, batches = _degrees(case.mesh, machine, options.degrees), _batches(case.step, options.batches)
    names = tuple(dict.fromkeys(case.plans or STYLES))
    _check(names, builtin_names(), len(names) * len(degrees) * len(batches))
    settings = replace(
        case.step, batch=batches[0], seq=case.step.seq or SEQ, accumulation=1, recompute="none",
        param_dtype=None, reduce_dtype=None, recompute_layers=None,
    )  # fmt: skip
    for batch in batches:
        check_traced(batch, settings.seq)
    table = table_of(find_model(case.model))
    stream = stream_of(case.text, table.vocab, settings.seed, progress)
    setup = replace((run or PredictOptions()).setup(None, StepSettings()), micro_batches=1)
    points, refused = [], Counter[tuple[str, str]]()
    wanted = [(name, tp, batch) for name in names for tp in degrees for batch in batches]
    for number, (name, tp, batch) in enumerate(wanted):
        progress(f"the look-up under {name} on {tp} ranks", number, len(wanted))
        try:
            plan = _table_only(builtin_plan(name, sequence_parallel=case.sequence_parallel))
            part = replace(settings, batch=batch)
            ids_BS = Batches(stream, part.batch, part.seq).at(0).ids_BS
            program = _program(table, plan, tp, part, machine, ids_BS)
        except InputError as error:
            refused[name, str(error)] += 1
            continue
        check_setup(program, machine, setup)
        points.append(_point(name, tp, batch, program, machine, setup))
    return LookUps(
        case.model,
        table.vocab,
        table.hidden,
        table.is_tied,
        facts_of(machine),
        settings,
        setup,
        stream.summary.source,
        tuple(points),
        tuple(Refusal(name, reason, count) for (name, reason), count in refused.items()),
    )


def _check(names: Sequence[str], known: Collection[str], points: int) -> None:
    """Raises OptionError for a plan that isn't built in, and for too many points."""
    for name in names:
        if name not in known:
            raise OptionError(
                f'--look-up: "{shown(name)}" is no built-in plan, and their styles are compared. '
                f"Use {', '.join(known)}."
            )
    if points > MOST_POINTS:
        raise OptionError(
            f"--look-up: {points:,} points; at most {MOST_POINTS}. Give fewer plans, --degrees or "
            "--micro-batches."
        )


def table_of(source: "ModelSource") -> Table:
    """Of a model, whoever makes it. Raises ModelError where it looks up no ids."""
    import torch
    from torch import nn

    from shardwise.models.source import embedding_of

    model = source.build(dtype=torch.float32)
    name = embedding_of(model)
    if name is None:
        raise ModelError(f'model "{shown(source.name)}": it has no nn.Embedding, so there is no look-up.')
    table = model.get_submodule(name)
    assert isinstance(table, nn.Embedding)
    is_tied = any(
        parameter is table.weight
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if other != f"{name}.weight"
    )
    return Table(table.num_embeddings, table.embedding_dim, is_tied)


def _degrees(mesh: Mesh, machine: Machine, asked: tuple[int, ...]) -> tuple[int, ...]:
    """Raises OptionError."""
    from shardwise.predict.check import check_devices

    if mesh.world_size > mesh.tp:
        raise OptionError(f"--mesh {mesh}: --look-up is over tp alone. Give --degrees 2,4,8, or a mesh tp=8.")
    doubled = tuple(2**power for power in range(1, 11) if 2**power <= machine.devices_per_node)
    degrees = tuple(dict.fromkeys(asked)) or ((mesh.tp,) if mesh.tp > 1 else doubled)
    if not degrees:
        raise OptionError(
            f"--look-up: machine {shown(machine.name)} has one device a node, so no degree is the node's. "
            f"Give --degrees, of 2 to {MOST_DEGREE} ranks."
        )
    for degree in degrees:
        if not 2 <= degree <= MOST_DEGREE:
            raise OptionError(f"--degrees: {degree} ranks. Use 2 to {MOST_DEGREE}.")
        check_devices(machine, Mesh.of({Role.CUTS_TENSORS: degree}))
    return degrees


def _batches(step: StepSettings, asked: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(asked)) or (max(1, step.batch // step.accumulation),)


def _table_only(plan: "Plan") -> "Plan":
    """Its rules for a model without layers."""
    return replace(plan, rules=tuple(rule for rule in plan.rules if not rule.pattern.startswith("layers.")))


def _carrier(table: Table) -> "ModelSpec":
    """A Llama of that table, without layers."""
    from shardwise.models.llama import LlamaConfig
    from shardwise.models.specs import ModelSpec

    config = LlamaConfig(
        table.vocab, table.hidden, n_layers=0, n_heads=1, n_kv_heads=1, ffn_hidden=1, tied=table.is_tied
    )
    return ModelSpec("a table", config, "a table of token ids, a norm and a head")


def _program(
    table: Table, plan: "Plan", tp: int, part: StepSettings, machine: Machine, ids: "torch.Tensor"
) -> Program:
    from shardwise.predict.alone import alone
    from shardwise.trace.trace import trace

    mesh = Mesh.of({Role.CUTS_TENSORS: tp})
    whole = trace(_carrier(table), plan, mesh, part, device=machine.device, ids=ids)
    return alone(whole, TABLE, HEAD if table.is_tied else "")


def _point(name: str, tp: int, batch: int, program: Program, machine: Machine, setup: Setup) -> LookUpPoint:
    from shardwise.predict.memory import kept
    from shardwise.predict.predict import predict

    found = predict(program, machine, setup)
    return LookUpPoint(
        name,
        tp,
        batch,
        found.step_s,
        found.terms,
        sum(_sent(program)),
        round(sum(kept(program, setup).values())),
        found.memory.active_bytes,
    )


def _sent(program: Program) -> Iterator[float]:
    """By the busiest rank, each collective."""
    for each in program.collectives():
        yield max(each.call.wire_bytes, each.by_data.max_bytes if each.by_data is not None else 0.0)
