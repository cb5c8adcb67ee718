"""What of a PredictionRun stands together in a report: terms with their shares, memory against capacity, and
what was assumed, in words.

Adds up and looks up, no more. What it does not know: how a row is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from shardwise.core.case import StepSettings
from shardwise.core.machine import Spread
from shardwise.core.mesh import REPLICAS_AXIS, Mesh
from shardwise.core.pipeline import Schedule
from shardwise.core.prediction import (
    AttentionKernel,
    Filling,
    MemoryForecast,
    Precision,
    Prediction,
    Setup,
    Term,
)
from shardwise.core.prediction_run import (
    LAUNCH_BOUND,
    LaunchBound,
    MachineFacts,
    PlanDifference,
    PredictionRun,
)
from shardwise.report.common.plain import name, sentence
from shardwise.report.common.units import format_bytes, format_count, format_seconds
from shardwise.report.explain.rows import KIND_PLURALS

SOURCES_SHOWN = 4
NOTHING = 1e-12  # of a step: what rounding leaves of a term that is a difference
# stretches that wait for launches, named one by one
STRETCHES_SHOWN = 4

MEANINGS = {
    Term.MATMUL: "matmuls of linear layers: the machine's tiles and waves, never less than their bytes take",
    Term.ATTENTION: "attention kernels, forward and backward",
    Term.KERNELS: "norms, activations, residuals, copies: their bytes over the memory's rate",
    Term.EMBEDDING: "look-ups, and the gradients of the rows",
    Term.OPTIMIZER: "gradient norm, clipping and AdamW, once a step",
    Term.TENSOR: "collectives over tp that no work hides: what follows needs their result",
    Term.EXPERTS: "tokens to the ranks that hold their experts and back, at the load that is assumed",
    Term.CONTEXT: "what ranks that share a sequence exchange for attention, as far as no work hides it",
    Term.DATA: "collectives over dp and fsdp as far as no work hides them",
    Term.SLOWED: "what collectives that run beside it cost compute: they share memory and multiprocessors",
    Term.LAUNCH: "the device has nothing to run, since the host hasn't issued it yet",
    Term.WAITING: "in collectives a rank waits until the last of its group has come: equal ranks don't come "
    "at once",
    Term.BUBBLE: "a pipeline's stages wait for one another and for activations, at the step's beginning and "
    "end",
}


@dataclass(frozen=True, slots=True)
class TermRow:
    """A term's seconds and share of the step, in each prediction. is_off: switched off, so its 0 is no
    result."""

    term: Term
    seconds: tuple[float, ...]
    shares: tuple[float, ...]
    is_off: bool


def term_rows(predictions: Sequence[Prediction]) -> tuple[TermRow, ...]:
    """Terms in Term's order, without those that are 0 everywhere and weren't switched off."""
    rows = []
    for term in Term:
        seconds = tuple(dict(prediction.terms).get(term, 0.0) for prediction in predictions)
        is_off = any(term in prediction.setup.without for prediction in predictions)
        felt = any(
            abs(value) > NOTHING * prediction.step_s
            for value, prediction in zip(seconds, predictions, strict=True)
        )
        if felt or is_off:
            shares = tuple(
                value / prediction.step_s if prediction.step_s else 0.0
                for value, prediction in zip(seconds, predictions, strict=True)
            )
            rows.append(TermRow(term, seconds, shares, is_off))
    return tuple(rows)


def memory_title(predictions: Sequence[Prediction]) -> str:
    """`Memory of one rank at the peak`, and of a pipeline of which stage."""
    title = "Memory of one rank at the peak"
    if all(Mesh(each.axes).stages == 1 for each in predictions):
        return title
    stages = sorted({each.memory.stage for each in predictions})
    return f"{title}, of stage {stages[0]}" if len(stages) == 1 else f"{title}, of the fullest stage"


def memory_rows(memory: MemoryForecast) -> tuple[tuple[str, str, float], ...]:
    """(style key, name, bytes) of the kinds at the peak."""
    return tuple((kind.value, KIND_PLURALS[kind], n_bytes) for kind, n_bytes in memory.by_kind)


def levels_side_by_side(predictions: Sequence[Prediction]) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """memory_levels of each prediction, a row a level."""
    side_by_side = zip(*(memory_levels(prediction.memory) for prediction in predictions), strict=True)
    return tuple((levels[0][0], tuple(n_bytes for _, n_bytes in levels)) for levels in side_by_side)


def memory_levels(memory: MemoryForecast) -> tuple[tuple[str, float], ...]:
    """What the tensors take, what the allocator holds for them, what the device has in use, and what it
    has."""
    return (
        ("active: tensors at the peak", memory.active_bytes),
        ("the allocator's slack: rounding, and what it can't reuse", memory.slack_bytes),
        ("reserved by the allocator", memory.reserved_bytes),
        ("with the process's own", memory.device_bytes),
        ("the device has", memory.capacity_bytes),
    )


def fit_text(memory: MemoryForecast) -> str:
    """`fits, 12.3 GiB left`, or `doesn't fit: 4.50 GiB too much`."""
    return f"fits, {spare_text(memory)}" if memory.fits else f"doesn't fit: {spare_text(memory)}"


def spare_text(memory: MemoryForecast) -> str:
    """`12.3 GiB left`, or `4.50 GiB too much`, and whether it runs all the same."""
    spare = memory.capacity_bytes - memory.device_bytes
    if memory.fits:
        return f"{format_bytes(spare)} left"
    over = f"{format_bytes(-spare)} too much"
    if memory.given_back is None:
        return over
    times = f"{memory.given_back:,} times a step" if memory.given_back else "once, at the beginning"
    return f"{over}, but tensors fit: the allocator gives back what is free {times}"


def rate_text(prediction: Prediction) -> str:
    """`4.76 k tokens/s per device`."""
    return f"{format_count(prediction.tokens_per_s_per_device)} tokens/s per device"


def headline(prediction: Prediction) -> str:
    return (
        f"A step takes {format_seconds(prediction.step_s)}: {rate_text(prediction)}. It "
        f"{fit_text(prediction.memory)}."
    )


def mesh_text(prediction: Prediction) -> str:
    """`pp=4,fsdp=2,tp=8: 64 devices`."""
    mesh = Mesh(prediction.axes)
    return f"{mesh}: {mesh.world_size:,} device{'s' * (mesh.world_size > 1)}"


def micro_batches(setup: Setup) -> list[str]:
    return [f"{setup.micro_batches} micro-batches"] if setup.micro_batches > 1 else []


def machine_text(machine: MachineFacts) -> str:
    """`h100-sxm-80gb (about), 39 constants: 20 from X; 19 from Y`."""
    sources = [f"{count} from {sentence(source)}" for source, count in machine.sources]
    shown = "; ".join(sources[:SOURCES_SHOWN]) + (
        f"; and {len(sources) - SOURCES_SHOWN} sources more" if len(sources) > SOURCES_SHOWN else ""
    )
    return (
        f"{name(machine.name, '(machine)')} ({sentence(machine.about)}), {len(machine.constants)} constants: "
        f"{shown}"
    )


def assumptions(
    settings: StepSettings, setup: Setup, mesh: Mesh, machine: MachineFacts | None = None
) -> tuple[str, ...]:
    """What is taken for granted, a sentence each. machine: None for GPUs that don't say how far apart they
    come."""
    lines = [arrival(setup, machine.spread if machine is not None else None), *_of_ranks(setup, mesh)]
    lines.append(_attended(setup))
    lines.append(
        "Kernels between a layer's matmuls are fused by a compiler, which makes a SwiGLU's silu again "
        "instead of keeping it."
        if setup.compiled
        else "Kernels run one by one, as eager PyTorch launches them."
    )
    if setup.compiled_loss:
        lines.append("The loss is fused: it keeps the logits, and makes no copy of them in float32.")
    lines.append(_recomputed(settings, setup))
    if setup.matmul_dtype is not None:
        lines.append(
            f"The layers' linears multiply in {name(setup.matmul_dtype)}, scaled {setup.scaling}: both "
            "matrices are cast first. The head doesn't."
        )
    match setup.precision:
        case Precision.TRACED:
            pass
        case Precision.MASTER:
            lines.append(
                "Gradients, master weights and AdamW's moments are kept in float32 beside the parameters "
                "(Megatron's mixed precision)."
            )
            lines.append(
                "Gradients lie in one buffer, as Megatron's: no copy of them, or of each one's norm, is "
                "launched to sum and clip them. The time of clipping and the optimizer is that of states in "
                "the parameters' dtype: in float32 they move about twice the bytes."
            )
        case _:
            assert_never(setup.precision)
    if setup.optimizer_shards > 1:
        lines.append(f"{setup.optimizer_shards} ranks share the optimizer's state and work (ZeRO-1).")
    on_cpu = machine is not None and machine.device == "cpu"
    if mesh.size(REPLICAS_AXIS) > 1:
        lines.append(f"Gradients of whole replicas (dp) are reduced {_reduced(setup, on_cpu=on_cpu)}.")
    if setup.sums_float32:
        lines.append("Gradients of whole replicas are summed in float32.")
    if setup.overlap_tensor:
        runs = "are hidden by nothing, for on a CPU nothing runs" if on_cpu else "run"
        lines.append(f"Collectives over tp {runs} beside the matmuls that make or take them.")
    if setup.waits_for_device:
        lines.append("The host waits for the device at the end of each forward and backward.")
    lines += _of_allocator(setup)
    if setup.without:
        lines.append(f"Switched off: {', '.join(setup.without)}.")
    return tuple(lines)


def _attended(setup: Setup) -> str:
    match setup.attention:
        case AttentionKernel.FUSED:
            return "Attention is one fused kernel each way."
        case AttentionKernel.FLASH_1 | AttentionKernel.FLASH_2:
            generation = setup.attention.value.removeprefix("flash-")
            return f"Attention is FlashAttention {generation}, one fused kernel each way."
        case AttentionKernel.UNFUSED:
            kept = "none is kept" if setup.recompute_attention else "softmax and dropout keep theirs"
            return (
                "Attention is unfused: matmuls, softmax and dropout over whole score matrices, of which "
                f"{kept} for the backward."
            )
        case None:
            return "Attention is the kernel that the traced op names."


def _reduced(setup: Setup, *, on_cpu: bool) -> str:
    """When, of whole replicas' gradients."""
    if setup.overlap_data and not on_cpu:
        return f"beside the last backward, in {_buckets(setup)}"
    why = ", for on a CPU nothing runs beside" if setup.overlap_data else ""
    return f"after the backward, hidden by nothing{why}"


