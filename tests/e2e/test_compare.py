"""`shardwise compare` as a user meets it: what it prints, writes and returns, and how it ends when something
goes wrong."""

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from shardwise.core.measurement import Comparison
from shardwise.files.document import read_document
from tests.e2e.browser import Browser, Elements
from tests.e2e.command import (
    MODEL,
    PATIENCE_S,
    SMALL,
    forked_ranks,
    gone,
    ranks_of,
    shardwise,
    start,
    wait_for_rounds,
)
from tests.e2e.test_report_html import WHOLE_STEP_CHARTS
from tests.matrix import FULL

LONG = (
    "rowwise",
    "colwise",
    "--model",
    MODEL,
    "--seq",
    "64",
    "--batch",
    "2",
    "--rounds",
    "1000000",
    "--no-check",
    "--random-ids",
)
WRONG_PLAN = """\
name = "norms-not-reduced"
[rules]
"tok_embeddings" = "rowwise"
"layers.*.attention_norm" = "replicate"
"layers.*.attention" = { style = "gather_input", from = "shard(1)" }
"layers.*.attention.wq" = "colwise"
"layers.*.attention.wk" = "colwise"
"layers.*.attention.wv" = "colwise"
"layers.*.attention.wo" = { style = "rowwise", output = "shard(1)" }
"layers.*.ffn_norm" = "sequence_parallel"
"layers.*.feed_forward" = { style = "gather_input", from = "shard(1)" }
"layers.*.feed_forward.w1" = "colwise"
"layers.*.feed_forward.w3" = "colwise"
"layers.*.feed_forward.w2" = { style = "rowwise", output = "shard(1)" }
"norm" = "sequence_parallel"
"output" = { style = "colwise", input = "shard(1)", output = "shard(-1)" }
"""


FOUR_PLANS = ("rowwise", "colwise", "routed", "rowwise@dtensor")
WHOLE_SEQUENCES = ("colwise", "rowwise@dtensor", "--no-sequence-parallel", "--recompute", "full")
BFLOAT16 = ("--dtype", "bfloat16", "--random-ids", "--no-repeat")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Comparison]]:
    """Two whole runs at once in one folder: that, and what each gave by --json."""
    folder = tmp_path_factory.mktemp("both")
    other = start("compare", *SMALL, *WHOLE_SEQUENCES, *BFLOAT16, "--json", cwd=folder, warm=True)
    try:
        ended = shardwise("compare", *SMALL, *FOUR_PLANS, "--json", cwd=folder)
        written, said = other.communicate(timeout=2 * PATIENCE_S)
    finally:
        other.kill()
        other.wait()
    assert (ended.returncode, other.returncode) == (0, 0), (ended.stderr, said)
    return folder, [read_document(each.encode(), Comparison) for each in (ended.stdout, written)]


@pytest.fixture(scope="module")
def run(both: tuple[Path, list[Comparison]]) -> tuple[Path, Comparison]:
    """The run of four plans: its folder, and what --json gave."""
    folder, (comparison, _) = both
    (out,) = [each for each in (folder / "runs").iterdir() if "rowwise (again)" in logged(each)]
    return out, comparison


def logged(out: Path) -> str:
    return (out / "comparison.json").read_text()


def test_json_is_one_document_with_every_plan_and_the_noise(run: tuple[Path, Comparison]) -> None:
    out, comparison = run
    assert comparison.schema_version == 1
    labels = [measurement.label for measurement in comparison.measurements]
    assert labels == ["rowwise", "colwise", "routed", "rowwise@dtensor", "rowwise (again)"]
    assert comparison.measurements[-1].repeats == "rowwise"
    assert comparison.noise is not None
    assert read_document((out / "comparison.json").read_bytes(), Comparison) == comparison


def test_every_plan_was_checked_against_the_unsharded_model(run: tuple[Path, Comparison]) -> None:
    for measurement in run[1].measurements:
        assert measurement.agreement is not None
        assert measurement.agreement.agrees
        assert measurement.agreement.layers == 2
        assert measurement.agreement.parameters_compared == 21
        assert measurement.agreement.worst_gradient_error < 1e-10


