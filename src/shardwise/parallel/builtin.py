"""Built-in plans for models with Llama's module names. They differ only where their names say so: in the embedding, and in the engine."""

from dataclasses import replace

from shardwise.core.errors import PlanError
from shardwise.core.placement import Replicate, Shard
from shardwise.core.plan import Engine, Ownership, Plan, Rule, Style, StyleName, suggest

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


def builtin_plan(name: str, *, sequence_parallel: bool = True) -> Plan:
    """A built-in plan by name. Raises PlanError for an unknown one, or one that isn't offered without sequence parallelism."""
    if name not in ABOUT:
        raise PlanError(f'unknown plan "{name}".{suggest(name, ABOUT)} Known: {", ".join(ABOUT)}; or the path of a .toml file.')
    embedding_name, _, engine = name.partition("@")
    embedding = _EMBEDDINGS[embedding_name]
    if not sequence_parallel:
        if embedding.name is StyleName.ROUTED:
            raise PlanError(
                f'plan "{name}" isn\'t offered without sequence parallelism: without it every rank needs every row. '
                "Use rowwise, colwise or replicated."
            )
        embedding = replace(embedding, output=Replicate())
    plan_name = name if sequence_parallel else f"{name} (no sequence parallelism)"
    return Plan(plan_name, _rules(embedding, sequence_parallel), Engine(engine) if engine else Engine.NATIVE)


def _rules(embedding: Style, sequence_parallel: bool) -> tuple[Rule, ...]:
    between = Shard(1) if sequence_parallel else Replicate()
    norm = Style(StyleName.SEQUENCE_PARALLEL if sequence_parallel else StyleName.REPLICATE)
    gather = Style(StyleName.GATHER_INPUT, input=between)
    colwise = Style(StyleName.COLWISE)
    rowwise = Style(StyleName.ROWWISE, output=between)
    styles = {
        "tok_embeddings": embedding,
        "layers.*.attention_norm": norm,
        "layers.*.attention": gather,
        "layers.*.attention.wq": colwise,
        "layers.*.attention.wk": colwise,
        "layers.*.attention.wv": colwise,
        "layers.*.attention.wo": rowwise,
        "layers.*.ffn_norm": norm,
        "layers.*.feed_forward": gather,
        "layers.*.feed_forward.w1": colwise,
        "layers.*.feed_forward.w3": colwise,
        "layers.*.feed_forward.w2": rowwise,
        "norm": norm,
        "output": Style(StyleName.COLWISE, input=between, output=Shard(-1)),
    }
    return tuple(Rule(pattern, style) for pattern, style in styles.items())