def _buckets(setup: Setup) -> str:
    if setup.bucket_mib is not None:
        return f"buckets of {format_bytes(setup.bucket_mib * 2.0**20)}"
    return "Megatron's buckets" if setup.precision is Precision.MASTER else "DDP's buckets of 25 MiB"


def arrival(setup: Setup, spread: Spread | None) -> str:
    """How far apart ranks come to their collectives. spread: the machine's."""
    told = spread if setup.spread_s is None else Spread(setup.spread_s)
    if told is None:
        return (
            "Every rank arrives at its collectives at once: waiting for late ranks is not modelled, for the "
            "machine doesn't say how far apart they come (--spread does)."
        )
    if told == Spread():
        return "Every rank arrives at its collectives at once."
    beside = f", and {format_seconds(told.collective_s)} at each collective" if told.collective_s else ""
    return (
        f"Ranks come to their collectives apart, by a standard deviation of {format_seconds(told.work_s)} "
        f"after a second of work (variances add up){beside}; each waits for the last of its group. Slower "
        "devices, and late passes of a pipeline, are not modelled."
    )


def _of_allocator(setup: Setup) -> list[str]:
    said = str(setup.allocator)
    lines = [f"PYTORCH_ALLOC_CONF is {said}."] if said else []
    match setup.filled:
        case Filling.SHARDS:
            pass
        case Filling.WHOLE:
            lines.append("Parameters are filled whole, one after the other, as Shardwise's ranks do it.")
        case _:
            assert_never(setup.filled)
    return lines


