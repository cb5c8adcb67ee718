"""Reading trace files: every form, every damage, bounds."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.core.errors import TraceError
from shardwise.core.timeline import NONE, SpanKind, Timeline
from shardwise.profiles import container, events, read
from shardwise.profiles.read import read_timeline
from tests.unit.chrome_trace import START_US, all_reduce, document, event, kernel, launch, step, write


def test_a_kernel_is_linked_to_its_launch_and_to_the_op_around_it(tmp_path: Path) -> None:
    timeline = read_timeline(
        write(
            tmp_path / "t.json",
            [
                event("cpu_op", "aten::linear", 0, 20, args={"External id": 1}),
                event(
                    "cpu_op", "aten::addmm", 2, 10, args={"External id": 2, "Input Dims": [[2, 3], [3, 4]]}
                ),
                launch(4, 17),
                kernel("gemm", 30, 5, correlation=17, args={"External id": 2}),
            ],
        )
    )
    at = int(np.flatnonzero(timeline.spans.kind == SpanKind.COMPUTE)[0])
    assert timeline.name(at) == "gemm"
    assert timeline.spans.launched_ns[at] == 4000
    assert timeline.name(int(timeline.spans.parent[at])) == "aten::addmm"
    assert timeline.name(int(timeline.spans.parent[timeline.spans.parent[at]])) == "aten::linear"
    assert (
        timeline.names[timeline.spans.shapes[timeline.spans.parent[at]]].replace(" ", "") == "[[2,3],[3,4]]"
    )
    assert timeline.launches_without_kernel == (0, 1)


def test_a_kernel_whose_launch_was_not_recorded_belongs_to_the_op_of_its_external_id(tmp_path: Path) -> None:
    timeline = read_timeline(
        write(
            tmp_path / "t.json",
            [
                event("cpu_op", "aten::mm", 0, 9, args={"External id": 5}),
                kernel("k", 30, 5, args={"External id": 5}),
            ],
        )
    )
    at = int(np.flatnonzero(timeline.spans.kind == SpanKind.COMPUTE)[0])
    assert timeline.name(int(timeline.spans.parent[at])) == "aten::mm"
    assert timeline.spans.launched_ns[at] == NONE


def test_categories_decide_what_is_device_work_not_args(tmp_path: Path) -> None:
    timeline = read_timeline(
        write(
            tmp_path / "t.json",
            [
                event("cpu_op", "aten::record_stream", 0, 2, args={"stream": 7}),
                event("cuda_sync", "Event Sync", 0, 99, args={"stream": 7}),
                event("gpu_user_annotation", "ProfilerStep#1", 0, 99, args={"stream": 7}),
                kernel("k", 1, 2),
                event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 3, 2, args={"stream": 7, "bytes": 64}),
                event("gpu_memcpy", "Memcpy PtoP (Device -> Device)", 5, 2, args={"stream": 7}),
                event("gpu_memset", "Memset (Device)", 7, 2, args={"stream": 7}),
                event("kernel", "__amd_rocclr_copyBuffer.kd", 9, 2, args={"stream": 7}),
                event("Kernel", "old", 11, 2, args={"stream": 7}),
                event("mtia_ccp_events", "matmul", 13, 2),
            ],
        )
    )
    kinds = [SpanKind(kind).name for kind in timeline.spans.kind]
    assert kinds == ["OP", "COMPUTE", "COPY", "COLLECTIVE", "COPY", "COPY", "COMPUTE", "COMPUTE"]


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)", "all_reduce"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce_scatter"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "send_recv"),
        ("ncclSymkDevKernel_AllGather_ST(ncclSymkDevWorkArgs)", "all_gather"),
        (
            "void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16>(c10::BFloat16*)",
            "all_reduce",
        ),
        ("void vllm::cross_device_reduce_1stage<__nv_bfloat16, 8>(vllm::RankData*)", "all_reduce"),
        (
            "void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<2>(Params)",
            "all_reduce",
        ),
        ("void deep_ep::intranode::dispatch<8, 768>(int4*)", "all_to_all"),
        ("rcclGenericKernel<1>(ncclDevComm*)", "unknown collective"),
    ],
)
def test_communication_kernels_are_known_by_name(tmp_path: Path, name: str, op: str) -> None:
    timeline = read_timeline(
        write(tmp_path / "t.json", [kernel(name, 0, 5), kernel("gemm_reduce_scatter_free", 9, 2)])
    )
    assert timeline.spans.kind.tolist() == [SpanKind.COLLECTIVE, SpanKind.COMPUTE]
    assert timeline.names[timeline.collectives.op[0]] == op


def test_a_collective_without_metadata_is_named_by_who_called_for_it(tmp_path: Path) -> None:
    timeline = read_timeline(
        write(
            tmp_path / "t.json",
            [
                event("user_annotation", "nccl:all_to_all", 0, 9),
                launch(2, 3),
                kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 20, 5, correlation=3),
            ],
        )
    )
    assert timeline.names[timeline.collectives.op[0]] == "all_to_all"


def test_sizes_and_groups_of_collectives_are_read(tmp_path: Path) -> None:
    gather = all_reduce(
        9,
        2,
        elements=1,
        args={
            "Collective name": "_allgather_base",
            "In msg nelems": 8,
            "Out msg nelems": 32,
            "dtype": "BFloat16",
        },
    )
    many = all_reduce(
        20, 2, args={"Process Group Name": "7", "Process Group Ranks": "[0, 1, ..., 63]", "Seq": 12}
    )
    groups = [{"pg_name": "0", "ranks": [0, 1]}, {"pg_name": "7", "ranks": list(range(64))}]
    timeline = read_timeline(
        write(
            tmp_path / "t.json",
            [all_reduce(0, 2), gather, many],
            distributedInfo={"rank": 3, "world_size": 64, "pg_config": groups},
        )
    )
    assert timeline.ranks == (3,)
    assert timeline.collectives.full_bytes.tolist() == [4096, 64, 4096]
    assert [timeline.groups[group].ranks for group in timeline.collectives.group] == [
        (0, 1),
        (0, 1),
        tuple(range(64)),
    ]
    assert timeline.collectives.sequence.tolist() == [NONE, NONE, 12]


def test_steps_on_the_device_begin_with_the_first_work_that_they_launched(tmp_path: Path) -> None:
    timeline = read_timeline(
        write(
            tmp_path / "t.json",
            [
                step(4, 0, 100), launch(10, 1), launch(90, 2),
                step(5, 100, 100), launch(110, 3),
                kernel("a", 20, 50, correlation=1), kernel("b", 120, 50, correlation=2),
                kernel("c", 180, 70, correlation=3),
            ],
        )
    )  # fmt: skip
    assert [(window.step, window.start_ns, window.end_ns) for window in timeline.windows] == [
        (4, 20_000, 180_000),
        (5, 180_000, 250_000),
    ]


def test_without_marks_all_work_is_one_window(tmp_path: Path) -> None:
    timeline = read_timeline(write(tmp_path / "t.json", [kernel("a", 10, 5), kernel("b", 40, 2)]))
    assert [(window.step, window.length_ns) for window in timeline.windows] == [(None, 32_000)]


def test_on_a_cpu_work_is_what_ops_do_themselves_and_not_what_waits(tmp_path: Path) -> None:
    timeline = read_timeline(
        write(
            tmp_path / "t.json",
            [
                step(0, 0, 100),
                event("cpu_op", "aten::linear", 10, 30),
                event("cpu_op", "aten::mm", 15, 20),
                event("cpu_op", "c10d::allreduce_", 45, 2),
                event(
                    "user_annotation",
                    "gloo:all_reduce",
                    46,
                    40,
                    tid=9,
                    args={"Input Dims": [[4, 4]], "Input type": ["float"]},
                ),
                event("cpu_op", "aten::copy_", 50, 5, tid=9),
                event("cpu_op", "_c10d_functional::wait_tensor", 50, 30),
                event("cpu_op", "aten::add", 90, 5),
            ],
        )
    )
    works = np.flatnonzero(timeline.spans.kind == SpanKind.COMPUTE)
    assert [
        (timeline.name(at), int(timeline.spans.start_ns[at]), int(timeline.spans.end_ns[at]))
        for at in works.tolist()
    ] == [
        ("aten::linear", 10_000, 15_000),
        ("aten::mm", 15_000, 35_000),
        ("aten::linear", 35_000, 40_000),
        ("aten::add", 90_000, 95_000),
    ]
    assert [timeline.names[op] for op in timeline.collectives.op] == ["all_reduce"]
    assert timeline.collectives.full_bytes.tolist() == [64]
    assert timeline.windows[0].length_ns == 100_000


@pytest.mark.parametrize("says_so", [True, False])
def test_what_blocks_in_a_collective_is_no_work_of_the_function_around_it(
    tmp_path: Path, says_so: bool
) -> None:
    """An autograd function is an op; our own ranges say where it waits, else the time right after the call
    does."""
    asked = "shardwise.all_reduce|wo ('wo' (rowwise)): Partial -> Replicate"
    timeline = read_timeline(
        write(
            tmp_path / "t.json",
            [
                event("cpu_op", "_AllReduce", 0, 100),
                *([event("user_annotation", asked, 10, 80)] if says_so else []),
                event("cpu_op", "c10d::allreduce_", 12, 3),
                event(
                    "user_annotation",
                    "gloo:all_reduce",
                    14,
                    70,
                    tid=9,
                    args={"Input Dims": [[4]], "Input type": ["float"]},
                ),
                event("cpu_op", "aten::add", 92, 5),
            ],
        )
    )
    works = [
        (timeline.name(at), int(timeline.spans.start_ns[at]))
        for at in np.flatnonzero(timeline.spans.kind == SpanKind.COMPUTE).tolist()
    ]
    assert works == [
        ("_AllReduce", 0),
        *([("_AllReduce", 90_000)] if says_so else []),
        ("aten::add", 92_000),
        ("_AllReduce", 97_000),
    ]
    assert (
        None if timeline.collectives.origin[0] == NONE else timeline.names[timeline.collectives.origin[0]]
    ) == ("wo" if says_so else None)


# --------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("ts", "expected_ns"),
    [
        ("4458676522690.655", 655),
        ("1716398122123456.789", 789),
        ("7888888888888.123", 123),
        ('"4458676522690.655"', 655),
    ],
)
def test_times_are_exact_to_the_nanosecond(tmp_path: Path, ts: str, expected_ns: int) -> None:
    whole = ts.strip('"').split(".")[0]
    text = json.dumps(document([kernel("first", 0, 5), kernel("second", 0, 7)])).replace(
        '"ts": 1000', f'"ts": {whole}', 1
    )
    path = tmp_path / "t.json"
    path.write_text(text.replace('"ts": 1000', f'"ts": {ts}', 1))
    timeline = read_timeline(path)
    assert not timeline.losses
    assert timeline.spans.start_ns.tolist() == [0, expected_ns]
    assert (timeline.spans.end_ns - timeline.spans.start_ns).tolist() == [5000, 7000]
    assert timeline.origin_ns == 1_700_000_000_000_000_000 + int(whole) * 1000


@given(st.lists(st.tuples(st.integers(1, 10**15), st.integers(1, 10**10)), min_size=1, max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nanoseconds_survive_the_text(tmp_path: Path, times: list[tuple[int, int]]) -> None:
    lines = [
        f'{{"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": '
        f'{start // 1000}.{start % 1000:03}, "dur": {length // 1000}.{length % 1000:03}}}'
        for start, length in times
    ]
    path = tmp_path / "t.json"
    path.write_text(f'{{"traceEvents": [{",".join(lines)}]}}')
    timeline = read_timeline(path)
    first = min(start for start, _ in times)
    assert timeline.spans.start_ns.tolist() == [start - first for start, _ in times]
    assert (timeline.spans.end_ns - timeline.spans.start_ns).tolist() == [length for _, length in times]


# --------------------------------------------------------------------------------------------- forms and
# damage


def some(count: int) -> list[dict[str, Any]]:
    return [
        kernel(f"kernel {number}", 10 * number + 1, 5, args={"nested": [{"ph": 1}, {"name": "x"}]})
        for number in range(count)
    ]


def names(timeline: Timeline) -> list[str]:
    return [timeline.name(span) for span in range(len(timeline.spans))]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("piece_bytes", [1, 37, 1000, 1 << 22])
def test_pieces_of_any_size_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, piece_bytes: int
) -> None:
    monkeypatch.setattr(container, "PIECE_BYTES", piece_bytes)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(document(some(7)), indent=indent))
    timeline = read_timeline(path)
    assert names(timeline) == [f"kernel {number}" for number in range(7)]
    assert not timeline.losses
    assert timeline.facts[0] == ("device", "NVIDIA H100")


@pytest.mark.parametrize("header_first", [True, False])
def test_the_header_may_stand_before_or_after_the_events(tmp_path: Path, header_first: bool) -> None:
    header: dict[str, Any] = {
        "distributedInfo": {
            "rank": 5,
            "pg_config": [{"pg_name": "0", "ranks": [4, 5]}, {"name": "no", "ph": "X"}],
        },
        "note": 'of "traceEvents": [',
        "baseTimeNanoseconds": "1000000000",
    }
    traced: dict[str, Any] = {"traceEvents": some(3)}
    merged = header | traced if header_first else traced | header
    path = tmp_path / "t.json"
    path.write_text(json.dumps(merged))
    timeline = read_timeline(path)
    assert timeline.ranks == (5,)
    assert timeline.origin_ns == 1_000_001_000 + START_US * 1000
    assert not timeline.losses


def test_entries_that_are_no_events_are_called_so_and_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('{"traceEvents": ["a", 5, null]}')
    with pytest.raises(TraceError, match=r"3 not an object \{\.\.\.\}, as an event is\."):
        read_timeline(path)
    made = json.dumps([kernel("one", 0, 5), 5, kernel("two", 9, 5), None])
    path.write_text(f'{{"traceEvents": {made}}}')
    timeline = read_timeline(path)
    assert {loss.what: loss.count for loss in timeline.losses} == {"not an object {...}, as an event is": 2}


def test_a_bare_array_is_a_trace_too(tmp_path: Path) -> None:
    path = tmp_path / "rank3.json"
    path.write_text(json.dumps(some(3)))
    assert names(read_timeline(path)) == ["kernel 0", "kernel 1", "kernel 2"]
    assert read_timeline(path).ranks == (3,)
    assert read_timeline(path, rank=7).ranks == (3,)
    assert read_timeline(path.rename(tmp_path / "trace.json"), rank=7).ranks == (7,)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_of_a_truncated_file_what_is_there_is_read_and_the_loss_is_said(
    tmp_path: Path, share: float, packed: bool
) -> None:
    text = json.dumps(document(some(400))).encode()
    whole = gzip.compress(text) if packed else text
    path = tmp_path / ("t.json.gz" if packed else "t.json")
    path.write_bytes(whole[: int(len(whole) * share)])
    timeline = read_timeline(path)
    assert 0.5 * share * 400 < len(timeline.spans) < 400
    assert names(timeline) == [f"kernel {number}" for number in range(len(timeline.spans))]
    said = {loss.what for loss in timeline.losses}
    assert "cut off at the end of the file" in said
    assert ("the gzip data ends too early" in said) == packed


@pytest.mark.parametrize("tail", ["]}", '], "traceName": "x"}', "]\n}\n"])
@pytest.mark.parametrize(
    ("broken", "lost"),
    [
        ('"name": "C:\\users\\x.py(3)"', {"not JSON": 1}),
        ('"name": "say "hello" twice"', {"mended: control characters, invalid UTF-8 or bare quotes": 1}),
        ('"name": "a\x01b"', {"mended: control characters, invalid UTF-8 or bare quotes": 1}),
        ('name": "x"', {"not JSON": 1}),
    ],
)
def test_a_broken_last_event_doesn_t_make_a_whole_file_one_that_is_cut_off(
    tmp_path: Path, broken: str, lost: dict[str, int], tail: str
) -> None:
    lines = [json.dumps(each) for each in (*some(5), kernel("last", 60, 5))]
    lines[-1] = lines[-1].replace('"name": "last"', broken)
    path = tmp_path / "t.json"
    path.write_text('{"traceEvents": [' + ",\n".join(lines) + tail)
    timeline = read_timeline(path)
    assert names(timeline)[:5] == [f"kernel {number}" for number in range(5)]
    assert {loss.what: loss.count for loss in timeline.losses} == lost


def test_a_step_that_a_file_s_end_cuts_short_is_left_out_and_said(tmp_path: Path) -> None:
    events = [
        each
        for number in range(3)
        for each in (
            step(number, 100 * number, 90),
            *(launch(100 * number + 10 * place, 10 * number + place) for place in (1, 2)),
        )
    ]
    kernels = [
        kernel("a", 100 * number + 10 * place + 5, 4, correlation=10 * number + place)
        for number in range(3)
        for place in (1, 2)
    ]
    text = json.dumps(document(events + kernels))
    path = tmp_path / "t.json"
    path.write_text(text[: text.rindex('"correlation": 22')])  # the last step's second kernel isn't there
    timeline = read_timeline(path)
    assert [window.step for window in timeline.windows] == [0, 1]
    assert {loss.what: loss.count for loss in timeline.losses} == {
        "cut off at the end of the file": 1,
        "step of which the file has a part only, and which is left out": 1,
    }
    path.write_text(text)
    assert [window.step for window in read_timeline(path).windows] == [0, 1, 2]


def test_several_gzip_members_and_padding_are_one_text(tmp_path: Path) -> None:
    text = json.dumps(document(some(50))).encode()
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(text[:1000]) + gzip.compress(text[1000:]) + b"\0" * 40)
    timeline = read_timeline(path)
    assert len(timeline.spans) == 50
    assert not timeline.losses


def test_a_broken_event_costs_itself_only_and_what_can_be_mended_is(tmp_path: Path) -> None:
    lines = [json.dumps(each) for each in some(6)]
    lines[1] = lines[1].replace("kernel 1", 'say "hello" twice')
    lines[2] = lines[2].replace("kernel 2", "a\x01b\nc")
    lines[4] = lines[4].replace('"dur"', '"dur" 17')
    path = tmp_path / "t.json"
    path.write_text('{"traceEvents": [' + ",\n".join(lines) + '], "traceName": "x"}')
    timeline = read_timeline(path)
    assert names(timeline) == ["kernel 0", 'say "hello" twice', "a b c", "kernel 3", "kernel 5"]
    assert {loss.what: loss.count for loss in timeline.losses} == {
        "not JSON": 1,
        "mended: control characters, invalid UTF-8 or bare quotes": 2,
    }


def test_work_without_a_duration_is_dropped_and_counted(tmp_path: Path) -> None:
    timeline = read_timeline(
        write(
            tmp_path / "t.json",
            [
                kernel("a", 5, 5),
                kernel("b", -START_US, 5),
                kernel("c", 5, 0),
                kernel("d", 5, -1),
                kernel("e", 5, 1e13),
            ],
        )
    )
    assert names(timeline) == ["a"]
    assert [(loss.count, loss.what) for loss in timeline.losses] == [
        (4, "events without a time or a duration")
    ]


GIVE_CHROME = "Give the Chrome JSON that torch.profiler's export_chrome_trace writes."


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "the file is empty."),
        (
            b"hello",
            "is no Chrome trace: it begins with 'hello', not with { or [. "
            "Give torch.profiler's JSON, plain or gzip.",
        ),
        (b"\x28\xb5\x2f\xfd123", "is a zstd file, which isn't read. Unpack it with `zstd -d`."),
        (b"\x0a\x05\x01\x02", f"is a Perfetto protobuf trace (.pftrace), which isn't read. {GIVE_CHROME}"),
        (b"\x80\x04\x95", f"is a Python pickle, which can run code, which isn't read. {GIVE_CHROME}"),
        (b"{}", "has no event that a Timeline is made of. Record with torch.profiler."),
        (b'{"traceEvents": []}', "has no event that a Timeline is made of. Record with torch.profiler."),
        (b"[", "has no event that a Timeline is made of. Record with torch.profiler."),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_named_and_refused(tmp_path: Path, start: bytes, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(start)
    with pytest.raises(TraceError) as caught:
        read_timeline(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_giant_string_costs_its_event_and_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_EVENT_BYTES", 1 << 16)
    monkeypatch.setattr(container, "PIECE_BYTES", 1 << 12)
    lines = [json.dumps(each) for each in some(5)]
    lines[2] = lines[2].replace("kernel 2", "x" * (1 << 20))
    path = tmp_path / "t.json"
    path.write_text('{"traceEvents": [' + ",".join(lines) + "]}")
    stream = events.EventStream(container.text_pieces(path, container.Damage()))
    most = 0
    kept = []
    for batch in stream:
        most = max(most, len(stream._buffer))
        kept += [each.name for each in batch]
    assert kept == ["kernel 0", "kernel 1", "kernel 3", "kernel 4"]
    assert stream.lost == {"longer than 0 MiB": 1}
    assert most < 3 << 16


@pytest.mark.parametrize(
    "filler", ['"name":"a" ', '"name": "', "}] ", '}],"a":', '"ts": 1', '{"ph":', '\\"', "} , "]
)
@pytest.mark.parametrize("in_name", [True, False])
def test_text_made_to_be_slow_is_not(tmp_path: Path, filler: str, in_name: bool) -> None:
    """Four MiB of what could send a careless pattern back and forth; hours where it does."""
    lines = [json.dumps(each) for each in some(3)]
    slow = filler * ((4 << 20) // len(filler))
    lines[1] = lines[1].replace("kernel 1", slow) if in_name else f'{{"ph": "X", {slow}}}'
    path = tmp_path / "t.json"
    path.write_text('{"traceEvents": [' + ",".join(lines) + "]}")
    timeline = read_timeline(path)
    assert names(timeline)[0] == "kernel 0"
    assert names(timeline)[-1] == "kernel 2"


def test_deep_nesting_costs_its_event(tmp_path: Path) -> None:
    lines = [json.dumps(each) for each in some(3)]
    lines[1] = lines[1].replace('"nested"', '"deep": ' + "[" * 100_000 + "]" * 100_000 + ', "nested"')
    path = tmp_path / "t.json"
    path.write_text('{"traceEvents": [' + ",".join(lines) + "]}")
    timeline = read_timeline(path)
    assert names(timeline) == ["kernel 0", "kernel 2"]
    assert [loss.what for loss in timeline.losses] == ["not JSON"]


def test_endless_different_names_are_refused_and_long_ones_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = write(tmp_path / "long.json", [kernel("x" * 10_000, 1, 5), kernel("x" * 10_000, 7, 5)])
    assert [len(name) for name in names(read_timeline(long))] == [4096, 4096]
    monkeypatch.setattr(read, "MOST_NAMES_LENGTH", 1000)
    many = write(
        tmp_path / "many.json", [kernel(f"kernel number {number}", number + 1, 1) for number in range(100)]
    )
    with pytest.raises(
        TraceError,
        match=r"many\.json: has more than 100,000,000 spans, or 0 MiB of different names\. "
        r"Record fewer steps\.",
    ):
        read_timeline(many)


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MOST_BYTES", 1 << 24)
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(b'{"traceEvents": [' + b" " * (1 << 25)))
    with pytest.raises(TraceError, match="unpacks to more than 0 GiB"):
        read_timeline(path)


SAMPLE = json.dumps(
    document(
        [
            step(1, 0, 90),
            event("cpu_op", "aten::mm", 1, 9, args={"Input Dims": [[2, 2]]}),
            launch(3, 1),
            kernel("k", 20, 5, correlation=1),
            all_reduce(30, 9),
        ]
    )
).encode()


@given(
    st.lists(st.tuples(st.integers(0, len(SAMPLE)), st.integers(0, 8), st.binary(max_size=12)), max_size=6),
    st.integers(1, 400),
    st.booleans(),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_changed_at_random_give_a_timeline_or_the_readers_own_error(
    tmp_path: Path, edits: list[tuple[int, int, bytes]], piece_bytes: int, packed: bool
) -> None:
    text = bytearray(zlib.compress(SAMPLE, wbits=31) if packed else SAMPLE)
    for at, length, new in edits:
        text[at : at + length] = new
    path = tmp_path / "t.json"
    path.write_bytes(text)
    before, container.PIECE_BYTES = container.PIECE_BYTES, piece_bytes
    try:
        timeline = read_timeline(path)
    except TraceError:
        return
    finally:
        container.PIECE_BYTES = before
    assert (timeline.spans.end_ns >= timeline.spans.start_ns).all()
    assert all(0 <= number < len(timeline.names) for number in timeline.spans.name.tolist())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["ph", "cat", "name", "pid", "tid", "ts", "dur", "args", "External id", "correlation", "stream",
     "Input Dims", "Input type", "bytes", "Collective name", "In msg nelems", "dtype", "Process Group Name",
     "Process Group Ranks", "Seq"]
)  # fmt: skip
GOOD = {"ph": "X", "cat": "kernel", "name": "ncclKernel", "pid": 0, "tid": 1, "ts": 5, "dur": 2}


@given(
    st.lists(
        st.tuples(
            st.dictionaries(KEYS, JSON, max_size=4),
            st.dictionaries(KEYS, JSON, max_size=4),
            st.sampled_from(["kernel", "cpu_op", "cuda_runtime", "user_annotation"]),
        ),
        max_size=5,
    ),
    st.dictionaries(
        st.sampled_from(["distributedInfo", "baseTimeNanoseconds", "deviceProperties"]), JSON, max_size=2
    ),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_events_of_any_types_give_a_timeline_or_the_readers_own_error(
    tmp_path: Path, odd: list[tuple[dict[str, Any], dict[str, Any], str]], header: dict[str, Any]
) -> None:
    made = [GOOD | {"cat": cat, "args": args} | changed for changed, args, cat in odd]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(header | {"traceEvents": [GOOD, *made]}))
    timeline = read_timeline(path)
    assert len(timeline.spans) >= 1
