"""The sweep over Hugging Face types: one type examined, and the tables made of rows."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.hf_results import Answer, Row, Sweep, blocks, newest_sweep, summary
from benchmarks.hf_sweep import QUERIES, examine, model_name

YES = Row("yes_type", "hf:yes_type", "", 2_000_000, Answer.YES, "", Answer.YES, "", 0.5, 1.0)
NO_PLAN = replace(YES, model_type="planless", under_its_plan=Answer.NO_PLAN, sharded=None)
MISS = replace(YES, model_type="miss", under_its_plan=Answer.NO, plan_reason="a | b </script> *c*")
NO = Row("none", "hf:none?a=1", "because", None, Answer.NO, "no such", Answer.NO, "no such", None, 0.1)
SWEEP = Sweep("python", "2026-01-02T03:04:05", "float32", 2, 2, 32, (("torch", "1"), ("transformers", "2")), (YES, NO_PLAN, MISS, NO))


def test_counts_are_of_types_and_of_those_with_a_plan() -> None:
    assert summary(SWEEP) == (
        "Of the 4 causal language model types, 3 are explained unsharded. 2 of these have a tensor-parallel plan of their own, and 1 are "
        "explained under it too."
    )
    assert [row.is_whole for row in SWEEP.rows] == [True, True, False, False]


def test_tables_show_misses_with_their_reasons_and_no_mark_up_of_others() -> None:
    made = blocks(SWEEP)
    assert (
        "| yes_type | 2 | yes | yes | 50.0% |\n| planless | 2 | yes | no plan |  |\n| miss | 2 | yes | **no** | 50.0% |"
        in made["benchmark-hf-explain"]
    )
    assert "| miss | under its plan | a \\| b &lt;/script> \\*c\\* |\n| none | unsharded | no such |" in made["benchmark-hf-explain-misses"]
    assert "| `hf:none?a=1` | because |" in made["benchmark-hf-explain-forms"]
    assert all("python" in text for text in made.values())


def test_a_sweep_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    assert SWEEP.write(tmp_path).name == "2026-01-02-hf-explain.json"
    assert newest_sweep(tmp_path) == SWEEP


def test_a_type_is_examined_unsharded_and_under_its_plan() -> None:
    pytest.importorskip("transformers", reason="transformers isn't installed, so no type is examined: pip install shardwise[hf]")
    row = examine("qwen3", "float32")
    assert (row.explained, row.under_its_plan, row.reason, row.plan_reason) == (Answer.YES, Answer.YES, "", "")
    assert row.sharded is not None
    assert 0.99 < row.sharded < 1
    assert examine("gpt2", "float32").under_its_plan is Answer.NO_PLAN
    jetmoe = examine("jetmoe", "float32")
    assert (jetmoe.explained, jetmoe.under_its_plan) == (Answer.NO, Answer.NO)
    assert jetmoe.reason.startswith("DataDependentOutputException")


def test_every_type_that_needs_more_than_two_layers_says_why() -> None:
    assert model_name("qwen3") == "hf:qwen3?num_hidden_layers=2"
    assert model_name("gpt_neo") == "hf:gpt_neo"
    assert all(note for _, note in QUERIES.values())
