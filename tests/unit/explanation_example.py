"""Explanations to draw: invented, in the proportions of small ones. What real programs are explained as:
tests/unit/test_explain.py."""

from dataclasses import replace

from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveKind, wire_bytes
from shardwise.core.explanation import (
    CollectiveGroup,
    Contrast,
    CopyGroup,
    Explanation,
    HoldingGroup,
    PhaseTotals,
    RuleSummary,
)
from shardwise.core.finding import Finding, FindingKind
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.program import ByData, Holder, MemoryKind, MemoryPeak, Phase
from shardwise.core.rule import RuleRef

MIB = 2**20
LAYERS = 4
TP = 8

WHOLE, PART, SUMMANDS = Replicate(), Shard(1), Partial()

EMBEDDING_REASON = "Each rank looked up the ids of its own rows and has zeros for all others."
GRADIENT_FINDING = Finding(
    FindingKind.GRADIENT_NOT_AS_PARAMETER,
    "tok_embeddings.weight",
    "its gradient is Replicate [1024, 64], 8 times its shard.",
    advice="Use the native engine, which keeps the shard's rows only.",
)
BY_DATA = ByData(mean_bytes=3.0 * MIB, max_bytes=5.0 * MIB, max_rank=3, bound_bytes=28.0 * MIB)


def group(
    kind: CollectiveKind,
    phase: Phase,
    module: str,
    before: Placement | None,
    after: Placement | None,
    count: int = 1,
    payload_bytes: int = 32 * MIB,
    reason: str = "",
) -> CollectiveGroup:
    """Collectives on tp that send what the formula says."""
    return CollectiveGroup(
        kind=kind,
        carries_out=kind,
        axis="tp",
        axis_size=TP,
        phase=phase,
        module=module,
        rule=RuleRef(module, "rowwise"),
        before=before,
        after=after,
        dtype="float32",
        count=count,
        payload_bytes=payload_bytes,
        wire_bytes=wire_bytes(kind, payload_bytes, TP),
        copied_bytes=0,
        by_data=None,
        reason=reason or f"{module} needs it.",
    )


def explanation(plan: str = "rowwise") -> Explanation:
    """A plan of sequence parallelism; the embedding is as its name says: rowwise, colwise, routed."""
    collectives = (*_embedding(plan, Phase.FORWARD), *_layers(), *_embedding(plan, Phase.BACKWARD), *_edges())
    forward, backward = (
        sum(found.total_wire_bytes for found in collectives if found.phase == phase)
        for phase in (Phase.FORWARD, Phase.BACKWARD)
    )
    return Explanation(
        model="llama3-example",
        parameters=1_234_567_890,
        plan=plan,
        engine="native",
        device="cuda",
        rank=0,
        axes=(("tp", TP),),
        settings=StepSettings(batch=4, seq=2048),
        layers=("layers", LAYERS),
        collectives=collectives,
        copies=tuple(
            CopyGroup(
                "aten::cat",
                Phase.FORWARD,
                f"layers.*.copied_{index}",
                (1, 2048, 64),
                "float32",
                LAYERS,
                (9 - index) * MIB,
                "To be whole.",
            )
            for index in range(9)
        ),
        phases=(
            PhaseTotals(Phase.FORWARD, 120, 2, 3_000_000_000_000, 900 * MIB, 5, forward),
            PhaseTotals(Phase.LOSS, 8, 0, 0, 64 * MIB, 1, 7.0),
            PhaseTotals(Phase.BACKWARD, 200, 0, 6_000_000_000_000, 2000 * MIB, 5, backward),
            PhaseTotals(Phase.OPTIMIZER, 2, 0, 0, 500 * MIB, 0, 0.0),
        ),
        holdings=(
            _holding("tok_embeddings.weight", 1, (1024, 64), (128, 64), Shard(0)),
            _holding("layers.*.attention_norm.weight", LAYERS, (64,), (64,), WHOLE),
            _holding("layers.*.attention.wq.weight", LAYERS, (64, 64), (8, 64), Shard(0)),
            _holding("layers.*.attention.wo.weight", LAYERS, (64, 64), (64, 8), Shard(1)),
            _holding("norm.weight", 1, (64,), (64,), WHOLE),
        ),
        rules=(
            RuleSummary("tok_embeddings", plan, 1, "tok_embeddings"),
            RuleSummary("layers.*.attention.wo", "rowwise(output=shard(1))", LAYERS, "layers.0.attention.wo"),
            RuleSummary("layers.*.misspelt", "colwise", 0, ""),
        ),
        sharded_share=0.99997,
        held=(
            (MemoryKind.PARAMETER, 100 * MIB),
            (MemoryKind.GRADIENT, 101 * MIB),
            (MemoryKind.OPTIMIZER, 200 * MIB),
        ),
        peak=MemoryPeak(
            700 * MIB,
            (
                (MemoryKind.PARAMETER, 100 * MIB),
                (MemoryKind.OPTIMIZER, 200 * MIB),
                (MemoryKind.ACTIVATION, 350 * MIB),
                (MemoryKind.TEMPORARY, 50 * MIB),
            ),
            tuple(
                Holder(
                    MemoryKind.ACTIVATION,
                    Phase.FORWARD,
                    f"layers.*.held_{index}",
                    "aten::mm",
                    (20 - index) * MIB,
                    LAYERS,
                )
                for index in range(12)
            ),
            Phase.LOSS,
            "(loss)",
            "aten::exp",
        ),
        findings=(),
        notes=("Attention is worked out as it runs on a CPU.",),
    )


