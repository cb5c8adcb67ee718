"""predict(): a traced micro-batch's Program and a Machine -> how long a step takes, term by term, and what it
holds."""

from collections.abc import Iterator

from shardwise.core.machine import Machine
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import Prediction, Setup, Term
from shardwise.core.program import Op, Program
from shardwise.predict.costs import EFFICIENT, runs_efficient
from shardwise.predict.groups import joining_context, mesh_of
from shardwise.predict.layout import SLOWED_BESIDE, Layout, lay_out
from shardwise.predict.memory import forecast
from shardwise.predict.pipeline import pipeline_s
from shardwise.predict.streams import run


def predict(program: Program, machine: Machine, setup: Setup, *, replays: bool = True) -> Prediction:
    """Of a setup that check_setup lets pass. replays: see forecast()."""
    return prediction_of(lay_out(program, machine, setup), replays=replays)


def step_s(program: Program, machine: Machine, setup: Setup) -> float:
    """How long the step takes, alone: a prediction without its memory."""
    return sum(_terms(lay_out(program, machine, setup)).values())


def prediction_of(layout: Layout, *, replays: bool = True) -> Prediction:
    program, machine, setup, mesh = layout.program, layout.machine, layout.setup, layout.mesh
    terms = _terms(layout)
    sequences = program.settings.batch // Mesh(program.axes).data_parallel * mesh.data_parallel
    unknown = (
        f"{name} has no known cost on {machine.device}: counted by its bytes" for name in layout.work.unknown
    )
    return Prediction(
        program.model,
        program.plan,
        machine.name,
        mesh.axes,
        setup,
        sequences * setup.micro_batches * program.settings.seq * joining_context(program, setup),
        sum(terms.values()),
        tuple(terms.items()),
        forecast(program, machine, setup, replays=replays),
        (
            *program.notes,
            *_not_exchanged(program, setup),
            *unknown,
            *_by_another_rate(program, machine, setup),
            *_not_measured(machine),
        ),
    )


def _not_measured(machine: Machine) -> Iterator[str]:
    """What the host takes, where the machine doesn't say."""
    if unknown := machine.launch.unknown:
        yield f"{machine.name} doesn't say {', '.join(unknown)}: issuing counts as nothing there"


def _by_another_rate(program: Program, machine: Machine, setup: Setup) -> Iterator[str]:
    """Attention that runs a kernel whose rate the machine doesn't have."""
    ops = (item for item in program.kinds_of_items() if isinstance(item, Op))
    if setup.attention is not None or not any(map(runs_efficient, ops)):
        return
    dtype = program.settings.computed_dtype
    if machine.attention(dtype, EFFICIENT) is machine.attention(dtype):
        yield (
            "attention that FlashAttention doesn't take (values of another width than keys, or a mask) runs "
            "PyTorch's memory-efficient kernel, on Hopper from cuDNN 9.10 on cuDNN's: counted at the rate of "
            f"the fused kernel that {machine.name} has, for it has none of the memory-efficient one"
        )


def _not_exchanged(program: Program, setup: Setup) -> Iterator[str]:
    """What a Program that was traced without its context ranks can't say."""
    context = joining_context(program, setup)
    if context > 1:
        reduced = (
            "" if mesh_of(program, setup).reducing_axis
            else ", nor is reducing gradients over them (without an axis dp or fsdp)"
        )  # fmt: skip
        traced = f"the program was traced without its {context} context ranks"
        yield f"{traced}: exchanging keys isn't modelled{reduced}"


def _last_s(layout: Layout) -> dict[Term, float]:
    """What buckets of gradients, summed beside the last backward, add to it: what outlasts it, and what the
    rest takes from compute."""
    plain, last = layout.busiest.backward, layout.last
    if len(plain) == len(last):
        return {}
    plain_s, last_s = run(plain.punctual).length_s, run(last.punctual).length_s
    late_s = (run(last).length_s - last_s) - (run(plain).length_s - plain_s)
    outlasts_s = last_s - plain_s
    hidden_s = last.by_term()[Term.DATA] - plain.by_term()[Term.DATA] - outlasts_s
    return {Term.DATA: outlasts_s, Term.SLOWED: SLOWED_BESIDE * max(0.0, hidden_s), Term.WAITING: late_s}


def _terms(layout: Layout) -> dict[Term, float]:
    """Of the whole step: the busiest stage's for each micro-batch, the end's, and the bubble."""
    setup, busiest = layout.setup, layout.busiest
    once_s = layout.end.by_term()
    punctual_s = run(layout.end.punctual).length_s
    once_s[Term.LAUNCH] += punctual_s - sum(once_s.values())
    once_s[Term.WAITING] = run(layout.end).length_s - punctual_s
    terms = {term: busiest.terms[term] * setup.micro_batches + once_s[term] for term in Term}
    passes_s = pipeline_s(setup.pipeline(), layout.parts, setup.micro_batches, layout.transfer_s)
    terms[Term.BUBBLE] += passes_s - setup.micro_batches * busiest.times.total_s
    for term, seconds in _last_s(layout).items():
        terms[term] += seconds
    return terms | dict.fromkeys(setup.without, 0.0)
