"""Built-in plans for models with the module names of models/llama.py, models/gpt.py or models/moe.py. They
differ only where their names say so: in the embedding, and in the engine; and in the rules of the modules
that one family has and the other hasn't."""

from dataclasses import replace
from typing import assert_never

from shardwise.core.errors import PlanError
from shardwise.core.held import Held
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.plan import (
    ContextAttention,
    Engine,
    Family,
    Ownership,
    Plan,
    Rule,
    Style,
    StyleName,
    suggest,
)

_EMBEDDINGS = {
    "rowwise": Style(StyleName.ROWWISE),
    "colwise": Style(StyleName.COLWISE),
    "routed": Style(StyleName.ROUTED),
    "routed-interleaved": Style(StyleName.ROUTED, ownership=Ownership.INTERLEAVED),
    "replicated": Style(StyleName.REPLICATED),
}
ABOUT = {
    "rowwise": "table cut by vocabulary; masked look-ups, reduce-scatter",
    "colwise": "table cut by hidden; look-ups in order of destination, all-to-all",
    "routed": "table cut by vocabulary; owners send each distinct row once to the ranks that need it",
    "routed-interleaved": "routed, rows dealt round-robin against the hot rank",
    "replicated": "whole table on every rank; no collective forward, an all-reduce of its gradient",
    "rowwise@dtensor": "torchtitan's 2025 plan on PyTorch's own styles",
    "colwise@dtensor": "the same with the embedding colwise",
}


def builtin_names() -> tuple[str, ...]:
    return tuple(ABOUT)


def builtin_plan(
    name: str,
    *,
    sequence_parallel: bool = True,
    family: Family = Family.LLAMA,
    context_attention: ContextAttention = ContextAttention.GATHER,
) -> Plan:
    """A built-in plan by name, for the models of a family.

    Raises PlanError for an unknown one, or one that isn't offered for the family, or without sequence
    parallelism.
    """
    if name not in ABOUT:
        raise PlanError(
            f'unknown plan "{name}".{suggest(name, ABOUT)} Known: {", ".join(ABOUT)}; or the path of a .toml '
            "file."
        )
    embedding_name, _, engine = name.partition("@")
    embedding = _EMBEDDINGS[embedding_name]
    if not sequence_parallel:
        if "output" not in embedding.name.arguments:
            raise PlanError(
                f'plan "{name}" isn\'t offered without sequence parallelism: without it every rank needs '
                "every row. Use rowwise, colwise or replicated."
            )
        embedding = replace(embedding, output=Replicate())
    plan_name = name if sequence_parallel else f"{name} (no sequence parallelism)"
    if context_attention is not ContextAttention.GATHER:
        plan_name = f"{plan_name} ({context_attention} attention)"
    chosen = Engine(engine) if engine else Engine.NATIVE
    if family is Family.MOE and chosen is Engine.DTENSOR:
        native = ", ".join(known for known in ABOUT if "@" not in known)
        raise PlanError(
            f"plan \"{name}\" isn't offered for a mixture of experts: PyTorch's own styles cut none. Use "
            f"{native}."
        )
    rules = _rules(embedding, sequence_parallel, family, chosen)
    return Plan(plan_name, rules, chosen, context_attention=context_attention)


def _rules(embedding: Style, sequence_parallel: bool, family: Family, engine: Engine) -> tuple[Rule, ...]:
    between = Shard(1) if sequence_parallel else Replicate()
    norm = Style(StyleName.SEQUENCE_PARALLEL if sequence_parallel else StyleName.REPLICATE)
    gather = Style(StyleName.GATHER_INPUT, input=between)
    colwise = Style(StyleName.COLWISE)
    rowwise = Style(StyleName.ROWWISE, output=between)
    projections: tuple[str, ...]
    norms: tuple[str, ...] = ()
    positions: dict[str, Style] = {}
    feed_forward = {"": gather, "w1": colwise, "w2": rowwise}
    match family:
        case Family.LLAMA:
            projections = ("wq", "wk", "wv")
            feed_forward["w3"] = colwise
        case Family.MOE:
            projections, norms = ("wq", "wk", "wv"), ("q_norm", "k_norm")
            feed_forward = _experts(between)
        case Family.GPT:
            projections = ("wqkv",)
            # PyTorch's styles have no replicated table; the GPT in its own tests has the positions rowwise
            by_engine = StyleName.REPLICATED if engine is Engine.NATIVE else StyleName.ROWWISE
            positions["pos_embeddings"] = Style(by_engine, output=between)
        case _:
            assert_never(family)
    styles = {
        "tok_embeddings": embedding,
        **positions,
        "layers.*.attention_norm": norm,
        "layers.*.attention": gather,
        **{f"layers.*.attention.{name}": colwise for name in projections},
        **{f"layers.*.attention.{name}": _PART_OF_GRADIENT for name in norms},
        "layers.*.attention.wo": rowwise,
        "layers.*.ffn_norm": norm,
        **{f"layers.*.feed_forward.{name}".rstrip("."): style for name, style in feed_forward.items()},
        "norm": norm,
        "output": Style(StyleName.COLWISE, input=between, output=Shard(-1)),
    }
    return tuple(Rule(pattern, style) for pattern, style in styles.items())


_PART_OF_GRADIENT = Style(StyleName.REPLICATE, gradient=Partial())
"""Of what is whole where each rank does a part of the work."""


def _experts(between: Placement) -> dict[str, Style]:
    """Rules of a mixture whose experts are shared out over ep, and cut inside over tp, by the module's name
    in it: each tp rank has all tokens, and gives its summand."""
    cut = {"w1": 1, "w2": 2, "w3": 1}
    inside = tuple((name, Held(Shard(dim))) for name, dim in cut.items())
    return {
        "": Style(StyleName.GATHER_INPUT, input=between, output=between),
        "router.gate": _PART_OF_GRADIENT,
        "experts": Style(StyleName.EXPERTS, parameters=inside),
    }
