"""Attention and dropout in a trace for CUDA: the kernels that CUDA has, where a CPU takes them apart; a CPU's
trace keeps what a CPU runs."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.prediction import Setup, Term
from shardwise.core.program import OpKind, Program, memory_peak
from shardwise.models.factory import FactoryModel
from shardwise.models.source import find_model
from shardwise.predict.machines import load_machine
from shardwise.predict.predict import predict
from shardwise.trace.trace import trace

VOCAB, HIDDEN, HEADS, SEQ = 32, 48, 4, 256
FLASH = "aten::_scaled_dot_product_flash_attention"
EFFICIENT = "aten::_scaled_dot_product_efficient_attention"


class Attending(nn.Module):
    """One attention, whose values may be of another width than keys and whose key heads may be few."""

    def __init__(
        self, values: int = 16, kv_heads: int = HEADS, dropout: float = 0.0, masked: bool = False
    ) -> None:
        super().__init__()
        self.values, self.dropout, self.masked, self.kv_heads = values, dropout, masked, kv_heads
        self.table = nn.Embedding(VOCAB, HIDDEN)
        self.q, self.k = nn.Linear(HIDDEN, HEADS * 16), nn.Linear(HIDDEN, kv_heads * 16)
        self.v, self.o = nn.Linear(HIDDEN, kv_heads * values), nn.Linear(HEADS * values, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x = self.table(ids_BS)
        counts = HEADS, self.kv_heads, self.kv_heads
        q, k, v = (
            layer(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for layer, n in zip((self.q, self.k, self.v), counts, strict=True)
        )
        mask = torch.ones(SEQ, SEQ, dtype=torch.bool, device=x.device).tril() if self.masked else None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout, is_causal=mask is None,
            enable_gqa=self.kv_heads != HEADS,
        )  # fmt: skip
        logits: Tensor = self.head(F.dropout(self.o(out.transpose(1, 2).flatten(2)), self.dropout))
        return logits


@cache
def program_of(dtype: str, device: str = "cuda", **sizes: float) -> Program:
    source = FactoryModel("t:model", lambda: Attending(**sizes), frozenset(), False)  # type: ignore[arg-type]
    settings = StepSettings(1, SEQ, dtype=dtype)
    return trace(source, TheirPlan.UNSHARDED, Mesh.parse("tp=1"), settings, device=device)


def attention(program: Program) -> list[str]:
    return [op.name for op in program.ops() if op.kind is OpKind.ATTENTION]


@pytest.mark.parametrize(
    ("dtype", "sizes", "kernel"),
    [
        ("bfloat16", {"values": 8}, EFFICIENT),
        ("float32", {"values": 8}, EFFICIENT),
        ("bfloat16", {"values": 8, "masked": True}, EFFICIENT),
        ("bfloat16", {"dropout": 0.1}, FLASH),
        ("bfloat16", {"dropout": 0.1, "kv_heads": 2}, FLASH),
        ("float32", {"dropout": 0.1}, EFFICIENT),
        ("bfloat16", {"dropout": 0.1, "masked": True}, EFFICIENT),
        # no kernel of CUDA's takes these: whole score matrices
        ("float32", {"kv_heads": 2}, None),
        ("bfloat16", {"values": 8, "kv_heads": 2}, None),
        ("bfloat16", {"values": 9}, None),
    ],
)
def test_attention_runs_the_kernel_that_cuda_has_for_it(
    dtype: str, sizes: dict[str, float], kernel: str | None
) -> None:
    program = program_of(dtype, **sizes)
    assert attention(program) == ([kernel, f"{kernel}_backward"] if kernel else [])
    assert any(op.name == "aten::bmm" for op in program.ops()) == (kernel is None)
    assert all(op.kind is not OpKind.UNKNOWN for op in program.ops())


def test_narrower_values_keep_no_scores_and_count_by_their_width() -> None:
    equal, narrow = program_of("bfloat16"), program_of("bfloat16", values=8)
    assert memory_peak(narrow).n_bytes < memory_peak(equal).n_bytes
    scores = 2 * HEADS * SEQ * SEQ  # FLOPs of one product over a width of 1, before the mask halves them
    flops = [sum(op.flops for op in each.ops() if op.kind is OpKind.ATTENTION) for each in (equal, narrow)]
    assert flops == [scores * (2 + 5) * 16 // 2, scores * ((1 + 3) * 16 + (1 + 2) * 8) // 2]


def test_a_mask_that_is_no_triangle_to_the_kernel_isn_t_halved() -> None:
    masked, causal = (program_of("bfloat16", values=8, masked=masked) for masked in (True, False))
    flops = [sum(op.flops for op in each.ops() if op.kind is OpKind.ATTENTION) for each in (masked, causal)]
    assert flops[0] == 2 * flops[1]


def test_dropout_is_one_kernel_on_cuda_and_taken_apart_on_a_cpu() -> None:
    on_cuda, on_cpu = (
        {op.name for op in program_of("bfloat16", device, dropout=0.1).ops()} for device in ("cuda", "cpu")
    )
    assert {"aten::native_dropout", "aten::native_dropout_backward"} <= on_cuda
    assert "aten::bernoulli_" in on_cpu - on_cuda
    assert not attention(program_of("float32", "cpu", values=8))


def test_transformers_models_ask_for_causal_attention_without_a_mask_as_they_do_with_weights() -> None:
    pytest.importorskip("transformers", reason="transformers isn't installed: pip install shardwise[hf]")
    small = "vocab_size=65,hidden_size=32,intermediate_size=48,num_hidden_layers=1,num_attention_heads=4"
    source = find_model(f"hf:llama?{small},num_key_value_heads=2")
    program = trace(
        source, TheirPlan.UNSHARDED, Mesh.parse("tp=1"), StepSettings(2, 16, "bfloat16"), device="cuda"
    )
    assert attention(program) == [FLASH, f"{FLASH}_backward"]
    (flash, _) = (op for op in program.ops() if op.kind is OpKind.ATTENTION)
    assert flash.flops == 2 * (2 * 2 * 4 * 16 * 16 * 8) // 2


def test_narrower_values_are_predicted_by_the_kernel_that_takes_them_or_its_rate_is_said_to_be_unknown() -> (
    None
):
    machine = load_machine("h100-sxm-80gb")
    equal, narrow, masked = (
        program_of("bfloat16", **sizes) for sizes in ({}, {"values": 8}, {"masked": True})
    )
    said = "memory-efficient kernel, on Hopper from cuDNN 9.10 on cuDNN's: counted at the rate"
    found = {program: predict(program, machine, Setup()) for program in (equal, narrow, masked)}
    assert [any(said in note for note in each.notes) for each in found.values()] == [False, True, True]
    half = replace(dict(machine.attentions)["bfloat16"], forward_flops=1e11, backward_flops=1e11)
    slower = replace(machine, attentions=(*machine.attentions, ("bfloat16 efficient", half)))
    for program, other in ((equal, False), (narrow, True), (masked, True)):
        own = predict(program, slower, Setup())
        assert not any(said in note for note in own.notes)
        longer = dict(own.terms)[Term.ATTENTION] > 1.5 * dict(found[program].terms)[Term.ATTENTION]
        assert longer is other
