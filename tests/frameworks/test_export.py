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

TITAN = "titan:llama3/debugmodel"
OF_TITAN = """
[rules]
"tok_embeddings" = { style = "rowwise", output = "BETWEEN" }
"layers.*.attention_norm" = "NORM"
"layers.*.attention" = { style = "gather_input", from = "BETWEEN" }
"layers.*.attention.qkv_linear.wqkv" = "colwise"
"layers.*.attention.wo" = { style = "rowwise", output = "BETWEEN" }
"layers.*.ffn_norm" = "NORM"
"layers.*.feed_forward" = { style = "gather_input", from = "BETWEEN" }
"layers.*.feed_forward.w1" = "colwise"
"layers.*.feed_forward.w3" = "colwise"
"layers.*.feed_forward.w2" = { style = "rowwise", output = "BETWEEN" }
"norm" = "NORM"
"lm_head" = { style = "colwise", input = "BETWEEN", output = "shard(-1)" }
"""
# torchtitan's own Module.parallelize, on the configuration that is exported in place of the family's
BY_TITAN = """
from dataclasses import replace

import {module} as exported
from shardwise.models.frameworks import titan

family = titan._family("llama3", "")
of_family = family.model_registry


def registry(flavor, **more):
    spec = of_family(flavor, **more)
    return replace(spec, model=exported.sharded(spec.model))


family.model_registry = registry


def build(mesh=None):
    return titan._make(family, "debugmodel", titan.Wanted(layers=2, backend="{backend}"), mesh)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None,
    reason="torchtitan isn't installed, so NO EXPORT FOR IT WAS RUN",
)
@pytest.mark.parametrize("mesh", MESHES)
def test_torchtitan_carries_an_exported_plan_out_right(mesh: str, tmp_path: Path) -> None:
    cases = {"sequence": ("shard(1)", "sequence_parallel"), "whole": ("replicate", "replicate")}
    names = []
    for name, (between, norm) in cases.items():
        plan = tmp_path / f"{name}.toml"
        plan.write_text(OF_TITAN.replace("BETWEEN", between).replace("NORM", norm))
        case = shardwise.case(model=TITAN, mesh=mesh, plans=[str(plan)])
        (file,) = shardwise.export(case, framework="torchtitan").answer.files
        (tmp_path / f"of_{name}.py").write_text(file.text)
        for backend in ("spmd_types", "partial_dtensor"):
            names.append(f"by_titan_{name}_{backend}")
            factory = BY_TITAN.format(module=f"of_{name}", backend=backend)
            (tmp_path / f"{names[-1]}.py").write_text(factory)
    with contextlib.chdir(tmp_path):
        claims = [Claim(f"{name}:build", "own", name) for name in names]
        found = verify(claims, mesh=Mesh.parse(mesh), timeout_s=300)
    for each in found:
        assert each.verdict is Verdict.RIGHT, (each.note, each.findings)
        assert each.proof is not None
        assert each.proof.worst_gradient_error < 1e-10


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
