"""The cases of tests/distributed/test_styles.py on GPUs, with NCCL."""

import pytest
import torch

from tests.distributed.style_answers import TOLERANCE, assert_as_expected, part
from tests.distributed.style_cases import MESHES, Case, cases
from tests.distributed.style_faults import FAULTS, Fault

GPUS = torch.cuda.device_count()


def needs(world_size: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        world_size > GPUS,
        reason=f"{world_size} ranks on NCCL need {world_size} GPUs; this machine has {GPUS}",
    )


WORLD_SIZES = [pytest.param(world_size, marks=needs(world_size)) for world_size in (1, 2, 4)]
ALL_CASES = [
    pytest.param(world_size, case, marks=needs(world_size), id=f"{world_size} ranks, {case.name}")
    for world_size in (1, 2, 4)
    for case in cases(world_size)
]


@pytest.mark.parametrize(("world_size", "case"), ALL_CASES)
def test_a_sharded_model_equals_the_unsharded_one(world_size: int, case: Case) -> None:
    assert_as_expected(case, part(world_size, "cases", "cuda", telling=case.is_telling)[case.name])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_no_case_is_lost(world_size: int) -> None:
    for telling in (True, False):
        names = [case.name for case in cases(world_size) if case.is_telling == telling]
        assert list(part(world_size, "cases", "cuda", telling=telling)) == names


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_collectives_clipping_steps_and_checkpoints_are_those_of_the_unsharded_model(world_size: int) -> None:
    for name in ("laws", "clip", *(f"steps {mesh}" for mesh in MESHES[world_size])):
        errors = part(world_size, name, "cuda")
        assert errors
        assert {what: error for what, error in errors.items() if not error <= TOLERANCE} == {}
    differing = part(world_size, "state_dict", "cuda")
    assert {plan: count for plan, count in differing.items() if count} == {}


@needs(2)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_comparison_sees_planted_faults(fault: Fault) -> None:
    outcome = part(2, "faults", "cuda", telling=fault.is_telling)[fault.name]
    assert fault.found_in <= {finding["subject"] for finding in outcome["findings"]}
