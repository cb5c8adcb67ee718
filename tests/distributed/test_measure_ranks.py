"""The instruments of measure/ that need ranks: subjects that wait in host memory, modules alone."""

import msgspec

from shardwise.launch import run_ranks


def test_a_subject_that_waits_in_host_memory_between_its_steps_trains_the_same() -> None:
    results = run_ranks(
        "tests.distributed.measure_workers:park", b"", world_size=2, device_type="cpu", timeout_s=60
    )
    for result in results:
        parked, resident, held = msgspec.json.decode(result)
        assert parked == resident
        assert len(parked) == 4
        assert parked[-1] < parked[0]
        assert held == 0


def test_any_module_can_be_timed_alone_on_both_engines() -> None:
    results = run_ranks(
        "tests.distributed.measure_workers:alone", b"", world_size=2, device_type="cpu", timeout_s=60
    )
    for result in results:
        times = msgspec.json.decode(result)
        assert len(times) == 8
        assert all(0 < seconds < 60 for seconds in times)
