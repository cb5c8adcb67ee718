"""Made plans by the local-shape run: each op of the model's own forward has, with a rank's weights and
counts, the shape that the record says."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from shardwise.core.plan import Plan, Style
from shardwise.models.model_source import ModelSource
from shardwise.models.source import find_model
from tests.local_shapes import local_run, made_whole
from tests.matrix import thinned

OURS = ("llama3-debug", "gpt-debug")
HF = (
    *("llama", "qwen3", "phi3", "gemma2", "gpt_neox", "gpt2", "falcon", "deepseek_v3", "olmo2", "opt"),
    *("falcon_h1", "bloom", "mpt", "gpt_bigcode", "stablelm", "persimmon", "codegen", "granite", "cohere2"),
    *("bamba", "gptj", "phi", "glm4", "nemotron", "starcoder2", "exaone4", "olmo", "apertus", "helium"),
    "minimax",
)
USERS = ("grouped", "padded", "convolved", "sloped", "square", "odd", "fused", "turned", "scanned")
TELLING = ("llama", "qwen3", "phi3", "gemma2", "gpt_neox", "gpt2", "falcon", "deepseek_v3", "olmo2", "opt")
MIXES = ("scaled", "named", "latent")
NAMES = (
    *OURS,
    *(f"hf:{name}" for name in HF),
    *(f"tests.unit.mixed_models:{name}" for name in USERS),
    *(f"tests.distributed.mixed_modules:{name}" for name in MIXES),
)
# at tp 4 nothing of it is cut evenly
CASES = [(name, tp) for name in NAMES for tp in (2, 4) if tp == 2 or not name.endswith(":odd")]


def is_telling(name: str, tp: int) -> bool:
    return tp == 2 and (not name.startswith("hf:") or name[3:] in (*TELLING, "falcon_h1"))


def source_of(name: str, tp: int) -> ModelSource:
    source = find_model(name)
    return source.small(tp) or source


@pytest.mark.parametrize(("name", "tp"), thinned(CASES, is_telling))
def test_a_rank_s_forward_has_the_shapes_of_the_record(name: str, tp: int) -> None:
    source = source_of(name, tp)
    run = local_run(source, made_whole(source, tp), tp)
    assert run.complaints == ()
    assert run.n_ops > 20
    assert run.n_cut > 0


def changed(plan: Plan, pattern: str, change: Callable[[Style], Style]) -> Plan:
    assert pattern in {rule.pattern for rule in plan.rules}
    rules = (
        replace(rule, style=change(rule.style)) if rule.pattern == pattern else rule for rule in plan.rules
    )
    return replace(plan, rules=tuple(rules))


@pytest.mark.parametrize(
    ("name", "pattern", "change", "complaint"),
    [
        ("opt", "model.decoder.layers.*.self_attn", lambda style: replace(style, divide=()), "view in"),
        (
            "phi3",
            "model.layers.*.self_attn.qkv_proj",
            lambda style: replace(style, pieces=()),
            "model.layers.0.self_attn.qkv_proj.weight isn't cut at its own units",
        ),
        (
            "phi3",
            "model.layers.*.self_attn",
            lambda style: replace(style, divide=()),
            "in model.layers.0.self_attn",
        ),
        (
            "gpt2",
            "transformer.h.*.attn.c_attn",
            lambda style: replace(style, divide=()),
            "shape '[2, 24, 192]' is invalid",
        ),
    ],
)
def test_the_run_sees_what_a_plan_forgets(
    name: str, pattern: str, change: Callable[[Style], Style], complaint: str
) -> None:
    source = source_of(f"hf:{name}", 2)
    plan = made_whole(source, 2)
    complaints = local_run(source, changed(plan, pattern, change), 2).complaints
    assert complaints
    assert complaint in complaints[0]
