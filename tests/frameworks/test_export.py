"""Exports run by the framework that they are for, each in its own venv: `make test-frameworks`."""

import contextlib
import importlib.util
from pathlib import Path

import pytest

import shardwise
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verdict
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify

SMALL = (
    "num_hidden_layers=2,hidden_size=64,intermediate_size=96,vocab_size=256,num_attention_heads=4,"
    "num_key_value_heads=2"
)
HUGGING_FACE = {"qwen3": f"hf:qwen3?{SMALL},head_dim=16", "llama": f"hf:llama?{SMALL}"}
MESHES = ("tp=2", "fsdp=2,tp=2")
# what transformers, torch and the frameworks say of each other's versions
pytestmark = pytest.mark.filterwarnings("default")

# as Automodel's strategy does before its FSDP2, with what its recipes call between backward and clipping
BY_AUTOMODEL = """
import {module} as exported
from nemo_automodel.components.distributed.parallelizer import (
    _attention_is_head_sharded,
    _get_parallel_plan,
    _update_attention_head_counts_for_tp,
    ensure_tied_lm_head,
    translate_to_lora,
    validate_tp_mesh,
)
from nemo_automodel.components.distributed.tp_replicas import synchronize_tp_replica_gradients
from shardwise import SelfSharded
from torch.distributed.tensor.parallel import parallelize_module


def build(mesh=None):
    model = exported.build()
    if mesh is None:
        return model
    tp = mesh["tp"]
    validate_tp_mesh(model, tp)
    plan = _get_parallel_plan(model, False, "{module}.tp_shard_plan", tp_size=tp.size())
    plan = {{name: translate_to_lora(style) for name, style in plan.items()}}
    parallelize_module(model, tp, plan)
    ensure_tied_lm_head(model)
    if _attention_is_head_sharded(plan):
        _update_attention_head_counts_for_tp(model, tp.size())
    return SelfSharded(model, after_backward=lambda: synchronize_tp_replica_gradients([model], mesh))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("nemo_automodel") is None,
    reason="nemo-automodel isn't installed, so NO EXPORT FOR IT WAS RUN",
)
@pytest.mark.parametrize("mesh", MESHES)
def test_automodel_carries_an_exported_plan_out_right(mesh: str, tmp_path: Path) -> None:
    for name, model in HUGGING_FACE.items():
        plan = tmp_path / f"{name}.toml"
        plan.write_text(shardwise.plan(shardwise.case(model=model)).answer.to_toml())
        case = shardwise.case(model=model, mesh=mesh, plans=[str(plan)])
        code = shardwise.export(case, framework="automodel").answer.files[0].text
        (tmp_path / f"of_{name}.py").write_text(code)
        (tmp_path / f"by_automodel_{name}.py").write_text(BY_AUTOMODEL.format(module=f"of_{name}"))
    with contextlib.chdir(tmp_path):
        claims = [Claim(f"by_automodel_{name}:build", "own", name) for name in HUGGING_FACE]
        found = verify(claims, mesh=Mesh.parse(mesh), timeout_s=300)
    for each in found:
        assert each.verdict is Verdict.RIGHT, (each.note, each.findings)
        assert each.proof is not None
        assert each.proof.worst_gradient_error < 1e-10