def test_all_plans_train_the_same_model(run: tuple[Path, Comparison]) -> None:
    curves = [measurement.losses for measurement in run[1].measurements]
    assert all(len(curve) == 3 for curve in curves)
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)
    assert all(later != earlier for earlier, later in pairwise(curves[0]))


def test_memory_is_exact_and_shows_the_full_vocabulary_gradient_of_dtensor(
    run: tuple[Path, Comparison],
) -> None:
    by_label = {measurement.label: measurement.memory for measurement in run[1].measurements}
    vocab, hidden, layers, ffn, kv = 512, 96, 2, 256, 32
    sharded = 2 * vocab * hidden + layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn)
    expected = 4 * (sharded // 2 + hidden * (2 * layers + 1))
    for label in ("rowwise", "colwise", "routed"):
        assert by_label[label].parameter_bytes == by_label[label].gradient_bytes == expected
    table = 4 * vocab * hidden
    assert by_label["rowwise@dtensor"].gradient_bytes == expected + table // 2
    assert (
        by_label["rowwise"].optimizer_bytes - 2 * expected < 4096
    )  # AdamW's two moments, and a step count per parameter


def test_gloo_sends_what_the_formula_says_where_the_plan_avoids_its_reduce_scatter(
    run: tuple[Path, Comparison],
) -> None:
    by_label = {measurement.label: measurement for measurement in run[1].measurements}
    for label in ("rowwise", "colwise", "routed"):
        sent = by_label[label].sent_bytes
        if sent is None:
            pytest.skip("this system doesn't tell what a socket sent")
        assert sent == pytest.approx(by_label[label].wire_bytes, rel=0.05)
    dtensor = by_label["rowwise@dtensor"]
    assert dtensor.sent_bytes is not None
    assert dtensor.sent_bytes > 1.3 * dtensor.wire_bytes


def test_the_verdict_names_each_plan_and_warns_that_gloo_is_not_nccl(run: tuple[Path, Comparison]) -> None:
    text = "\n".join(run[1].verdict)
    for label in ("colwise", "routed", "rowwise@dtensor", "Noise floor"):
        assert label in text
    assert "need not hold on NCCL" in text


@FULL  # test_diff.py has that of a run with profiles
def test_the_written_report_draws_in_a_browser_and_asks_the_network_for_nothing(
    run: tuple[Path, Comparison], browser: Browser, tmp_path: Path
) -> None:
    seen = browser.visit((run[0] / "report.html").read_text(encoding="utf-8"), tmp_path)
    drawings = Elements(seen.dom).drawings
    assert set(drawings) == WHOLE_STEP_CHARTS
    assert all(drawings.values())
    assert [address for address in seen.requests if not address.startswith(("file:", "data:", "blob:"))] == []


def test_a_plan_that_trains_another_model_is_an_answer_of_no(tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text(WRONG_PLAN)
    ended = shardwise("compare", "rowwise", "wrong.toml", *SMALL, "--out", "run", cwd=tmp_path)
    assert ended.returncode == 1, ended.stderr
    assert (
        'norms-not-reduced: layers.0.attention_norm.weight, rule "layers.*.attention_norm" (replicate): '
        "each of 2 ranks computes a part of its gradient, and nothing sums them (relative error"
        in ended.stdout
    )
    assert "Nothing was timed." in ended.stdout
    assert "ffn_norm" not in ended.stdout


MIXED = ("--param-dtype", "bfloat16", "--reduce-dtype", "float32")


def assert_every_plan_agrees(comparison: Comparison) -> None:
    assert all(m.agreement is not None and m.agreement.agrees for m in comparison.measurements)
    assert all(len(m.step_s) == 2 for m in comparison.measurements)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(  # on fsdp and tp too; mixed precision: test_meshes.py
            ("rowwise", "rowwise@dtensor", "--mesh", "fsdp=2,tp=2", *MIXED, "--recompute", "selective-ops"),
            marks=FULL,
        ),
        pytest.param(  # also in test_one_proof.py
            ("routed", "rowwise@dtensor", "--mesh", "dp=2,tp=2", "--batch", "4", "--accumulation", "2"),
            marks=FULL,
        ),
        ("routed-interleaved", "replicated", "--module", "layers.1.feed_forward"),
    ],
    ids=["fsdp-mixed-selective", "dp-accumulation", "module"],
)
def test_the_options_of_a_step_work_together_and_every_plan_agrees(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    ended = shardwise("compare", *SMALL, *options, "--json", "--no-repeat", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    comparison = read_document(ended.stdout.encode(), Comparison)
    assert_every_plan_agrees(comparison)
    if "--param-dtype" in options:
        assert comparison.settings.precision == "float32, computed in bfloat16, reduced in float32"
    if "--module" in options:
        assert comparison.module == "layers.1.feed_forward"
        assert all(
            m.module_times is not None and max(m.step_s) <= max(m.module_times.total_s)
            for m in comparison.measurements
        )


def test_whole_sequences_recomputed_in_bfloat16_on_random_ids_agree(
    both: tuple[Path, list[Comparison]],
) -> None:
    _, (_, comparison) = both
    assert_every_plan_agrees(comparison)
    assert comparison.settings.precision == "bfloat16"
    assert comparison.settings.recompute == "full"


def test_a_config_file_gives_the_options_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        f'model = "{MODEL}"\nplans = ["colwise"]\nmesh = "tp=1"\nseq = 16\nbatch = 1\nrounds = 1\nwarmup = '
        "0\nrepeat = false\n"
    )
    ended = shardwise("compare", "--config", "mine.toml", "--rounds", "2", "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    comparison = read_document(ended.stdout.encode(), Comparison)
    assert (comparison.mesh, comparison.settings.seq, comparison.rounds) == ("tp=1", 16, 2)
    assert [m.label for m in comparison.measurements] == ["colwise"]


@FULL  # that torchrun's ranks are joined, and that one of them has the answer: test_launch.py
def test_torchrun_ranks_are_used_as_they_are_and_one_of_them_speaks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "shardwise"]
    ended = subprocess.run(
        [*command, "compare", "rowwise", "colwise", *SMALL, "--json", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert len(read_document(ended.stdout.encode(), Comparison).measurements) == 3


REFUSED = [
    (
        ("rowise",),
        'unknown plan "rowise". Did you mean "rowwise"? Known: rowwise, colwise, routed, '
        "routed-interleaved, replicated, "
        "rowwise@dtensor, colwise@dtensor; or the path of a .toml file.",
    ),
    (
        ("--model", "lama3-8b"),
        'unknown model "lama3-8b". Did you mean "llama3-8b"? Known: llama3-debug, llama3-8b, llama3-70b, '
        "llama3.1-405b, gpt-debug, gpt3-1.3b, "
        "gpt3-6.7b, gpt3-175b, moe-debug, mixtral-8x7b, qwen3-30b-a3b, megatron-22b; NAME?KEY=VALUE,...; "
        "or hf:TYPE, hf:PATH of a config.json, automodel:..., titan:..., or "
        "package.module:factory.",
    ),
    (
        ("--bacth", "3"),
        "No such option: --bacth (Possible options: --batch, --machine). Try: shardwise compare --help.",
    ),
    (("--mesh", "tp2"), 'mesh: can\'t read "tp2" in "tp2". Write NAME=SIZE, such as dp=2,tp=4.'),
    (("--mesh", "tp=2,xp=2"), 'mesh: unknown axis "xp". Allowed axes: pp, dp, fsdp, cp, ep, tp.'),
    (
        ("rowwise", "--mesh", "pp=8,tp=1", "--batch", "8"),
        "pp=8: llama3-debug has 6 layers, and can't be cut into 8 stages. Use at most pp=6.",
    ),
    (
        ("rowwise", "--seq", "33"),
        'plan "rowwise": rule "tok_embeddings" (rowwise) cuts the sequence, and 33 is no multiple of '
        "tp=2. "
        "Use a sequence that is a multiple of 2, or a plan without sequence parallelism.",
    ),
    (
        ("rowwise", "--mesh", "tp=8"),
        'plan "rowwise": rule "layers.*.attention.wq" (colwise) splits 12 heads of layers.0.attention over '
        "tp=8. "
        "Use tp in {1, 2, 3, 4, 6, 12}.",
    ),
    (
        ("rowwise", "--mesh", "tp=3", "--seq", "48"),
        'plan "rowwise": rule "layers.*.attention.wk" (colwise) splits 4 KV heads '
        "of "
        "layers.0.attention over tp=3. Use tp in {1, 2, 4}.",
    ),
    (
        ("routed", "--no-sequence-parallel"),
        'plan "routed" isn\'t offered without sequence parallelism: without it every rank needs every '
        "row. "
        "Use rowwise, colwise or replicated.",
    ),
    (
        ("--dtype", "float16"),
        '--dtype is "float16". Did you mean "bfloat16"? Allowed: float32, bfloat16, float64.',
    ),
    (("--recompute", "some"), '--recompute is "some". Allowed: none, selective-ops, full.'),
    (
        ("--batch", "3", "--mesh", "dp=2,tp=1"),
        "--batch 3 can't be cut into 2 data-parallel parts of 1 micro-batches. Use a multiple of 2.",
    ),
    (
        ("--batch", "x"),
        "Invalid value for '--batch': Input should be a valid integer, unable to parse string as an "
        "integer. Try: shardwise compare --help.",
    ),
    (
        ("--module", "tok_embedding"),
        '--module: llama3-debug has no module "tok_embedding". Did you mean '
        '"tok_embeddings"? '
        "It has tok_embeddings, layers, layers.0, norm, output, ...",
    ),
    (
        ("--config", "no.toml"),
        "--config no.toml: No such file or directory. Give a TOML file, or one of those shipped: "
        "llama3_8b_tp8.",
    ),
    (
        ("no-plan.toml",),
        "plan file no-plan.toml: No such file or directory. Give the path of a TOML file, or a built-in "
        "plan's name.",
    ),
    (
        ("broken.toml",),
        "broken.toml: not valid TOML: Expected '=' after a key in a key/value pair (at line 1, column 6).",
    ),
    (
        ("typo.toml",),
        'plan "typo": rule "layers.*.atention.wq" (colwise) matched nothing; did you mean '
        '"layers.*.attention.wq"?',
    ),
    (
        ("--config", "bad.toml"),
        '--config bad.toml: unknown key "batsh". Did you mean "batch"? Allowed: accumulation, batch, '
        "check, chunks, context_attention, device, documents, dtype, end_token, expert_load, "
        "format, json, learning_rate, machine, max_norm, mesh, model, module, optimizer_kernel, out, "
        "param_dtype, plans, "
        "profile, profile_steps, random_ids, recompute, recompute_layers, reduce_dtype, reduce_once, "
        "repeat, reshard_after_forward, rounds, schedule, seed, seq, "
        "sequence_parallel, stages, text, text_key, timeout, tokenizer, warmup.",
    ),
    (
        ("--param-dtype", "bfloat16"),
        "--param-dtype bfloat16: is FSDP's mixed precision, and mesh tp=2 has no fsdp ranks. Add fsdp=2 or "
        "more, or use --dtype.",
    ),
    (("--learning-rate", "-1"), "--learning-rate is -1.0. Use a number above 0."),
    (
        ("--text", "nowhere.txt"),
        'text file "nowhere.txt" doesn\'t exist. Give UTF-8 text files, or directories of them.',
    ),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "broken.toml").write_text("name shardwise\n")
    (folder / "typo.toml").write_text('name = "typo"\n[rules]\n"layers.*.atention.wq" = "colwise"\n')
    (folder / "bad.toml").write_text("batsh = 3\n")
    return folder


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_a_mistake_gets_one_clear_line_and_exit_code_2(
    options: tuple[str, ...], message: str, bad_files: Path
) -> None:
    ended = shardwise("compare", *options, cwd=bad_files)
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("shardwise: reading text")]
    assert lines == [f"shardwise: {message}"]
    assert ended.returncode == 2
    assert ended.stdout == ""


@FULL  # what is said and that nothing is left: test_launch.py
def test_a_killed_rank_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    parent = start("compare", *LONG, "--out", "run", cwd=tmp_path)
    wait_for_rounds(tmp_path / "run", parent)
    ranks = ranks_of(parent)
    assert len(ranks) == 2
    ranks[1].kill()
    _, stderr = parent.communicate(timeout=PATIENCE_S)
    assert parent.returncode == 3
    assert stderr.splitlines()[-1].startswith("shardwise: rank 1 was killed by SIGKILL (signal 9) during")
    assert gone(ranks)


@FULL  # what the command says: test_diff.py; that no rank is left: test_launch.py
def test_ctrl_c_ends_all_ranks(tmp_path: Path) -> None:
    parent = start("compare", *LONG, "--out", "run", cwd=tmp_path, warm=True)
    wait_for_rounds(tmp_path / "run", parent)
    ranks = ranks_of(parent)
    parent.send_signal(signal.SIGINT)
    try:
        _, stderr = parent.communicate(timeout=PATIENCE_S)
    finally:
        parent.kill()
        parent.wait()
    assert parent.returncode == 130
    assert stderr.splitlines()[-1] == "shardwise: stopped by Ctrl-C; no rank was left behind."
    assert len(ranks) == 2
    assert gone(ranks)


def test_a_full_disk_for_the_run_folder_ends_the_run_at_once(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("THE FULL DISK WAS NOT TESTED: this system has no /dev/full")
    out = tmp_path / "run"
    out.mkdir()
    (out / "events.jsonl").symlink_to("/dev/full")
    ended = shardwise("compare", *LONG, "--mesh", "tp=1", "--out", "run", cwd=tmp_path)
    assert ended.returncode == 3
    assert ended.stderr.splitlines()[-1] == (
        "shardwise: can't write run/events.jsonl: No space left on device. All ranks were stopped. "
        "Free space there, or choose another folder with --out."
    )
    assert forked_ranks() == []


def test_two_compares_at_once_leave_each_other_alone(both: tuple[Path, list[Comparison]]) -> None:
    folder, comparisons = both
    labels = [[measurement.label for measurement in each.measurements] for each in comparisons]
    whole = [f"{plan} (no sequence parallelism)" for plan in WHOLE_SEQUENCES[:2]]
    assert labels == [[*FOUR_PLANS, "rowwise (again)"], whole]
    assert len(list((folder / "runs").iterdir())) == 2


def test_a_folder_that_holds_a_run_is_not_written_over(run: tuple[Path, Comparison]) -> None:
    before = (run[0] / "comparison.json").read_bytes()
    ended = shardwise("compare", "rowwise", *SMALL, "--out", str(run[0]))
    assert ended.returncode == 2
    assert f"--out {run[0]}: holds a run already. Choose another folder, or remove it." in ended.stderr
    assert (run[0] / "comparison.json").read_bytes() == before


def test_help_shows_examples() -> None:
    ended = shardwise("compare", "--help")
    assert ended.returncode == 0
    assert "shardwise compare rowwise colwise --mesh tp=4" in ended.stdout


def test_a_printed_plan_is_a_plan_file(tmp_path: Path) -> None:
    printed = shardwise("plans", "colwise")
    (tmp_path / "mine.toml").write_text(printed.stdout)
    ended = shardwise("compare", "mine.toml", "--seq", "33", cwd=tmp_path)
    assert 'plan "colwise": rule "tok_embeddings" (colwise) cuts the sequence' in ended.stderr
