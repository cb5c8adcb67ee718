"""The sweep over Hugging Face types: one type examined, and the tables made of rows."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.hf_results import Answer, Row, Step, Sweep, blocks, newest_sweep, summary
from benchmarks.hf_sweep import QUERIES, TP, ImplausibleError, check, check_flops, examine, model_name
from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.program import Phase
from shardwise.explain.explain import explain
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.trace.trace import trace

STEP = Step(
    ops=1200,
    flops=10**12,
    unknown=(("aten::new", 2), ("aten::odd", 1)),
    collectives=0,
    wire_bytes=0.0,
    sharded=0.0,
)
PLAN_STEP = replace(
    STEP, flops=6 * 10**11, unknown=(("aten::new", 3),), collectives=7, wire_bytes=10.0, sharded=0.5
)
YES = Row("yes_type", "hf:yes_type", "", 2_000_000, Answer.YES, "", STEP, Answer.YES, "", PLAN_STEP, 1.0)
NO_PLAN = replace(
    YES, model_type="planless", step=replace(STEP, unknown=()), under_its_plan=Answer.NO_PLAN, plan_step=None
)
MISS = replace(
    YES, model_type="miss", under_its_plan=Answer.NO, plan_reason="a | b </script> *c*", plan_step=None
)
NO = Row("none", "hf:none?a=1", "because", None, Answer.NO, "no such", None, Answer.NO, "no such", None, 0.1)
SWEEP = Sweep(
    "python",
    "2026-01-02T03:04:05",
    "float32",
    2,
    2,
    32,
    (("torch", "1"), ("transformers", "2")),
    (YES, NO_PLAN, MISS, NO),
)


def test_counts_are_of_types_and_of_those_with_a_plan() -> None:
    assert summary(SWEEP) == (
        "Of the 4 causal language model types, 3 are explained unsharded. 2 of these have a "
        "tensor-parallel plan of their own, and 1 are explained under it too. 2 are explained both ways, "
        "or have no plan. Of 4,800 ops in all these steps the catalogue doesn't know 9."
    )
    assert [row.is_whole for row in SWEEP.rows] == [True, True, False, False]


def test_tables_show_misses_with_their_reasons_and_no_mark_up_of_others() -> None:
    made = blocks(SWEEP)
    assert (
        "| yes_type | 2 | yes | yes | 50.0% | 7 | 1,200 | new, odd |\n| planless | 2 | yes | no plan |  |  "
        "| 1,200 |  |\n"
        "| miss | 2 | yes | **no** |  |  | 1,200 | new, odd |\n| none |  | **no** | **no** |  |  |  |  |\n"
        in made["benchmark-hf-explain"]
    )
    assert (
        "| miss | under its plan | a \\| b &lt;/script> \\*c\\* |\n| none | unsharded | no such |"
        in made["benchmark-hf-explain-misses"]
    )
    assert "| `hf:none?a=1` | because |" in made["benchmark-hf-explain-forms"]
    assert all("python" in text for text in made.values())


def test_a_sweep_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    assert SWEEP.write(tmp_path).name == "2026-01-02-hf-explain.json"
    assert newest_sweep(tmp_path) == SWEEP


def test_a_type_is_examined_unsharded_and_under_its_plan() -> None:
    pytest.importorskip(
        "transformers",
        reason="transformers isn't installed, so no type is examined: pip install shardwise[hf]",
    )
    row = examine("qwen3", "float32")
    assert (row.explained, row.under_its_plan, row.reason, row.plan_reason) == (
        Answer.YES,
        Answer.YES,
        "",
        "",
    )
    assert row.step is not None
    assert row.plan_step is not None
    assert (row.step.sharded, row.step.collectives, row.step.unknown) == (0.0, 0, ())
    assert 0.99 < row.plan_step.sharded < 1
    assert row.plan_step.flops * TP == row.step.flops
    assert row.plan_step.wire_bytes > 0
    assert examine("gpt2", "float32").under_its_plan is Answer.NO_PLAN
    jetmoe = examine("jetmoe", "float32")
    assert (jetmoe.explained, jetmoe.under_its_plan) == (Answer.NO, Answer.NO)
    assert "self_attention.experts.router raised DataDependentOutputException" in jetmoe.reason


def test_a_program_that_can_t_be_a_training_step_s_is_no_explanation() -> None:
    spec = ModelSpec("small", LlamaConfig(32, 16, 1, 2, 2, 24), "")
    program = trace(spec, builtin_plan("rowwise"), Mesh((("tp", 2),)), StepSettings(2, 4))
    explanation = explain(program)
    check(program, explanation)
    phases = explanation.phases
    for wrong, message in (
        (
            replace(explanation, phases=tuple(p for p in phases if p.phase is not Phase.LOSS)),
            r"^nothing runs in loss\.$",
        ),
        (
            replace(explanation, phases=tuple(replace(p, flops=0) for p in phases)),
            r"^no op of forward and backward has FLOPs\.$",
        ),
        (replace(explanation, collectives=()), r"are sharded, and forward or backward sends nothing\.$"),
    ):
        with pytest.raises(ImplausibleError, match=message):
            check(program, wrong)
    with pytest.raises(ImplausibleError, match=r"^\d+ parameters are held of \d+\.$"):
        check(replace(program, holdings=program.holdings[1:]), explanation)


@pytest.mark.parametrize("share", [0.49, 1.01])
def test_a_rank_does_its_share_of_the_arithmetic_and_no_more_than_all(share: float) -> None:
    check_flops(STEP, PLAN_STEP)
    with pytest.raises(ImplausibleError, match=f"^a rank's share of the FLOPs is {share:.3f} at tp=2"):
        check_flops(STEP, replace(STEP, flops=int(share * STEP.flops)))


def test_every_type_that_needs_more_than_two_layers_says_why() -> None:
    assert model_name("qwen3") == "hf:qwen3?num_hidden_layers=2"
    assert model_name("gpt_neo") == "hf:gpt_neo"
    assert all(note for _, note in QUERIES.values())
