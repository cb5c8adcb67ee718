"""Any mesh: one training step on 2, 4 and 8 real ranks is one process's, and issues what its Program says."""

from dataclasses import replace
from functools import cache

import msgspec
import pytest

from shardwise.core.collective import TO_ONE_RANK, CollectiveKind
from shardwise.core.errors import ShardwiseError
from shardwise.core.mesh import Mesh
from shardwise.core.program import Collective, Phase, Program
from shardwise.launch import run_ranks
from shardwise.trace.trace import trace
from tests.distributed.c10d_log import Issued
from tests.distributed.mesh_cases import (
    BATCH,
    FAULTS,
    MODELS,
    SEQ,
    TELLING,
    Fault,
    MeshCase,
    batches,
    mesh_cases,
    meshes,
)
from tests.distributed.mesh_workers import Proved
from tests.distributed.train_axes_workers import cases
from tests.matrix import thinned

CLOSE = 1e-10
ROUNDED = 0.1
# what gloo sends beside the tensors, for each collective and other rank of its group
HEADER_BYTES = 400
CASES = [case for world_size in (2, 4, 8) for case in mesh_cases(world_size)]
PARAMETERS = thinned(CASES, lambda case: case.is_telling)


@cache
def answers(world_size: int, *, telling: bool) -> tuple[dict[str, Proved], ...] | str:
    """Per rank: each case of the telling ones, or of the rest. Or why the launch failed: it isn't tried again
    for each case."""
    try:
        results = run_ranks(
            "tests.distributed.mesh_workers:run",
            b"telling" if telling else b"rest",
            world_size=world_size,
            device_type="cpu",
            timeout_s=300,
        )
    except ShardwiseError as error:
        return str(error)
    return tuple(msgspec.json.decode(result, type=dict[str, Proved]) for result in results)


def proved(case: MeshCase) -> list[Proved]:
    found = answers(case.world_size, telling=case.is_telling)
    if isinstance(found, str):
        pytest.fail(f"the launch of {case.world_size} ranks failed: {found}")
    return [answer[case.name] for answer in found]


@pytest.mark.parametrize("case", PARAMETERS, ids=lambda case: case.name)
def test_a_step_on_any_mesh_is_one_process_s(case: MeshCase) -> None:
    for answer in proved(case):
        assert not answer.refused
        assert answer.findings == ()
        off = (answer.output, answer.loss, answer.gradient, answer.norm, answer.weights)
        # what FSDP's mixed precision rounds is off by its own rounding, as verify allows it
        assert max(off) < (CLOSE if case.param_dtype is None else ROUNDED), off


@pytest.mark.parametrize("case", PARAMETERS, ids=lambda case: case.name)
def test_a_step_on_any_mesh_issues_its_program_s_collectives(case: MeshCase) -> None:
    for rank in told_of(case):
        expected = list(program(case, rank).collectives())
        issued = proved(case)[rank].issued
        assert expected
        told = [_told(*pair) for pair in zip(expected, issued, strict=True)]
        assert told == [_timed(as_issued(each)) for each in expected]


@pytest.mark.parametrize("case", PARAMETERS, ids=lambda case: case.name)
def test_a_step_on_any_mesh_leaves_on_the_sockets_what_its_program_says(case: MeshCase) -> None:
    for rank in told_of(case):
        answer = proved(case)[rank]
        if answer.sent_bytes is None:
            pytest.skip("this system doesn't tell what a socket sent")
        expected = list(program(case, rank).collectives())
        n_bytes = sum(_on_gloo(*pair) for pair in zip(expected, answer.issued, strict=True))
        others = [each.call.axis_size - 1 for each in expected]
        headers = HEADER_BYTES * sum((*others, case.world_size - 1))  # and a barrier's
        assert n_bytes <= answer.sent_bytes <= n_bytes + headers


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_sum_that_is_left_out_is_named_with_its_axis(fault: Fault) -> None:
    found = answers(fault.case.world_size, telling=True)
    assert isinstance(found, tuple), found
    expected = (
        f"{fault.parameter}: each of {fault.n_ranks} ranks along {fault.said} computes a part of its "
        f"gradient, and nothing sums them over {fault.said}"
    )
    for answer in found:
        assert answer[fault.name].findings == (expected,)


def told_of(case: MeshCase) -> tuple[int, ...]:
    """The first rank and the last; of more than 2 that are of one stage the last, which has the smaller
    parts, but for the telling cases."""
    last = case.world_size - 1
    is_enough = case.world_size > 2 and case.stages == 1 and not (case.world_size == 4 and case.is_telling)
    return (last,) if is_enough else (0, last)


@cache
def program(case: MeshCase, rank: int) -> Program:
    ids_BS, _ = batches()[0]
    return trace(case.spec, case.plan, Mesh.parse(case.mesh), case.settings, rank=rank, ids=ids_BS)


def as_issued(collective: Collective) -> Issued:
    """What c10d would tell of it. It can't tell a recomputed forward from the backward that runs it."""
    call = collective.call
    phase = Phase.BACKWARD if collective.phase is Phase.RECOMPUTE else collective.phase
    return Issued(
        str(call.kind), call.axis, call.axis_size, call.dtype, call.payload_bytes, call.wire_bytes, str(phase)
    )


def _told(expected: Collective, issued: Issued) -> Issued:
    """What was issued; of what a router decides no more than the bound is foretold."""
    by_data = expected.by_data
    if by_data is None or by_data.expert_load is None:
        return _timed(issued)
    assert issued.sent_bytes <= by_data.bound_bytes
    foretold = as_issued(expected)
    return replace(issued, payload_bytes=foretold.payload_bytes, sent_bytes=foretold.sent_bytes)


def _on_gloo(expected: Collective, issued: Issued) -> float:
    """Bytes that a rank sends; those that data decide by what it sent. gloo reduces and then scatters."""
    sent = issued.sent_bytes if expected.by_data is not None else expected.call.wire_bytes
    return 2 * sent if expected.call.kind is CollectiveKind.REDUCE_SCATTER else sent


def _timed(issued: Issued) -> Issued:
    """Between stages torch's schedule sends what a pass gave when the next one may run already."""
    is_between = issued.kind in TO_ONE_RANK
    return replace(issued, phase="") if is_between else issued


def test_each_model_is_on_each_mesh_of_four_here_or_in_a_whole_run() -> None:
    here = {(case.mesh, case.model) for case in mesh_cases(4)}
    runs = {(case.mesh, case.model.removeprefix("balanced ")) for case in cases()}
    assert here | runs >= {(mesh, model) for mesh in meshes(4) for model in MODELS}
    assert {case.name for case in mesh_cases(4)} >= TELLING


def test_no_mesh_is_left_out() -> None:
    assert {case.mesh for case in mesh_cases(4)} >= {
        "dp=4",
        "dp=2,fsdp=2",
        "fsdp=2,tp=2",
        "ep=2,tp=2",
        "tp=4",
    }
    assert any(mesh.count(",") == 2 for mesh in (case.mesh for case in mesh_cases(8)))
    assert BATCH % 8 == SEQ % 8 == 0
