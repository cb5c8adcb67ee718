"""The Program against reality: what real gloo ranks issue in a steady step is what trace() says, call by
call, on every rank.

The ranks' collectives are written down below PyTorch's own layers (c10d_log.py); one launch for each number
of ranks runs all cases.
"""

from functools import cache, lru_cache

import msgspec
import pytest

from shardwise.core.errors import ShardwiseError
from shardwise.core.mesh import Mesh
from shardwise.core.program import Collective, Phase, Program
from shardwise.launch import run_ranks
from shardwise.parallel.builtin import builtin_names
from shardwise.trace.trace import trace
from tests.distributed.c10d_log import Issued
from tests.distributed.program_workers import Case, cases
from tests.matrix import thinned

ALL_CASES = [case for world_size in (2, 3, 4) for case in cases(world_size)]


@lru_cache
def answers(world_size: int, *, telling: bool) -> tuple[dict[str, list[Issued]], ...] | str:
    """Per rank: what it issued in each case, of the telling ones or the rest. Or why the launch failed: it
    isn't tried again for each case."""
    try:
        results = run_ranks(
            "tests.distributed.program_workers:collectives",
            b"telling" if telling else b"rest",
            world_size=world_size,
            device_type="cpu",
            timeout_s=300,
        )
    except ShardwiseError as error:
        return str(error)
    return tuple(msgspec.json.decode(result, type=dict[str, list[Issued]]) for result in results)


def issued(case: Case) -> list[list[Issued]]:
    found = answers(case.world_size, telling=case.is_telling)
    if isinstance(found, str):
        pytest.fail(f"the launch of {case.world_size} ranks failed: {found}")
    return [answer[case.name] for answer in found]


@cache
def programs(case: Case) -> tuple[Program, ...]:
    """Of the first rank and the last where two axes meet, else of one of them in turn; for the ids that the
    real ranks get."""
    mesh = Mesh.parse(case.mesh)
    first_and_last = (0, mesh.world_size - 1)
    in_turn = first_and_last[ALL_CASES.index(case) % 2]
    ids_BS = case.ids()
    return tuple(
        trace(case.spec, case.make_plan(), mesh, case.settings, rank=rank, ids=ids_BS)
        for rank in (first_and_last if "," in case.mesh else (in_turn,))
    )


def as_issued(collective: Collective) -> Issued:
    """What c10d would tell of it. It can't tell a recomputed forward from the backward that runs it."""
    call = collective.call
    phase = Phase.BACKWARD if collective.phase is Phase.RECOMPUTE else collective.phase
    return Issued(
        str(call.kind), call.axis, call.axis_size, call.dtype, call.payload_bytes, call.wire_bytes, str(phase)
    )


@pytest.mark.parametrize("case", thinned(ALL_CASES, lambda case: case.is_telling), ids=lambda case: case.name)
def test_real_ranks_issue_the_programs_collectives(case: Case) -> None:
    real = issued(case)
    for program in programs(case):
        expected = [as_issued(collective) for collective in program.collectives()]
        assert real[program.rank] == expected, f"rank {program.rank}"
        assert expected


@pytest.mark.parametrize(
    "case",
    thinned([case for case in ALL_CASES if case.plan.startswith("routed")], lambda case: case.is_telling),
    ids=lambda case: case.name,
)
def test_what_the_batch_decides_is_told_for_all_ranks_as_they_send_it(case: Case) -> None:
    real, traced = issued(case), programs(case)
    tp = Mesh.parse(case.mesh).tp
    for program in traced:
        first = program.rank // tp * tp
        decided = [
            index for index, collective in enumerate(program.collectives()) if collective.by_data is not None
        ]
        assert len(decided) == 2 * case.accumulation
        for index, collective in enumerate(program.collectives()):
            if collective.by_data is None:
                continue
            sent = [real[rank][index].sent_bytes for rank in range(first, first + tp)]
            by_data = collective.by_data
            assert by_data.mean_bytes == sum(sent) / tp
            assert by_data.max_bytes == max(sent)
            assert sent[by_data.max_rank] == max(sent)
            assert max(sent) <= by_data.bound_bytes
            assert collective.call.wire_bytes == sent[program.rank % tp]


def test_no_plan_is_left_out() -> None:
    for world_size in (2, 3, 4):
        assert {case.plan for case in cases(world_size) if case.mesh == f"tp={world_size}"} == set(
            builtin_names()
        )
    assert {case.mesh for case in cases(4)} >= {"tp=4", "dp=2,tp=2", "fsdp=2,tp=2"}
    assert [len(cases(world_size)) for world_size in (2, 3, 4)] == [29, 17, 32]
