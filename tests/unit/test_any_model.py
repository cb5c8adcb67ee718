"""Every verb that needs no ranks takes every model; what is named, chosen and refused before ranks start."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardwise
from shardwise.core.case import Case, TextSource
from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.models.factory import FactoryModel
from shardwise.models.source import embedding_of, find_model
from shardwise.parallel.need import state_bytes
from shardwise.text.reading import why_no_text
from shardwise.text.traced_ids import stream_of
from shardwise.verbs import compare_checks
from shardwise.verbs.checks import default_plan
from shardwise.verbs.compare import compare
from shardwise.verbs.compare_checks import DEFAULT_PLANS, check_depth, default_plans
from shardwise.verbs.walk import walk
from tests.distributed.any_model_workers import FACTORY, HUGGING_FACE, PLAN, Blocks
from tests.matrix import FULL

MODELS = ("a user's", "Hugging Face's")


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(PLAN.to_toml())
    return str(path)


def case(which: str, mine: str, **keys: Any) -> Case:
    model, plan = (FACTORY, mine) if which == MODELS[0] else (HUGGING_FACE, "hf")
    return shardwise.case(model=model, plans=[plan], seq=16, **keys)


@pytest.mark.parametrize("which", MODELS)
def test_three_axes_are_explained_and_predicted_of_any_model(which: str, mine: str) -> None:
    asked = case(which, mine, mesh="dp=2,fsdp=2,tp=2")
    explanation: Any = shardwise.explain(asked).answer
    assert {group.axis for group in explanation.collectives} == {"dp", "fsdp", "dp+fsdp", "tp"}
    (prediction,) = shardwise.predict(asked).answer.predictions
    assert prediction.step_s > 0
    assert prediction.memory.fits


@FULL
def test_a_sweep_goes_over_a_user_s_own_model(mine: str) -> None:
    sweep = shardwise.sweep(case(MODELS[0], mine), devices=2, micro_batches=[1]).answer
    assert {point.axes for point in sweep.points} >= {(("tp", 2),), (("fsdp", 2), ("tp", 1))}


def test_a_module_of_a_user_s_own_model_is_walked_through(mine: str) -> None:
    assert walk(case(MODELS[0], mine), "body.0.up").module == "body.0.up"


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        ("llama3-debug", "rowwise"),
        (HUGGING_FACE, "hf"),
        (FACTORY, "own"),
        (f"{__name__}:with_names_of_llama", "rowwise"),
    ],
)
def test_where_no_plan_is_named_the_model_s_own_is_taken(model: str, plan: str) -> None:
    assert default_plan(find_model(model)) == plan


def with_names_of_llama() -> nn.Module:
    return find_model("llama3-debug?n_layers=1").build(dtype=torch.float32)


def test_a_model_that_no_plan_is_for_gets_one_line() -> None:
    with pytest.raises(OptionError) as refused:
        default_plan(find_model("tests.distributed.any_model_workers:few_words"))
    assert str(refused.value) == (
        "no plan is named, and the built-in ones' rules aren't for "
        "tests.distributed.any_model_workers:few_words. Name a .toml file; "
        "`shardwise plan --model tests.distributed.any_model_workers:few_words --toml` makes one."
    )


def test_compare_s_default_plans_are_the_built_in_ones_where_they_are_for_the_model() -> None:
    assert default_plans(find_model("llama3-debug")) == DEFAULT_PLANS
    assert default_plans(find_model("gpt-debug")) == ("rowwise", "colwise", "routed")
    assert default_plans(find_model(HUGGING_FACE)) == ("hf",)


REFUSED = (
    (
        {"model": HUGGING_FACE, "plans": ["unsharded"]},
        'plan "unsharded" shards nothing, and mesh tp=2 has a tp axis. Use tp=1, or another plan.',
    ),
    (
        {"model": "hf:gpt2?n_layer=1,n_embd=16,n_head=2"},
        'plan "hf": transformers has no tensor-parallel plan for GPT2LMHeadModel. '
        "`shardwise plan` makes one.",
    ),
    (
        {"model": "llama3-debug", "plans": ["own"]},
        'plan "own": llama3-debug doesn\'t shard itself. It is for package.module:factory where the factory '
        "takes a mesh.",
    ),
    (
        {"model": f"{__name__}:without_layers", "plans": ["unsharded"], "mesh": "dp=2", "recompute": "full"},
        "--recompute full: the model has no nn.ModuleList of layers, which could be recomputed one by one. "
        "Leave it out.",
    ),
)


def without_layers() -> nn.Module:
    return nn.Sequential(nn.Embedding(300, 4), nn.Linear(4, 300))


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_compare_refuses_in_one_line_what_can_t_be_before_ranks_start(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(shardwise.core.errors.InputError) as refused:
        compare(shardwise.case(seq=16, device="cpu", **keys))
    assert str(refused.value) == message


@pytest.mark.parametrize(("room", "depth"), [(10**9, 3), (340_000, 2), (310_000, 1)])
def test_plans_are_proved_at_the_depth_that_fits(
    room: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # words and head have 9,600 parameters together, a block 1,088; each takes 28 bytes
    monkeypatch.setattr(compare_checks, "_room", lambda *_: room)
    source = FactoryModel("blocks", Blocks, frozenset(), False)
    model = source.build(dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 9600 + 3 * 1088
    assert check_depth(source, model, Mesh.parse("tp=2"), "cpu") == depth


def test_where_not_even_one_layer_fits_the_check_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_checks, "_room", lambda *_: 2**18)
    source = find_model(FACTORY)
    with pytest.raises(OptionError) as refused:
        check_depth(source, source.build(dtype=torch.float32), Mesh.parse("tp=2"), "cpu")
    assert str(refused.value) == (
        f"--check: 1 layer of {FACTORY} unsharded in float64 doesn't fit here, with 0.0 GiB for a rank. "
        "Leave the check out with --no-check."
    )


def test_ids_are_random_only_where_a_tokenizer_of_bytes_has_too_few() -> None:
    why = "Token ids are random: a tokenizer of bytes needs 256 ids, and the model has 255."
    assert why_no_text(TextSource(), 255) == why
    for given, vocab_size in (
        (TextSource(), 256),
        (TextSource(random_ids=True), 255),
        (TextSource(files=("mine.txt",)), 255),
        (TextSource(tokenizer="mine.json"), 255),
    ):
        assert why_no_text(given, vocab_size) is None
    said: list[str] = []
    stream = stream_of(TextSource(), 255, 0, said.append)
    assert said == [why]
    assert stream.summary.tokenizer == "none"


@pytest.mark.parametrize(
    ("plan", "mesh", "parts"),
    [
        (TheirPlan.HF, "fsdp=2,tp=2", 4),
        (TheirPlan.OWN, "tp=2", 2),
        (TheirPlan.UNSHARDED, "dp=2,tp=1", 1),
        (TheirPlan.UNSHARDED, "fsdp=2,tp=1", 2),
    ],
)
def test_of_a_plan_that_isn_t_ours_the_least_need_of_memory_is_told(
    plan: AnyPlan, mesh: str, parts: int
) -> None:
    model = Blocks()
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert state_bytes(model, plan, Mesh.parse(mesh), torch.float32) == 16 * whole // parts


def test_the_table_of_a_model_s_ids_is_found() -> None:
    assert embedding_of(Blocks()) == "words"
    assert embedding_of(find_model(HUGGING_FACE).build(dtype=torch.float32)) == "model.embed_tokens"
    assert embedding_of(nn.Linear(2, 2)) is None
