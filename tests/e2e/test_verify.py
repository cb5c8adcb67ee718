"""`shardwise verify` as a user meets it: exit codes, JSON, bad input, Ctrl-C, the page in a real headless
Chromium; and shardwise.testing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shardwise.core.errors import InputError
from shardwise.core.verification import Verdict, VerificationRun
from shardwise.files.document import read_document
from shardwise.report.verify.html import verification_html
from shardwise.testing import assert_plan_trains_right
from tests.e2e.browser import Browser, Elements
from tests.e2e.command import PATIENCE_S, gone, ranks_of, shardwise, start, wait_until
from tests.matrix import FULL
from tests.unit.test_verify_report import CRASH, HOSTILE, LITTLE, RIGHT, SKIPPED, WRONG, run

MODELS = "tests.distributed.verify_models:"


def test_plans_that_are_right_end_with_0_and_leave_a_page_and_the_data(tmp_path: Path) -> None:
    """One of them is the user's own, in a file."""
    out, plan = tmp_path / "page", tmp_path / "mine.toml"
    plan.write_text(shardwise("plans", "colwise").stdout.replace('"colwise"', '"mine"', 1))
    ended = shardwise("verify", "rowwise", "colwise@dtensor", str(plan), "--size", "small", "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    assert "3 right: tp=2 on cpu, batch 2 and 1, 16 tokens each, no dropout" in ended.stdout
    assert sorted(each.name for each in out.iterdir()) == [
        "settings.json",
        "tables",
        "verification.json",
        "verify.html",
        "verify.md",
    ]
    found = read_document((out / "verification.json").read_bytes(), VerificationRun)
    assert [(each.plan, each.verdict) for each in found.verifications] == [
        ("rowwise", Verdict.RIGHT),
        ("colwise@dtensor", Verdict.RIGHT),
        ("mine", Verdict.RIGHT),
    ]


def test_a_wrong_plan_ends_with_1_and_json_is_one_document() -> None:
    ended = shardwise("verify", "own", "--model", f"{MODELS}by_hand_slope_not_summed", "--json")
    assert ended.returncode == 1
    (case,) = json.loads(ended.stdout)["verifications"]
    assert (case["verdict"], case["findings"][0]["subject"], case["findings"][0]["cause"]) == (
        "wrong",
        "slope",
        "parts_not_summed",
    )


def test_static_checks_start_no_rank_and_prove_nothing() -> None:
    ended = shardwise("verify", "--static", "rowwise", "--model", "llama3-70b", "--mesh", "tp=8")
    assert ended.returncode == 0, ended.stderr
    found = " ".join(ended.stdout.split())
    assert "Nothing found statically; not proved." in found
    assert "tp=8, batch 2, 16 tokens each, traced and not run" in found


def test_a_static_finding_ends_with_1() -> None:
    ended = shardwise(
        "verify",
        "own",
        "--static",
        "--model",
        f"{MODELS}fused_halves",
        "--model",
        f"{MODELS}fused_pairs",
        "--json",
    )
    assert ended.returncode == 1
    suspected, clean = json.loads(ended.stdout)["verifications"]
    assert (suspected["verdict"], suspected["proof"]) == ("suspected", None)
    # and of both that torch's clipping takes no mixture of tensors
    note = ("embed.weight", None)
    found = [[(each["subject"], each["cause"]) for each in one["findings"]] for one in (suspected, clean)]
    assert found == [[("gate_up.weight", "cut_as_one"), note], [note]]
    assert clean["verdict"] == "not proved"


def test_two_plans_of_one_name_are_told_apart(tmp_path: Path) -> None:
    plan = tmp_path / "mine.toml"
    plan.write_text(shardwise("plans", "rowwise").stdout)
    ended = shardwise("verify", "--static", "rowwise", str(plan), "--json")
    assert [each["plan"] for each in json.loads(ended.stdout)["verifications"]] == ["rowwise", "rowwise #2"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("rowise",), 'unknown plan "rowise". Did you mean "rowwise"?'),
        (("--model", "llama3-debg"), 'unknown model "llama3-debg". Did you mean "llama3-debug"?'),
        (
            ("unsharded",),
            'plan "unsharded" cuts nothing over tp=2, so there is nothing to verify. Name a plan that '
            "shards, or a mesh without tp.",
        ),
        (
            ("--mesh", "tp=1"),
            "--mesh tp=1: verify compares several ranks with one. Use a mesh of two ranks or more, such as "
            "tp=2 or fsdp=2,tp=2.",
        ),
        (
            ("--mesh", "dp=2,ep=2", "--batch", "6"),
            "--batch 6 can't be cut into 4 data-parallel parts of 1 micro-batches. Use a multiple of 4.",
        ),
        (
            ("--mesh", "dp=2", "--reduce-once"),
            "--reduce-once: is what FSDP does, and mesh dp=2,tp=1 has no fsdp ranks.",
        ),
        (
            ("--static", "--mesh", "fsdp=2"),
            "--mesh fsdp=2,tp=1: without ranks verify looks at what is cut over tp. Use --mesh tp=2 or more, "
            "or leave --static out.",
        ),
        (
            ("--seq", "15"),
            'plan "rowwise": rule "tok_embeddings" (rowwise) cuts the sequence, and 15 is no multiple of '
            "tp=2. Use a sequence that is a multiple of 2, or a plan without sequence parallelism.",
        ),
        (
            ("--static", "--mesh", "tp=16"),
            'plan "rowwise": rule "layers.*.attention.wq" (colwise) splits 12 heads',
        ),
        (("--size", "tiny"), '--size is "tiny". Allowed: auto, given, small.'),
        (
            ("--model", f"{MODELS}by_hand_right", "rowwise"),
            'plan "rowwise": rule "tok_embeddings" (rowwise) matched nothing',
        ),
    ],
)
def test_bad_input_is_told_in_a_line(given: tuple[str, ...], said: str) -> None:
    ended = shardwise("verify", *given)
    assert ended.returncode == 2
    assert said in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