def _of_ranks(setup: Setup, mesh: Mesh) -> list[str]:
    """How stages, micro-batches and context ranks work together."""
    lines = []
    if mesh.stages > 1:
        pipeline = setup.pipeline()
        kind = {
            Schedule.GPIPE: "GPipe, all forwards and then all backwards",
            Schedule.ONE_F_ONE_B: "one forward, one backward (1F1B)",
            Schedule.INTERLEAVED: f"interleaved, {setup.chunks} chunks of layers a stage",
        }[pipeline.schedule]
        dealt = f"dealt {', '.join(map(str, setup.layers))}" if setup.layers else "dealt evenly"
        lines.append(f"{mesh.stages} stages in the schedule {kind}; layers are {dealt}.")
    if setup.micro_batches > 1:
        lines.append(
            f"All {setup.micro_batches} micro-batches are equal; gradients are reduced once, after the last."
        )
    if mesh.context > 1:
        lines.append(f"{mesh.context} ranks share each sequence; a rank's attention meets the keys of all.")
    return lines


def _recomputed(settings: StepSettings, setup: Setup) -> str:
    which, recomputed = "Each layer's forward runs", settings.recompute_layers
    if recomputed is not None and setup.stages == 1:
        which = f"The forward of the first {recomputed:,} layers runs"
    elif recomputed is not None:
        which = (
            f"The forward of each chunk's first layers ({recomputed:,} of the model's, rounded up in each "
            "chunk) runs"
        )
    again = {
        "none": (
            f"{'Unfused attention runs again' if setup.recompute_attention else 'Nothing is recomputed'} in "
            "the backward."
        ),
        "selective-ops": f"{which} again in the backward, but for fused attention and every second matmul.",
        "full": f"{which} again in the backward.",
    }
    return again.get(settings.recompute, f"Recompute in the backward: {name(settings.recompute)}.")


