"""What a flight recorder's file says of the collective that isn't done."""

import json
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from shardwise.torch_private import flight_records
from shardwise.train.flight import oldest_unfinished, unfinished


def entry(number: int, name: str, state: str, retired: bool, **more: object) -> dict[str, object]:
    return {
        "record_id": number,
        "pg_id": 1,
        "process_group": ["2", "mesh_tp"],
        "collective_seq_id": number + 1,
        "profiling_name": name,
        "input_sizes": [[2, 8]],
        "input_dtypes": ["BFloat16"],
        "state": state,
        "retired": retired,
        **more,
    }


def record(*entries: dict[str, object]) -> bytes:
    return json.dumps({"version": "2.10", "entries": entries, "pg_status": {}}).encode()


def test_the_oldest_collective_that_is_not_done_is_named_with_its_size_and_group() -> None:
    found = record(
        entry(8, "nccl:all_reduce", "scheduled", False),
        entry(6, "nccl:all_gather", "completed", False),
        entry(7, "nccl:reduce_scatter", "started", False),
        entry(5, "nccl:all_gather", "scheduled", True),
    )
    expected = "reduce_scatter of bfloat16[2,8], number 8 of group 2 (mesh_tp), started"
    assert oldest_unfinished(found) == expected


@pytest.mark.parametrize(
    "found",
    [b"", b"{", b'{"entries": [{"retired": 1}]}', record(), record(entry(1, "x", "completed", False))],
)
def test_nothing_is_said_where_all_is_done_or_the_record_cannot_be_read(found: bytes) -> None:
    assert oldest_unfinished(found) == ""


def test_this_pytorch_writes_what_is_read(tmp_path: Path) -> None:
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        dist.barrier()
        (found, *_) = flight_records()
        assert b'"entries"' in found
        until = time.monotonic() + 60
        while unfinished() and time.monotonic() < until:  # a thread of gloo's takes it off the record
            time.sleep(0.05)
        assert unfinished() == ""
    finally:
        dist.destroy_process_group()
