"""What `shardwise export` writes, run by the framework that it is for, on real ranks: outputs and every
gradient are the unsharded model's, and the whole step trains as one rank does."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shardwise
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verdict, Verification
from shardwise.testing import assert_trains_like_one_rank
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify
from tests.matrix import FULL

SMALL = (
    "num_hidden_layers=2,hidden_size=64,intermediate_size=96,vocab_size=256,num_attention_heads=4,"
    "num_key_value_heads=2"
)
OURS = "llama3-debug?n_layers=2,hidden=192,vocab_size=256"
QWEN3, LLAMA = f"hf:qwen3?{SMALL},head_dim=16", f"hf:llama?{SMALL}"
TIED = f"{LLAMA},tie_word_embeddings=true"
# its table of positions is asked by keyword
OPT = (
    "hf:opt?num_hidden_layers=2,hidden_size=64,word_embed_proj_dim=64,ffn_dim=96,vocab_size=256,"
    "num_attention_heads=4"
)
# what no style of PyTorch's cuts, and DTensor may not carry through: experts, their router, a Conv1D
MIXTURE = (
    f"hf:qwen3_moe?{SMALL},num_experts=4,num_experts_per_tok=2,moe_intermediate_size=32,decoder_sparse_step=1"
)
GPT2 = "hf:gpt2?n_layer=2,n_embd=64,n_head=4,n_positions=64,vocab_size=256"
# what is gathered of a colwise module has a gradient in parts
LATENT = (
    f"hf:deepseek_v3?{SMALL},n_routed_experts=4,num_experts_per_tok=2,moe_intermediate_size=32,n_group=2,"
    "topk_group=1,first_k_dense_replace=1,q_lora_rank=32,kv_lora_rank=16,qk_nope_head_dim=8,"
    "qk_rope_head_dim=8,v_head_dim=16"
)
CASES = {
    "pytorch_ours": ("pytorch", OURS, "rowwise"),
    "pytorch_qwen3": ("pytorch", QWEN3, "made"),
    "pytorch_llama_tied": ("pytorch", TIED, "made"),
    "hf_qwen3": ("hf", QWEN3, "made"),
    "hf_llama_tied": ("hf", TIED, "made"),
}
MORE = {
    "pytorch_debug": ("pytorch", "llama3-debug", "rowwise"),
    "pytorch_llama": ("pytorch", LLAMA, "made"),
    "pytorch_opt": ("pytorch", OPT, "made"),
    "pytorch_mixture": ("pytorch", MIXTURE, "made"),
    "pytorch_gpt2": ("pytorch", GPT2, "made"),
    "pytorch_latent": ("pytorch", LATENT, "made"),
    "hf_llama": ("hf", LLAMA, "made"),
    "pytorch_replicated": ("pytorch", OURS, "replicated"),
    "pytorch_colwise": ("pytorch", OURS, "colwise"),
    "pytorch_routed": ("pytorch", OURS, "routed"),
    "pytorch_whole_block": ("pytorch", OURS, "pieces"),
    "pytorch_without_sequence": ("pytorch", OURS, "rowwise"),
}
ROUTING = ("pytorch_mixture", "pytorch_latent")
"""Their routers compute in float32 themselves."""
STEPS: dict[str, dict[str, Any]] = {
    "fsdp=2,tp=2": {},
    "dp=2,tp=2": {"accumulation": 2},
    "fsdp=4": {"recompute": "full"},
}


@contextlib.contextmanager
def exported(folder: Path, cases: dict[str, tuple[str, str, str]], mesh: str, **step: Any) -> Iterator[None]:
    """Each case as a package of the folder, from which ranks are started."""
    for name, (framework, model, plan) in cases.items():
        keys: dict[str, Any] = {"model": model, "mesh": mesh, "plans": [_plan(folder, model, plan)], **step}
        case = shardwise.case(**keys, sequence_parallel="without_sequence" not in name)
        done = shardwise.export(case, framework=framework, cost=False).answer
        (folder / f"{name}.py").write_text(done.files[0].text)
    with contextlib.chdir(folder):
        yield


def _plan(folder: Path, model: str, plan: str) -> str:
    path = folder / f"{plan}{abs(hash(model))}.toml"
    if plan == "made":
        path.write_text(shardwise.plan(shardwise.case(model=model)).answer.to_toml())
    elif plan == "pieces":  # of a fused weight, which PyTorch's styles can't cut
        text = shardwise.builtin_plan("rowwise").to_toml()
        for name in ("w1", "w3"):
            rule = f'"layers.*.feed_forward.{name}" = '
            text = text.replace(f'{rule}"colwise"', f'{rule}{{ style = "colwise", pieces = "128+384" }}')
        text = text.replace('feed_forward.w2" = { style', 'feed_forward.w2" = { pieces = "128+384", style')
        path.write_text(text)
    else:
        return plan
    return str(path)


def proved(folder: Path, cases: dict[str, tuple[str, str, str]], mesh: str) -> dict[str, Verification]:
    with exported(folder, cases, mesh):
        claims = [Claim(f"{name}:build", "own", name) for name in cases]
        return {each.plan: each for each in verify(claims, mesh=Mesh.parse(mesh), timeout_s=300)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verification]:
    return proved(tmp_path_factory.mktemp("exports"), CASES, "tp=2")


def check(each: Verification) -> None:
    assert each.verdict is Verdict.RIGHT, (each.note, each.findings)
    assert each.proof is not None
    routes = each.plan in ROUTING
    assert each.proof.dtype == ("float32" if routes else "float64")
    assert each.proof.worst_gradient_error < (1e-5 if routes else 1e-10)
    assert each.sharded is not None
    assert each.sharded.inner_sharded > 0.2 * each.sharded.inner_total


@pytest.mark.parametrize("name", CASES)
def test_an_exported_plan_is_right_where_its_framework_carries_it_out(
    found: dict[str, Verification], name: str
) -> None:
    check(found[name])


@FULL
def test_every_export_is_right_with_fsdp_of_its_own(tmp_path: Path) -> None:
    """Over tp as well, so that those beside the first few need no ranks for that alone."""
    for each in proved(tmp_path, CASES | MORE, "fsdp=2,tp=2").values():
        check(each)


@FULL
@pytest.mark.parametrize("mesh", STEPS)
def test_the_whole_step_of_a_file_trains_as_one_rank_does(
    tmp_path: Path, mesh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = "unsharded" if mesh == "fsdp=4" else "made"
    cases = {f"step_{mesh.replace('=', '').replace(',', '')}": ("pytorch", QWEN3, plan)}
    with exported(tmp_path, cases, mesh, **STEPS[mesh]):
        monkeypatch.syspath_prepend(str(tmp_path))
        (name,) = cases
        module = importlib.import_module(name)
        assert_trains_like_one_rank(module.train_step, module.build, optimizer=_optimizer, mesh=mesh, batch=8)
        sys.modules.pop(name)


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)