def dtensor_example() -> Explanation:
    """Two findings, a gradient that is not as its parameter, a reduce-scatter that is an all-to-all, copies
    around it, nobody told why."""
    whole = explanation("rowwise@dtensor")
    first, *others = whole.collectives
    stands_for = replace(first, kind=CollectiveKind.ALL_TO_ALL, copied_bytes=32 * MIB)
    untold = replace(others[-1], before=None, after=None, rule=None)
    table, *holdings = whole.holdings
    gradient = replace(
        table, grad_placement=(WHOLE,), grad_shape=table.shape, gradient_bytes=8 * table.gradient_bytes
    )
    second = Finding(FindingKind.RULE_MATCHES_NOTHING, "layers.*.misspelt", "the rule holds for nothing.")
    return replace(
        whole,
        engine="dtensor",
        collectives=(stands_for, *others[:-1], untold),
        holdings=(gradient, *holdings),
        findings=(GRADIENT_FINDING, second),
    )


def alone_example() -> Explanation:
    """One rank, nothing sent, no layers, no gradient for one parameter, a step that needs no more than it
    holds."""
    whole = explanation("unsharded")
    frozen = replace(whole.holdings[-1], grad_placement=None, grad_shape=None, gradient_bytes=0)
    return replace(
        whole,
        engine="none",
        axes=(),
        layers=None,
        collectives=(),
        copies=(),
        holdings=(frozen,),
        rules=(),
        sharded_share=0.0,
        held=((MemoryKind.PARAMETER, 100 * MIB),),
        peak=MemoryPeak(100 * MIB, ((MemoryKind.PARAMETER, 100 * MIB),), (), Phase.FORWARD, "", ""),
        notes=(),
    )


def hostile_example(text: str) -> Explanation:
    """`text` in every place that a user's file or module can name."""
    whole = explanation("routed")
    return replace(
        whole,
        model=text,
        plan=text,
        axes=((text, TP),),
        collectives=tuple(
            replace(
                found,
                module=text if index else f"layers.*.{text}",
                axis=text,
                rule=RuleRef(text, text),
                reason=text,
                dtype=text,
            )
            for index, found in enumerate(whole.collectives)
        ),
        copies=tuple(replace(found, module=text, op=text, reason=text) for found in whole.copies),
        holdings=tuple(replace(found, name=text, rule=RuleRef(text, text)) for found in whole.holdings),
        rules=tuple(replace(found, pattern=text, style=text, example=text) for found in whole.rules),
        peak=replace(
            whole.peak,
            module=text,
            doing=text,
            holders=tuple(replace(found, module=text, maker=text) for found in whole.peak.holders),
        ),
        findings=(Finding(FindingKind.OPS_UNKNOWN, text, text, advice=text),),
        notes=(text,),
    )


def contrast_example(first: Explanation | None = None, second: Explanation | None = None) -> Contrast:
    """rowwise against colwise, unless others are given: they differ in the embedding, and in the size of one
    collective."""
    one, other = first or explanation("rowwise"), second or explanation("colwise")
    different = one.collectives[1:2]
    return Contrast(
        one,
        other,
        only_first=one.collectives[:1],
        only_second=other.collectives[:1],
        different=tuple((found, replace(found, count=2 * found.count)) for found in different),
        lines=("colwise sends less over the wire.", "Both hold the same."),
    )


def _embedding(plan: str, phase: Phase) -> tuple[CollectiveGroup, ...]:
    is_forward = phase is Phase.FORWARD
    module = "tok_embeddings"
    match plan:
        case "colwise":
            before, after = (Shard(2), PART) if is_forward else (PART, Shard(2))
            return (group(CollectiveKind.ALL_TO_ALL, phase, module, before, after, payload_bytes=4 * MIB),)
        case "routed":
            found = group(CollectiveKind.ALL_TO_ALL, phase, module, Shard(0), PART, payload_bytes=4 * MIB)
            return (replace(found, wire_bytes=2.5 * MIB, by_data=BY_DATA),)
        case "unsharded":
            return ()
        case _ if is_forward:
            return (
                group(CollectiveKind.REDUCE_SCATTER, phase, module, SUMMANDS, PART, reason=EMBEDDING_REASON),
            )
        case _:
            return (group(CollectiveKind.ALL_GATHER, phase, module, PART, WHOLE),)


def _layers() -> tuple[CollectiveGroup, ...]:
    return (
        group(CollectiveKind.ALL_GATHER, Phase.FORWARD, "layers.*.attention", PART, WHOLE, LAYERS),
        group(CollectiveKind.REDUCE_SCATTER, Phase.FORWARD, "layers.*.attention.wo", SUMMANDS, PART, LAYERS),
        group(CollectiveKind.ALL_GATHER, Phase.BACKWARD, "layers.*.attention.wo", PART, WHOLE, LAYERS),
        group(CollectiveKind.REDUCE_SCATTER, Phase.BACKWARD, "layers.*.attention", SUMMANDS, PART, LAYERS),
    )


def _edges() -> tuple[CollectiveGroup, ...]:
    return (
        group(CollectiveKind.ALL_REDUCE, Phase.LOSS, "(loss)", SUMMANDS, WHOLE, 3, payload_bytes=1024),
        group(CollectiveKind.ALL_REDUCE, Phase.CLIP, "", SUMMANDS, WHOLE, payload_bytes=4),
    )


def _holding(
    name: str, count: int, shape: tuple[int, ...], local: tuple[int, ...], placement: Placement
) -> HoldingGroup:
    return HoldingGroup(
        name=name,
        count=count,
        dtype="float32",
        shape=shape,
        local_shape=local,
        placement=(placement,),
        grad_placement=(placement,),
        grad_shape=local,
        parameter_bytes=MIB,
        gradient_bytes=MIB,
        optimizer_bytes=2 * MIB,
        rule=None,
    )
