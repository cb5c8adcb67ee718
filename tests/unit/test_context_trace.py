"""A step whose sequences ranks share, traced without ranks: what it exchanges, why, and what it computes; and
what is refused before anything runs."""

from collections import Counter
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.core.case import StepSettings
from shardwise.core.errors import ModelError, OptionError, PlanError
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Replicate, Shard
from shardwise.core.plan import ContextAttention
from shardwise.core.program import Collective, OpKind, Program
from shardwise.explain.explain import explain
from shardwise.explain.reasons import reason_of
from shardwise.models.llama import LlamaConfig
from shardwise.models.source import find_model
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.parallel.context.fit import attending
from shardwise.trace.trace import trace

SEQ, HEADS, KEY_HEADS, WIDTH = 32, 4, 2, 8
SPEC = ModelSpec("small", LlamaConfig(96, HEADS * WIDTH, 2, HEADS, KEY_HEADS, 48), "")


@lru_cache(maxsize=8)
def program(mesh: str, way: str = "gather", device: str = "cuda") -> Program:
    plan = builtin_plan("rowwise", context_attention=ContextAttention(way))
    batch = Mesh.parse(mesh).data_parallel
    return trace(SPEC, plan, Mesh.parse(mesh), StepSettings(batch, SEQ), device=device)


