"""The installed script, as a process of its own: what the other files show of a command in their own process
holds for it too."""

import json
from pathlib import Path

import pytest

from tests.e2e.command import shardwise, shardwise_process
from tests.matrix import FULL

COMMANDS = (
    "compare",
    "explain",
    "verify",
    "diff",
    "predict",
    "tokens",
    "calibrate",
    "models",
    "plans",
    "machines",
)


def test_its_help_names_every_command() -> None:
    ended = shardwise_process("--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert all(f" {command} " in ended.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str) -> None:
    ended = shardwise(command, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"shardwise {command}" in ended.stdout


@FULL  # in the test's process: test_explain.py
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2() -> None:
    ended = shardwise_process("explain", "rowise")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith('shardwise: unknown plan "rowise". Did you mean "rowwise"?')
    assert len(ended.stderr.splitlines()) == 1


def test_stdout_is_the_document_and_nothing_else(tmp_path: Path) -> None:
    options = (
        "explain",
        "rowwise@dtensor",
        "--model",
        "llama3-debug?n_layers=1",
        "--mesh",
        "fsdp=2,tp=2",
        "--batch",
        "2",
        "--seq",
        "32",
        "--json",
    )
    ended = shardwise_process(*options, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    # DTensor would warn of the two all-reduces that clipping takes on two axes
    assert ended.stderr
    assert all(line.startswith("shardwise: ") for line in ended.stderr.splitlines())
    assert json.loads(ended.stdout) == json.loads(shardwise(*options, cwd=tmp_path).stdout)
