"""A machine written as a file's text is the machine that is read back from it."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.core.collective import CollectiveKind
from shardwise.core.errors import MachineError
from shardwise.core.machine import UNKNOWN_LINK, Machine
from shardwise.files.machine_file import machine_from_toml
from shardwise.files.machine_text import to_toml
from shardwise.predict.machines import load_machine, machine_names

TEXT = """
name = "a \\"quoted\\" ünïcode machine"
device = "cuda"
about = "two lines\\nand a back\\\\slash"
devices_per_node = 8
[memory]
capacity = { value = 640, unit = "GiB", per = "node", source = "sheet" }
bandwidth = { value = 3.35, unit = "TB/s", per = "device", source = "sheet" }
context = { value = 1.5, unit = "GiB", per = "device", source = "seen" }
[power]
cap = { value = 700, unit = "W", per = "device", source = "sheet" }
[predictions]
error = { value = 0.068, unit = "1", source = "21 pairs" }
[matmul.bfloat16]
peak = { value = 989.4, unit = "TFLOP/s", per = "device", source = "sheet" }
units = { value = 132, unit = "1", source = "sheet" }
tiles.value = [[128, 256, 0.7], [64, 64, 0.31]]
tiles.unit = "rows, columns, share of peak"
tiles.source = "x"
tiles.fitted = "435 matmuls"
start = { value = 3.1, unit = "us", source = "x", fitted = "435 matmuls" }
extra_k = { value = 85, unit = "1", source = "x" }
[attention.bfloat16]
forward = { value = 650.5, unit = "TFLOP/s", source = "x" }
backward = { value = 450, unit = "TFLOP/s", source = "x" }
half_sequence = { value = 300, unit = "tokens", source = "x" }
start = { value = 12, unit = "us", source = "x" }
[kernels.default]
start = { value = 2.1, unit = "us", source = "x" }
rate = { value = 2.9, unit = "TB/s", source = "x" }
[kernels."aten::embedding"]
start = { value = 0, unit = "us", source = "x" }
rate = { value = 2.9, unit = "TB/s", source = "x" }
elements = { value = 165.3, unit = "Gelement/s", source = "x" }
[kernels.copy]
points = { value = [[1024, 1.1e-6], [1048576.5, 3.3e-5]], unit = "bytes, s", source = "x" }
[launch]
forward = { value = 7.7, unit = "us", source = "x" }
backward = { value = 8, unit = "us", source = "x" }
collective = { value = 30, unit = "us", source = "x" }
dtensor_backward = { value = 100, unit = "us", source = "x" }
[spread]
work = { value = 12.5, unit = "ms", source = "x" }
collective = { value = 40, unit = "us", source = "x" }
[links.within]
bandwidth = { value = 450, unit = "GB/s", per = "device", source = "sheet" }
[[links.within.any]]
ranks = 8
start = { value = 13, unit = "us", source = "x" }
rate = { value = 362.5, unit = "GB/s", source = "x" }
[[links.within.all_gather]]
ranks = 2
points = { value = [[512, 2e-5], [4096, 0.002]], unit = "bytes sent, s", source = "x" }
[[links.within.all_gather]]
ranks = 4
start = { value = 17, unit = "us", source = "x" }
rate = { value = 300, unit = "GB/s", source = "x" }
[links.between]
bandwidth = { value = 400, unit = "GB/s", per = "node", source = "sheet" }
reach = { value = [[16e6, 0.12], [1e9, 0.7]], unit = "bytes, share", source = "x" }
start = { value = 5, unit = "us", source = "x" }
"""


@pytest.fixture
def machine() -> Machine:
    return machine_from_toml(TEXT)


def test_a_machine_is_read_back_from_its_text_with_every_source(machine: Machine) -> None:
    assert machine_from_toml(to_toml(machine)) == machine


def test_how_far_off_predictions_were_is_in_the_file_only_where_it_was_measured(machine: Machine) -> None:
    assert machine.error == 0.068
    unknown = replace(machine, error=None)
    assert "[predictions]" not in to_toml(unknown)
    assert machine_from_toml(to_toml(unknown)).error is None


def test_a_constant_without_a_source_is_our_bug(machine: Machine) -> None:
    bare = replace(
        machine, constants=tuple(each for each in machine.constants if each.path != "launch.forward")
    )
    with pytest.raises(AssertionError, match=r"launch\.forward has no source"):
        to_toml(bare)


@given(
    st.floats(1e-9, 0.04),
    st.floats(1e7, 4e11),
    st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=5),
    st.text(max_size=30).filter(str.strip),
)
def test_any_values_and_words_come_back(start: float, rate: float, seconds: list[float], words: str) -> None:
    machine = machine_from_toml(TEXT)
    kernel = replace(dict(machine.kernels)["default"], start_s=start, bytes_per_s=rate)
    points = tuple((float(4**index), each) for index, each in enumerate(sorted(seconds)))
    link = replace(
        machine.within,
        rates=((CollectiveKind.ALL_GATHER, (replace(machine.within.rates[1][1][0], points=points),)),),
    )
    changed = replace(machine, about=words, kernels=(("default", kernel), *machine.kernels[1:]), within=link)
    back = machine_from_toml(to_toml(changed))
    assert back.about == words
    assert math.isclose(dict(back.kernels)["default"].start_s, start, rel_tol=1e-15)
    assert math.isclose(dict(back.kernels)["default"].bytes_per_s, rate, rel_tol=1e-15)
    assert back.within.rates[0][1][0].points == points


def test_one_device_may_have_no_link_and_several_may_not(machine: Machine) -> None:
    alone = replace(machine, devices_per_node=1, within=UNKNOWN_LINK, between=None)
    assert "[links" not in to_toml(alone)
    assert machine_from_toml(to_toml(alone)).within == UNKNOWN_LINK
    with pytest.raises(MachineError, match=r"\[links\] is missing"):
        machine_from_toml(to_toml(replace(alone, devices_per_node=2)))


@pytest.mark.parametrize("name", machine_names())
def test_every_machine_that_comes_with_shardwise_is_read_back(name: str) -> None:
    machine = load_machine(name)
    assert machine_from_toml(to_toml(machine), name) == machine
