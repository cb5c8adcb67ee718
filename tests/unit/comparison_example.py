"""A made-up Comparison for tests of the report. NO NUMBER IN HERE WAS MEASURED; none may be quoted
anywhere."""

import math
import random
from dataclasses import replace

from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveKind
from shardwise.core.finding import Finding, FindingKind
from shardwise.core.measurement import (
    CollectiveUse,
    Comparison,
    Environment,
    Measurement,
    MemoryUse,
    ModuleTimes,
    Ratio,
    Standing,
    TextSummary,
)
from shardwise.core.verification import Agreement

HOSTILE_NAME = "</script><img src=x onerror=alert(1)>"
HOSTILE_MARKUP = "[bold red]x[/] \x1b[31m\u2028<!--"

MIB = 2**20


def example(plans: tuple[str, ...] = ("rowwise", "colwise", "routed"), *, noise: bool = True) -> Comparison:
    """Whole steps of `plans` on 2 gloo ranks, the first one also as its own A/A pair. The numbers are
    invented."""
    labels = [*plans, f"{plans[0]} (again)"] if noise else list(plans)
    measurements = tuple(
        _measurement(
            label,
            plans[0] if index == len(plans) else label,
            index % len(plans),
            plans[0] if index == len(plans) else None,
        )
        for index, label in enumerate(labels)
    )
    standings = tuple(
        Standing(
            label=run.label,
            step_s=sorted(run.step_s)[10],
            tokens_per_s=8192 / sorted(run.step_s)[10],
            ratio=None if index == 0 else _ratio(1.004 if index == len(plans) else 1.0 - 0.06 * index),
            module_forward_s=0.041 * 0.85 ** (index % len(plans)),
            module_backward_s=0.083 * 0.87 ** (index % len(plans)),
        )
        for index, run in enumerate(measurements)
    )
    return Comparison(
        model="llama3-debug",
        parameters=58_200_064,
        mesh="tp=2",
        settings=StepSettings(batch=4, seq=2048),
        module=None,
        rounds=21,
        warmup=3,
        environment=Environment(
            command=f"shardwise compare {' '.join(plans)} --model llama3-debug --mesh tp=2 --batch 4 --seq "
            "2048",
            started="2026-01-31T12:00:00+00:00",
            machine="Invented CPU 9000",
            device="cpu",
            backend="gloo",
            world_size=2,
            threads_per_rank=4,
            cores=8,
            memory_bytes=32 * 2**30,
            versions=(("shardwise", "0.0.0"), ("torch", "2.13.0"), ("python", "3.11.2")),
            variables=(("OMP_NUM_THREADS", "4"),),
        ),
        text=TextSummary(
            "a made-up text",
            "a made-up BPE",
            tokens=1_000_000,
            distinct_ids=21_345,
            vocab_size=32_000,
            digest="sha256:0123456789ab",
        ),
        measurements=measurements,
        standings=standings,
        noise=_ratio(1.004) if noise else None,
        verdict=(
            f"{plans[-1]} is the fastest: a step takes 0.880 of {plans[0]}'s time [0.862, 0.898].",
            "All plans give the unsharded model's gradients (float64, 2 layers).",
            "The noise of this machine is 1.004 [0.986, 1.022]: differences below 2 % mean nothing here.",
        ),
        notes=("gloo's reduce-scatter sends as much as an all-reduce; the ranking need not hold on NCCL.",),
    )


def module_only_example() -> Comparison:
    """The embedding alone: no losses, no A/A pair, no resident memory, no agreement, no sent bytes."""
    whole = example(noise=False)
    return replace(
        whole,
        module="tok_embeddings",
        measurements=tuple(
            replace(
                run,
                losses=(),
                grad_norms=(),
                sent_bytes=None,
                module_times=None,
                agreement=None,
                memory=MemoryUse(65_536_000, 65_536_000, 0),
            )
            for run in whole.measurements
        ),
        standings=tuple(
            replace(standing, module_forward_s=None, module_backward_s=None) for standing in whole.standings
        ),
        notes=(),
    )


