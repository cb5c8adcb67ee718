"""The verbs as one calls them from Python: results that say themselves, names that load on first use."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import shardwise
from shardwise.core.errors import OptionError
from shardwise.core.explanation import Contrast, Explanation
from shardwise.core.sample import Calibration
from shardwise.predict.machines import load_machine
from tests.matrix import FULL

MODEL = "llama3-debug?n_layers=2,hidden=96,n_heads=12,n_kv_heads=4,ffn_hidden=256,vocab_size=512"


@pytest.fixture(scope="module")
def case() -> shardwise.Case:
    return shardwise.case(model=MODEL, mesh="tp=2", plans=["rowwise"], seq=16)


def test_a_result_is_json_a_page_a_notebook_s_cell_and_a_terminal_s_text(
    case: shardwise.Case, tmp_path: Path
) -> None:
    result = shardwise.explain(case)
    assert isinstance(result.answer, Explanation)
    assert json.loads(result.to_json())["plan"] == "rowwise"
    page = result.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    shown = result._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert "<script" not in shown
    assert "under plan rowwise" in str(result)


def test_a_second_plan_stands_beside_the_first(case: shardwise.Case) -> None:
    assert isinstance(shardwise.explain(case, against="colwise").answer, Contrast)


def test_predict_and_sweep_take_the_same_case(case: shardwise.Case) -> None:
    assert shardwise.predict(case).answer.predictions[0].plan == "rowwise"
    assert {point.devices for point in shardwise.sweep(case, micro_batches=[1]).answer.points} == {2}


def test_an_option_that_a_verb_doesn_t_know_is_one_line(case: shardwise.Case) -> None:
    with pytest.raises(OptionError) as refused:
        shardwise.predict(case, overlap=True)
    assert str(refused.value).startswith('unknown option "overlap". Did you mean "overlap_data"? Allowed: ')


def test_what_calibrate_measured_is_shown_as_the_others_are(tmp_path: Path) -> None:
    machine = load_machine("h100-sxm-80gb")
    result = shardwise.Result(Calibration(machine, 2, (), (), ("a note <b>",)))
    assert json.loads(result.to_json())["machine"]["name"] == "h100-sxm-80gb"
    assert "a note &lt;b&gt;" in result.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "- a note <b>" in str(result)


def test_tokens_are_written_and_checked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 100)
    result = shardwise.tokens(tmp_path / "t", tmp_path / "a.txt", vocab_size=256)
    assert result.answer.text.tokens == 1100
    assert "1,100 tokens of 1 document." in str(result)
    assert shardwise.check_tokens(tmp_path / "t").answer.problems == ()
    with pytest.raises(OptionError, match=r'unknown option "vocab"\. Did you mean'):
        shardwise.tokens(tmp_path / "u", vocab=300)


def test_a_verb_is_the_verb_also_after_the_room_of_its_name_was_imported() -> None:
    importlib.import_module("shardwise.explain.explain")
    assert shardwise.explain.__module__ == "shardwise.api"


def test_importing_shardwise_loads_neither_torch_nor_a_room() -> None:
    loaded = (
        "import shardwise, sys; print([name for name in sys.modules if name.startswith(('torch', "
        "'shardwise.'))])"
    )
    ended = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


SCRIPT = f"""
import shardwise
case = shardwise.case(model="{MODEL}", mesh="tp=2", plans=["rowwise"], seq=16)
print(len(shardwise.sweep(case, micro_batches=[1]).answer.points) > 0)
print(shardwise.verify(case).answer.verifications[0].verdict)
"""


@pytest.mark.parametrize(
    "is_file",
    [True, pytest.param(False, marks=FULL)],
    ids=["a script without a guard", "what a notebook types"],
)
def test_ranks_and_workers_run_nothing_of_the_script_that_called_them(is_file: bool, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py" if is_file else "-"]
    typed = None if is_file else SCRIPT
    ended = subprocess.run(command, input=typed, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "True\nright\n"