@FULL  # compare shows it of the same launch
def test_ctrl_c_leaves_no_rank_behind(tmp_path: Path) -> None:
    process = start("verify", cwd=tmp_path)
    wait_until(lambda: len(ranks_of(process)) == 2 or process.poll() is not None)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert gone(ranks)


@FULL  # so are compare's
def test_torchrun_ranks_are_used_as_they_are_and_one_of_them_speaks() -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "shardwise",
        "verify",
    ]
    ended = subprocess.run(
        [*command, "rowwise", "colwise", "--size", "small", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = read_document(ended.stdout.encode(), VerificationRun)
    assert [(each.plan, each.verdict) for each in found.verifications] == [
        ("rowwise", Verdict.RIGHT),
        ("colwise", Verdict.RIGHT),
    ]


def test_the_page_is_seen_and_hostile_names_stay_text(browser: Browser, tmp_path: Path) -> None:
    seen = browser.visit(verification_html(run(RIGHT, WRONG, CRASH, SKIPPED, LITTLE)), tmp_path)
    assert (seen.console, seen.requests) == ((), ())
    seen = browser.visit(
        verification_html(
            run(RIGHT.__class__(HOSTILE, HOSTILE, 2, HOSTILE, 1, None, None, WRONG.findings, HOSTILE, 0.1))
        ),
        tmp_path,
    )
    elements = Elements(seen.dom)
    assert "img" not in elements.names
    assert elements.handlers == []
    assert seen.requests == ()


@FULL  # that it is right, others show
def test_a_teams_own_test_passes_for_a_right_plan() -> None:
    assert_plan_trains_right(f"{MODELS}by_hand_right", "own")


def test_a_teams_own_test_tells_why_a_wrong_plan_is_wrong() -> None:
    with pytest.raises(AssertionError) as raised:
        assert_plan_trains_right(f"{MODELS}by_hand_slope_averaged", "own")
    assert "Its gradient is 1/2 of the unsharded one: averaged, or parts that were not summed." in str(
        raised.value
    )
    with pytest.raises(InputError, match="Did you mean"):
        assert_plan_trains_right("llama3-debug", "rowise")
