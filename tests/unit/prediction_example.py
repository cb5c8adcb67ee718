"""PredictionRuns for tests: round numbers, and names that would break a page or a terminal."""

from dataclasses import replace

from shardwise.core.case import StepSettings
from shardwise.core.machine import Constant
from shardwise.core.prediction import MemoryForecast, Prediction, Setup, Term
from shardwise.core.prediction_run import LaunchBound, MachineFacts, PredictionRun
from shardwise.core.program import MemoryKind
from shardwise.predict.contrast import differences

MACHINE = MachineFacts(
    "gpu-x", "an example, 8 to a node", "cuda", 8, 80e9,
    (
        Constant("memory.capacity", "80", "GB per device", "its data sheet"),
        Constant("memory.bandwidth", "3", "TB/s per device", "its data sheet"),
        Constant("launch.forward", "10", "us", "a measurement", "results/x.json"),
    ),
)  # fmt: skip
MEMORY = MemoryForecast(
    30e9,
    ((MemoryKind.PARAMETER, 10e9), (MemoryKind.OPTIMIZER, 15e9), (MemoryKind.ACTIVATION, 5e9)),
    33e9,
    34e9,
    80e9,
)
TOO_MUCH = replace(MEMORY, device_bytes=90e9)
TERMS = {Term.MATMUL: 0.06, Term.KERNELS: 0.02, Term.TENSOR: 0.015, Term.LAUNCH: 0.005}


def prediction(
    plan: str = "rowwise",
    *,
    terms: dict[Term, float] = TERMS,
    memory: MemoryForecast = MEMORY,
    setup: Setup | None = None,
) -> Prediction:
    found = tuple((term, terms.get(term, 0.0)) for term in Term)
    return Prediction(
        "llama3-8b",
        plan,
        "gpu-x",
        (("fsdp", 2), ("tp", 4)),
        setup or Setup(),
        16_384,
        sum(terms.values()),
        found,
        memory,
    )


def run_of(*predictions: Prediction, machine: MachineFacts = MACHINE) -> PredictionRun:
    found = predictions or (prediction(),)
    waits = (LaunchBound("layers.*.attention_norm", "forward", 0.004),)
    settings = StepSettings(2, 8192, dtype="bfloat16")
    return PredictionRun(machine, settings, found, differences(found), (waits,) * len(found))


def two_plans() -> PredictionRun:
    return run_of(
        prediction(),
        prediction("colwise", terms=TERMS | {Term.TENSOR: 0.02, Term.MATMUL: 0.0595}, memory=TOO_MUCH),
    )


def hostile_run(text: str) -> PredictionRun:
    """The text wherever a user's file has a say."""
    machine = replace(MACHINE, name=text, about=text, constants=(Constant(text, text, text, text, text),))
    one = replace(prediction(text), model=text, machine=text, notes=(text,))
    found = run_of(one, replace(one, plan=f"{text} #2"), machine=machine)
    return replace(found, launch_bound=((LaunchBound(text, "forward", 0.004),),) * 2)
