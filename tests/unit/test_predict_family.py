"""Programs of any micro-batch from two: exactly what a trace of that size gives."""

import functools
from dataclasses import replace
from itertools import product

import pytest

from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.program import Block, Program
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.predict.family import Family, NotAFamilyError
from shardwise.trace.trace import trace
from tests.matrix import FULL, thinned

SPEC = ModelSpec("tiny", LlamaConfig(70, 48, 2, 4, 2, 64), "")


@functools.cache
def program(
    plan: str, device: str, mesh: str, recompute: str, sequences: int, spec: ModelSpec = SPEC
) -> Program:
    shape = Mesh.parse(mesh)
    settings = StepSettings(
        sequences * shape.data_parallel,
        16,
        dtype="bfloat16" if device == "cuda" else "float32",
        recompute=recompute,
    )
    return trace(spec, builtin_plan(plan), shape, settings, device=device)


def decided_by_shapes(found: Program) -> Program:
    """Without the items of the embedding: in a masked look-up, token ids decide how many rows there are."""

    def rest(block: Block) -> Block:
        return replace(block, items=tuple(item for item in block.items if item.module != "tok_embeddings"))

    return replace(found, blocks=tuple(map(rest, found.blocks)))


@pytest.mark.parametrize(
    ("plan", "device", "recompute"),
    thinned(
        product(("rowwise", "colwise", "replicated"), ("cpu", "cuda"), ("none", "full")),
        lambda *case: (
            case in (("rowwise", "cuda", "none"), ("colwise", "cpu", "full"), ("replicated", "cuda", "full"))
        ),
    ),
)
def test_a_derived_program_is_the_traced_one(plan: str, device: str, recompute: str) -> None:
    traced = functools.partial(program, plan, device, "tp=2", recompute)
    found = Family(traced(2), traced(3)).at(5)
    assert decided_by_shapes(found) == decided_by_shapes(traced(5))
    if plan != "rowwise":
        assert found == traced(5)


@pytest.mark.parametrize("plan", [pytest.param("rowwise", marks=FULL), "rowwise@dtensor"])
def test_so_is_one_with_shards_of_parameters_and_blocks_of_equal_layers(plan: str) -> None:
    traced = functools.partial(program, plan, "cuda", "fsdp=2,tp=2", "none", spec=SPEC.with_layers(5))
    found = Family(traced(2), traced(3)).at(4)
    assert any(block.times > 1 for block in found.blocks)
    assert decided_by_shapes(found) == decided_by_shapes(traced(4))


def test_both_ends_come_out_as_they_went_in() -> None:
    traced = functools.partial(program, "rowwise", "cuda", "tp=2", "none")
    family = Family(traced(2), traced(3))
    assert family.at(2) == traced(2)
    assert family.at(3) == traced(3)


def test_a_plan_whose_collectives_the_data_decides_is_no_family() -> None:
    traced = functools.partial(program, "routed", "cuda", "tp=2", "none")
    with pytest.raises(NotAFamilyError, match="token ids decide what tok_embeddings sends"):
        Family(traced(2), traced(3))


def test_one_sequence_is_no_part_of_a_family() -> None:
    one, two, three = (program("rowwise", "cuda", "tp=2", "none", sequences) for sequences in (1, 2, 3))
    with pytest.raises(NotAFamilyError):
        Family(one, two)
    with pytest.raises(NotAFamilyError, match="1 sequences: a family begins at 2"):
        Family(two, three).at(1)


def test_programs_of_two_plans_are_no_family() -> None:
    with pytest.raises(NotAFamilyError):
        Family(program("rowwise", "cuda", "tp=2", "none", 2), program("colwise", "cuda", "tp=2", "none", 3))