def cuda_example() -> Comparison:
    """Device memory in place of resident memory, no sent bytes, and a plan whose loss is lost."""
    whole = example()
    runs = [
        replace(
            run,
            sent_bytes=None,
            memory=replace(
                run.memory, resident_bytes=None, active_bytes=2_900 * MIB, reserved_bytes=3_400 * MIB
            ),
        )
        for run in whole.measurements
    ]
    runs[1] = replace(
        runs[1], losses=(10.5, 9.0, math.nan, math.inf, -math.inf), agreement=wrong_agreement(runs[1].label)
    )
    environment = replace(whole.environment, device="cuda", backend="nccl", machine="Invented GPU")
    return replace(whole, environment=environment, measurements=tuple(runs))


def wrong_agreement(label: str) -> Agreement:
    finding = Finding(
        FindingKind.GRADIENT_DIFFERS,
        "layers.0.attention_norm.weight",
        "the gradient is half of the unsharded model's.",
        0.5,
        0.5,
    )
    return Agreement(
        label, "float64", 2, 21, math.nan, "layers.0.attention_norm.weight", 0.5, 1e-9, (finding,)
    )


def _measurement(label: str, plan_name: str, position: int, repeats: str | None) -> Measurement:
    numbers = random.Random(label)
    middle_s = 0.183 * (1.0 - 0.06 * position)
    step_s = tuple(middle_s * numbers.uniform(0.96, 1.06) for _ in range(21))
    forward, backward = (
        (CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_GATHER),
        (CollectiveKind.ALL_TO_ALL, CollectiveKind.ALL_TO_ALL),
    )[position > 0]
    sent_bytes = (16.0, 8.0, 4.0)[min(position, 2)] * MIB
    return Measurement(
        label=label,
        repeats=repeats,
        plan_name=plan_name,
        plan_toml=f'name = "plan {position}"\nengine = "native"\n[rules]\n"tok_embeddings" = "rowwise"\n'
        '"output" = { style = "colwise" }\n',
        engine="native",
        step_s=step_s,
        rank_step_s=(step_s, tuple(value * 0.99 for value in step_s)),
        losses=tuple(10.4 - 2.2 * (1 - math.exp(-step / 8)) for step in range(24)),
        grad_norms=tuple(2.0 + 0.01 * step for step in range(24)),
        memory=MemoryUse(
            parameter_bytes=112 * MIB,
            gradient_bytes=(174 if position == 1 else 112) * MIB,
            optimizer_bytes=224 * MIB,
            resident_bytes=(900 - 20 * position) * MIB,
        ),
        collectives=(
            CollectiveUse(
                forward,
                "tp",
                "forward",
                1,
                2 * sent_bytes,
                sent_bytes,
                sent_bytes * (1.4 if position == 2 else 1),
            ),
            CollectiveUse(CollectiveKind.ALL_GATHER, "tp", "forward", 4, 128.0 * MIB, 64.0 * MIB, 64.0 * MIB),
            CollectiveUse(backward, "tp", "backward", 1, 2 * sent_bytes, sent_bytes, sent_bytes),
            CollectiveUse(
                CollectiveKind.REDUCE_SCATTER, "tp", "backward", 4, 128.0 * MIB, 64.0 * MIB, 64.0 * MIB
            ),
            CollectiveUse(CollectiveKind.ALL_REDUCE, "tp", "step", 2, 70_000.0, 70_000.0, 70_000.0),
        ),
        wire_bytes_largest_rank=(2.4 if position == 2 else 2) * sent_bytes + 128 * MIB + 70_000,
        sent_bytes=2 * sent_bytes + 260 * MIB,
        module_times=ModuleTimes(
            "tok_embeddings",
            tuple(0.041 * 0.85**position * numbers.uniform(0.95, 1.05) for _ in range(21)),
            tuple(0.083 * 0.87**position * numbers.uniform(0.95, 1.05) for _ in range(21)),
        ),
        agreement=Agreement(label, "float64", 2, 21, 3.1e-16, "tok_embeddings.weight", 2.2e-15, 1e-9),
    )


def _ratio(median: float) -> Ratio:
    return Ratio(median, median - 0.018, median + 0.018, confidence=0.973, pairs=21)