def of_attention(found: Program) -> list[Collective]:
    """What the first layer's attention exchanges over cp."""
    calls = (each for each in found.collectives() if each.module == "layers.0.attention")
    return [each for each in calls if each.call.axis == "cp"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layer_gathers_keys_and_values_at_once_and_its_backward_takes_gradients_home(ranks: int) -> None:
    full = 2 * KEY_HEADS * WIDTH * SEQ * 4
    share = full * (ranks - 1) / ranks
    calls = [each.call for each in of_attention(program(f"cp={ranks}"))]
    assert [str(call.kind) for call in calls] == ["all_gather", "all_gather", "reduce_scatter"]
    assert {(call.payload_bytes, call.wire_bytes) for call in calls} == {(full, share)}


def test_a_ring_sends_a_rank_s_part_a_turn() -> None:
    own = 2 * KEY_HEADS * WIDTH * SEQ * 4 // 4
    found = Counter((str(each.call.kind), str(each.phase)) for each in of_attention(program("cp=4", "ring")))
    assert found == {
        ("send", "forward"): 3,
        ("recv", "forward"): 3,
        ("send", "backward"): 6,
        ("recv", "backward"): 6,
    }
    assert {each.call.payload_bytes for each in of_attention(program("cp=4", "ring"))} == {own}


@pytest.mark.parametrize("way", ["gather", "ring"])
def test_every_rank_computes_its_share_of_causal_attention(way: str) -> None:
    """No more than one rank would, shared out."""

    def flops(found: Program) -> int:
        return sum(op.flops for op in found.ops() if op.kind is OpKind.ATTENTION)

    alone = flops(program("cp=1", device="cpu"))
    assert alone > 0
    for ranks in (2, 4):
        assert flops(program(f"cp={ranks}", way, "cpu")) * ranks == alone


def test_each_collective_of_a_shared_sequence_says_why() -> None:
    (gather, again, home) = map(reason_of, of_attention(program("cp=4")))
    assert gather == (
        "Each rank has a quarter of every sequence, and the queries of attention need all keys: keys and "
        "values are gathered."
    )
    assert "again, which weren't kept" in again
    assert "each rank keeps its own tokens'" in home
    ring = [reason_of(each) for each in of_attention(program("cp=2", "ring"))]
    assert ring[0].endswith("need all keys: keys and values go round from rank to rank.")
    assert "go round again" in ring[2]
    assert "until they are home" in ring[4]
    # on gloo a reduce-scatter is an all-to-all
    assert reason_of(of_attention(program("cp=4", device="cpu"))[2]) == home
    summed = [each for each in program("cp=2").collectives() if str(each.phase) == "reduce"]
    assert all("different parts of each sequence" in reason_of(each) for each in summed)


def test_an_explanation_of_shared_sequences_guesses_nothing() -> None:
    for way in ContextAttention:
        for group in explain(program("cp=2,tp=2", way)).collectives:
            assert "nothing says why" not in group.reason
            assert "model's own code" not in group.reason


def test_a_part_that_tp_cannot_cut_is_refused() -> None:
    with pytest.raises(OptionError, match="Use a multiple of 4"):
        trace(SPEC, builtin_plan("rowwise"), Mesh.parse("cp=2"), StepSettings(1, 30))
    with pytest.raises(PlanError) as caught:
        trace(SPEC, builtin_plan("rowwise"), Mesh.parse("cp=3,tp=4"), StepSettings(1, 30))
    assert str(caught.value) == (
        'plan "rowwise": rule "tok_embeddings" (rowwise) cuts the sequence, and 30, over cp=3, is no '
        "multiple of tp=4. Use a sequence that is a multiple of 12, or a plan without sequence parallelism."
    )


class Mixing(nn.Module):
    """A layer that attends by torch's function, and mixes tokens besides, as told."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.along = nn.Conv1d(16, 16, 3, padding=1)
        self.how = how

    def forward(self, ids_BS: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x_BSH = self.words(ids_BS)
        heads = x_BSH[:, None]
        match self.how:
            case "window":
                seq = ids_BS.shape[1]
                mask = torch.ones(seq, seq, dtype=torch.bool, device=x_BSH.device).tril().triu(-4)
                x_BSH = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)[:, 0]
            case "by hand":
                x_BSH = (x_BSH @ x_BSH.transpose(1, 2)).softmax(-1) @ x_BSH
            case _:
                x_BSH = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)[:, 0]
        if self.how == "convolution":
            x_BSH = self.along(x_BSH.transpose(1, 2)).transpose(1, 2)
        if self.how == "mean":
            x_BSH = x_BSH - x_BSH.mean(1, keepdim=True)
        if self.how == "shift":
            x_BSH = x_BSH + F.pad(x_BSH, (0, 0, 1, 0))[:, :-1]
        logits: Tensor = self.head(x_BSH)
        return logits


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("window", "passes a mask of its own for 24 tokens"),
        ("by hand", "it never calls torch.nn.functional.scaled_dot_product_attention"),
        ("convolution", "beside attention, convolution in along needs the whole sequence"),
        ("mean", "needs the whole sequence (mean is taken over it)"),
        ("shift", "needs the whole sequence"),
    ],
)
def test_what_mixes_tokens_besides_attention_is_refused_before_anything_runs(how: str, why: str) -> None:
    model = Mixing(how)
    with pytest.raises(ModelError) as caught:
        attending(model, 2, 24)
    assert str(caught.value).startswith("Mixing can't share its sequences among 2 ranks of cp: ")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not next(model.parameters()).is_meta  # it is as it was


def test_what_takes_each_token_by_itself_is_taken() -> None:
    assert attending(Mixing("no"), 2, 24) == {Mixing}
    for name in ("moe-debug", "hf:mistral", "hf:qwen3_moe"):
        assert attending(find_model(name).build(dtype=torch.float32), 2, 64)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hf:mistral", "passes a mask of its own for 8192 tokens (a window?)"),
        ("hf:mamba", "takes no position_ids"),
        ("hf:gpt2", "drops out 0.1 of the attention"),
        ("moe-debug?capacity=1.5", "cumsum"),
    ],
)
def test_models_that_cannot_be_shared_say_why(name: str, why: str) -> None:
    with pytest.raises(ModelError) as caught:
        attending(find_model(name).build(dtype=torch.float32), 2, 8192)
    assert why in str(caught.value)


def test_a_parameter_that_fsdp_cuts_over_joined_axes_is_cut_on_each_of_them() -> None:
    holdings = {each.name: each for each in program("fsdp=2,cp=2,tp=2").holdings}
    norm, inward = holdings["norm.weight"], holdings["layers.0.feed_forward.w1.weight"]
    assert norm.placement == norm.grad_placement == (Shard(0), Shard(0), Replicate())
    assert inward.placement == inward.grad_placement == (Shard(0), Shard(0), Shard(0))
