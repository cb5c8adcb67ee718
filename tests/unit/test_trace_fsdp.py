"""FSDP2's own buffers in a trace: fake in the backward's hooks too, and its copies are there in both
directions."""

import resource
from collections import Counter

from shardwise.core.case import StepSettings
from shardwise.core.finding import FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.program import MemoryKind, OpKind
from shardwise.explain.explain import explain
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.trace.trace import trace

GIB = 2.0**30


def test_the_buffers_of_the_backward_are_fake() -> None:
    """Real ones would take 4 GiB here; the largest growth that was seen without them is 0.02 GiB."""
    wide = ModelSpec("wide", LlamaConfig(1024, 16_384, 2, 16, 16, 16_384), "")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trace(
        wide,
        builtin_plan("rowwise"),
        Mesh.parse("fsdp=2,tp=1"),
        StepSettings(2, 16, dtype="bfloat16"),
        device="cuda",
    )
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GIB


def test_mixed_precision_gathers_in_one_dtype_and_reduces_and_keeps_in_another() -> None:
    small = ModelSpec("small", LlamaConfig(70, 48, 3, 4, 2, 64), "")
    settings = StepSettings(2, 16, param_dtype="bfloat16", reduce_dtype="float32")
    found = trace(small, builtin_plan("rowwise"), Mesh.parse("fsdp=2,tp=1"), settings, device="cuda")
    dtypes = {
        kind: {
            each.call.dtype
            for each in found.collectives()
            if each.call.axis == "fsdp" and each.call.kind == kind
        }
        for kind in ("all_gather", "reduce_scatter")
    }
    assert dtypes == {"all_gather": {"bfloat16"}, "reduce_scatter": {"float32"}}
    assert {op.inputs[0].dtype for op in found.ops() if op.kind is OpKind.MATMUL} == {"bfloat16"}
    assert {holding.dtype for holding in found.holdings} == {"float32"}
    assert found.held(MemoryKind.GRADIENT) == found.held(MemoryKind.PARAMETER)


def test_shards_are_copied_into_the_buffer_that_is_gathered_in_both_directions() -> None:
    small = ModelSpec("small", LlamaConfig(70, 48, 3, 4, 2, 64), "")
    found = trace(
        small,
        builtin_plan("rowwise"),
        Mesh.parse("fsdp=2,tp=2"),
        StepSettings(2, 16, dtype="bfloat16"),
        device="cuda",
    )
    copies = Counter(str(op.phase) for op in found.ops() if op.name == "fsdp::all_gather_copy_in")
    gathers = Counter(
        str(each.phase)
        for each in found.collectives()
        if each.call.axis == "fsdp" and each.call.kind == "all_gather"
    )
    assert copies == gathers
    assert set(copies) == {"forward", "backward"}


def test_copies_for_fsdp_s_gathers_are_said_to_be_those_of_its_parameters() -> None:
    """Those of table and head, which no layer asks for."""
    wide = ModelSpec("wide", LlamaConfig(4096, 48, 2, 4, 2, 64), "")
    program = trace(wide, builtin_plan("rowwise"), Mesh.parse("fsdp=2,tp=1"), StepSettings(2, 16))
    copies = [each for each in explain(program).findings if each.kind is FindingKind.COPIES_FOR_COLLECTIVES]
    assert [each.subject for each in copies] == ["FSDP's parameters"]
    assert "most of it for the all-gather of FSDP's parameters" in copies[0].reason