def is_launch_bound(prediction: Prediction) -> bool:
    """Whether waiting for launches is worth a flag."""
    return dict(prediction.terms).get(Term.LAUNCH, 0.0) >= LAUNCH_BOUND * prediction.step_s > 0.0


def launch_bound(run: PredictionRun) -> list[tuple[str, str]]:
    """(plan, what is flagged) of those that are; without the name of a plan that is alone."""
    waits = run.launch_bound or ((),) * len(run.predictions)
    alone = len(run.predictions) == 1
    return [
        ("" if alone else f"{plan_name(prediction)}:", launch_text(prediction, stretches))
        for prediction, stretches in zip(run.predictions, waits, strict=True)
        if is_launch_bound(prediction)
    ]


def plan_name(prediction: Prediction) -> str:
    return name(prediction.plan, "(no plan)")


def launch_text(prediction: Prediction, stretches: Sequence[LaunchBound]) -> str:
    """Of a prediction that is launch-bound."""
    share = dict(prediction.terms)[Term.LAUNCH] / prediction.step_s
    where = ", ".join(
        f"{name(each.module)} ({each.phase}, {format_seconds(each.waits_s)})"
        for each in stretches[:STRETCHES_SHOWN]
    )
    return (
        f"Launch-bound: {100 * share:.1f} % of the step the device waits for the host (flagged from "
        f"{100 * LAUNCH_BOUND:.0f} % on)."
        + (f" Most of it before {where}." if where else "")
        + (
            ""
            if prediction.setup.compiled
            else " A larger micro-batch, --compiled or CUDA graphs would take it away."
        )
    )


def difference_text(difference: PlanDifference) -> str:
    """`+1.20 ms matmul`: what most of the difference is."""
    sign = "+" if difference.term_s >= 0 else "-"
    return f"{sign}{format_seconds(abs(difference.term_s))} {difference.term}"


def notes(run: PredictionRun) -> tuple[str, ...]:
    """Of all predictions, each once; with the plan's name where it isn't all plans'."""
    plans_of: dict[str, list[str]] = {}
    for prediction in run.predictions:
        for note in prediction.notes:
            plans_of.setdefault(note, []).append(prediction.plan)
    whole = len(run.predictions)
    return tuple(
        sentence(note if len(plans) == whole else f"{', '.join(plans)}: {note}")
        for note, plans in plans_of.items()
    )
