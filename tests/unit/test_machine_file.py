"""What a machine file is refused for, in the words that a user reads."""

import pytest

from shardwise.core.errors import MachineError
from shardwise.files.machine_file import machine_from_toml
from shardwise.files.machine_text import to_toml
from shardwise.predict.machines import machine_text

TEXT = machine_text("h100-sxm-80gb")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '3350, unit = "GB/s"',
            '3350, unit = "TB/s"',
            "memory.bandwidth is 3350 TB/s. Plausible: 10 MB/s to 50 TB/s. Is its unit right?",
        ),
        ('80, unit = "GB"', '80, unit = "W"', 'memory.capacity.unit is "W". Allowed: MB, MiB, GB, GiB.'),
        ('name = "h100-sxm-80gb"\n', "", 'name is missing. Write name = "...".'),
        (
            "rate = { value = 3032",
            "rate = { value = 3999",
            "kernels.default.rate is 3.999 TB/s. The memory's bandwidth is 3.35 TB/s",
        ),
        (
            '450, unit = "GB/s", per = "device"',
            '450, unit = "GB/s"',
            "links.within.bandwidth.per is missing.",
        ),
        ("[launch]", "[launc]", 'launc is unknown. Did you mean "launch"?'),
        (
            "0.708]",
            "1.708]",
            "matmul.bfloat16.tiles has a share of 1.708. Plausible: above 0, to 1: no kernel beats the peak.",
        ),
        ("value = 132,", 'value = "x",', "matmul.bfloat16.units.value is x. Write a number."),
        (
            "rate = { value = 345",
            "rate = { value = 3450",
            "rate is 3.45 TB/s. The link's bandwidth is 450 GB/s one way: at most twice that.",
        ),
        ('source = "NVIDIA H100 data sheet"', 'from = "somewhere"', "memory.capacity.from is unknown."),
        (
            "devices_per_node = 8",
            "devices_per_node = 0",
            "devices_per_node is 0. Write a whole number from 1 to 1024.",
        ),
        ('device = "cuda"', 'device = "tpu"', 'device is "tpu". Allowed: cuda, cpu.'),
        (
            "[predictions]\nerror = { value = 0",
            "[predictions]\nerror = { value = 7",
            "predictions.error is 7",
        ),
        ("[[262144, ", "[[-1, ", "links.between.reach has a share outside 0 to 1"),
        ("value = 2.75", "value = nan", "memory.context.value is nan. Write a number."),
    ],
)
def test_what_can_t_be_is_refused_with_the_field_and_what_is_plausible(
    old: str, new: str, message: str
) -> None:
    assert old in TEXT
    with pytest.raises(MachineError) as refused:
        machine_from_toml(TEXT.replace(old, new, 1), "mine.toml")
    assert str(refused.value).startswith("mine.toml: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_constant_or_a_table_missing_says_how_to_write_it() -> None:
    context = next(line for line in TEXT.splitlines() if line.startswith("context = "))
    with pytest.raises(
        MachineError,
        match=r"memory.context is missing. Write context = { value = ..., unit = \"...\", source = \"...\" "
        r"}. Plaus",
    ):
        machine_from_toml(TEXT.replace(context, ""), "mine.toml")
    before, _, after = TEXT.partition("[launch]")
    with pytest.raises(MachineError, match=r"\[launch\] is missing. A machine file needs that table"):
        machine_from_toml(before + after[after.index("[links.within]") :], "mine.toml")


def test_what_the_host_takes_may_be_unknown() -> None:
    forward = next(line for line in TEXT.splitlines() if line.startswith("forward = ") and '"us"' in line)
    machine = machine_from_toml(TEXT.replace(forward, ""), "mine.toml")
    assert machine.launch.unknown == ("launch.forward",)
    assert machine_from_toml(to_toml(machine), "again") == machine


def test_a_bandwidth_per_node_is_shared_by_its_devices() -> None:
    per_node = TEXT.replace('450, unit = "GB/s", per = "device"', '3600, unit = "GB/s", per = "node"', 1)
    assert (
        machine_from_toml(per_node).within.bytes_per_s == machine_from_toml(TEXT).within.bytes_per_s == 450e9
    )


@pytest.mark.parametrize("text", ["name = [", "a = " + "[" * 5000, "name = 1"])
def test_what_is_no_machine_is_one_line(text: str) -> None:
    with pytest.raises(MachineError) as refused:
        machine_from_toml(text, "mine.toml")
    assert "\n" not in str(refused.value)[:200]
