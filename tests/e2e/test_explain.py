"""`shardwise explain` as a user meets it: what it prints, writes and returns, and what it says to a
mistake."""

import json
import os
from pathlib import Path

import pytest

from tests.e2e.browser import Browser
from tests.e2e.command import shardwise, shardwise_process
from tests.matrix import FULL

SMALL = ("--model", "llama3-debug?n_layers=2", "--mesh", "tp=2", "--seq", "32")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two plans side by side, with a folder: the folder, and what was printed."""
    out = tmp_path_factory.mktemp("explain") / "page"
    ended = shardwise("explain", "rowwise@dtensor", "--against", "rowwise", *SMALL, "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    return out, ended.stdout


def test_two_plans_are_put_side_by_side_with_what_one_has_and_the_other_has_not(
    run: tuple[Path, str],
) -> None:
    _, printed = run
    assert "rowwise@dtensor" in printed
    assert "its gradient is Replicate [32000, 384], 2 times its shard" in " ".join(
        printed.replace("│", " ").split()
    )


def test_the_folder_holds_the_page_the_walk_through_and_the_data(run: tuple[Path, str]) -> None:
    out, printed = run
    assert sorted(path.name for path in out.iterdir()) == [
        "against.txt",
        "explain.html",
        "explain.md",
        "explanation.json",
        "program.txt",
        "settings.json",
        "tables",
        "walkthrough.html",
    ]
    assert (
        (out / "program.txt")
        .read_text()
        .splitlines()[0]
        .endswith("under rowwise@dtensor (dtensor), mesh tp=2, rank 0, cuda")
    )
    assert json.loads((out / "explanation.json").read_bytes())["schema_version"] == 1
    assert json.loads((out / "settings.json").read_bytes())["plans"] == ["rowwise@dtensor", "rowwise"]
    assert printed.rstrip().endswith(f"Page: {out}/explain.html")


def test_the_page_opens_in_a_browser_and_loads_nothing(
    run: tuple[Path, str], browser: Browser, tmp_path: Path
) -> None:
    seen = browser.visit((run[0] / "explain.html").read_text(), tmp_path)
    assert "rowwise@dtensor" in seen.dom
    assert (seen.console, seen.requests) == ((), ())


def test_a_gpt_is_explained_at_another_size_and_at_the_sequence_that_it_has_positions_for() -> None:
    ended = shardwise("explain", "--model", "gpt3-175b?n_layers=2,hidden=1024", "--json")
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert (document["model"], document["settings"]["seq"]) == ("gpt3-175b?n_layers=2,hidden=1024", 2048)
    assert {rule["pattern"] for rule in document["rules"]} >= {"pos_embeddings", "layers.*.attention.wqkv"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--model", "gpt-debug?layers=4"),
            'model "gpt-debug?layers=4": gpt-debug has no "layers". Did you mean "n_layers"? Known: '
            "vocab_size, hidden, n_layers, n_heads, "
            "ffn_hidden, max_seq, norm_eps, tied.",
        ),
        (
            ("--model", "gpt-debug?tied=false", "--seq", "1032"),
            "--seq 1032: gpt-debug?tied=false has positions for 1024. Use --seq 1024, or --model "
            '"gpt-debug?tied=false,max_seq=1032".',
        ),
    ],
)
@pytest.mark.parametrize("command", ["explain", "verify", "compare"])
def test_a_size_that_a_model_can_t_have_is_one_line(
    command: str, options: tuple[str, ...], message: str
) -> None:
    ended = shardwise(command, *options)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1] == f"shardwise: {message}"


def test_json_is_one_document(tmp_path: Path) -> None:
    ended = shardwise("explain", "routed", *SMALL, "--random-ids", "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert document["plan"] == "routed"
    (sent,) = [
        g for g in document["collectives"] if g["module"] == "tok_embeddings" and g["phase"] == "forward"
    ]
    assert sent["by_data"]["max_bytes"] >= sent["by_data"]["mean_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_walk_through_shows_the_zero_rows_in_the_terminal() -> None:
    ended = shardwise("explain", "rowwise", "--walk", "tok_embeddings")
    assert ended.returncode == 0, ended.stderr
    assert "zero" in ended.stdout
    assert "reduce-scatter" in ended.stdout


def test_a_factory_of_the_user_s_is_explained_unsharded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, "
        "8), nn.GELU(), nn.Linear(8, 50))\n"
    )
    ended = shardwise(
        "explain",
        "unsharded",
        "--model",
        "mine:build",
        "--mesh",
        "tp=1",
        "--seq",
        "16",
        "--json",
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["parameters"] == 50 * 8 + 8 * 8 + 8 + 8 * 50 + 50


def test_a_hostile_config_harms_nothing(tmp_path: Path) -> None:
    """Names that would end a script, or drive a terminal, come through as text or in one line."""
    folder = tmp_path / "<script>alert(1)<"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "num_hidden_layers": 2,
                "hidden_size": 64,
                "intermediate_size": 64,
                "vocab_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "architectures": ["</script><script>alert(2)</script>"],
            }
        )
    )
    out = tmp_path / "out"
    ended = shardwise("explain", *SMALL, "--model", f"hf:./{folder.name}", "--out", str(out), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    page = (out / "explain.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_config_that_is_ten_megabytes_long_or_nested_without_end_is_refused_in_one_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "long.json").write_text(json.dumps({"model_type": "x" * 10_000_000}))
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for name in ("long.json", "deep.json"):
        ended = shardwise("explain", "--model", f"hf:{name}", cwd=tmp_path)
        assert ended.returncode == 2
        assert len(ended.stderr.splitlines()) == 1
        assert len(ended.stderr) < 400


REFUSED = [
    (("rowise",), 'unknown plan "rowise". Did you mean "rowwise"?'),
    (("--device", "tpu"), '--device is "tpu". Did you mean "cpu"? Allowed: cuda, cpu.'),
    (("--dtype", "float8"), '--dtype is "float8".'),
    (
        ("--mesh", "tp=3", "--seq", "12"),
        'plan "rowwise": rule "layers.*.attention.wk" (colwise) splits 4 KV heads of layers.0.attention '
        "over tp=3. Use tp in {1, 2, 4}.",
    ),
    (
        ("--mesh", "tp=4", "--seq", "33"),
        'plan "rowwise": rule "tok_embeddings" (rowwise) cuts the sequence, and 33 is no multiple of tp=4.',
    ),
    (
        ("--mesh", "dp=2,tp=2", "--batch", "3"),
        "--batch 3 can't be cut into 2 data-parallel parts of 1 micro-batches. Use a multiple of 2.",
    ),
    (("--mesh", "tp=2", "--rank", "2"), "rank 2 is not on mesh tp=2. Use 0 to 1."),
    (
        ("unsharded", "--mesh", "tp=2"),
        'plan "unsharded" shards nothing, and mesh tp=2 has a tp axis. Use tp=1, or another plan.',
    ),
    (("hf", "--mesh", "tp=2"), 'plan "hf": Llama is no Hugging Face model.'),
    (
        ("own", "--mesh", "tp=2"),
        'plan "own": llama3-debug doesn\'t shard itself. It is for package.module:factory where the '
        "factory takes a mesh.",
    ),
    (("--model", "hf:qwen33"), 'model "hf:qwen33":'),
    (("--model", "no.such:thing"), 'model "no.such:thing": no module "no"'),
    (
        ("--walk", "tok_embedings"),
        '--walk: llama3-debug has no module "tok_embedings". Did you mean "tok_embeddings"?',
    ),
    (
        ("--walk", "layers.0.attention"),
        "--walk: layers.0.attention, a Attention under gather_input, has no walk-through.",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_a_mistake_gets_one_clear_line_and_exit_code_2(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    ended = shardwise("explain", "--model", "llama3-debug", *options, cwd=tmp_path)
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("shardwise: building")]
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith(f"shardwise: {message}")
    assert ended.returncode == 2
    assert ended.stdout == ""


def test_a_folder_that_can_t_be_written_is_said(tmp_path: Path) -> None:
    if os.geteuid() == 0 and not Path("/dev/full").exists():
        pytest.skip("THE FULL DISK WAS NOT TESTED: this system has no /dev/full")
    out = tmp_path / "out"
    out.mkdir()
    (out / "explanation.json").symlink_to("/dev/full")
    ended = shardwise("explain", *SMALL, "--out", str(out))
    assert ended.returncode == 3
    assert ended.stderr.splitlines()[-1] == (
        f"shardwise: can't write {out}/explanation.json: No space left on device. Free space there, or "
        "choose another folder with --out."
    )


def test_help_shows_examples() -> None:
    ended = shardwise("explain", "--help")
    assert ended.returncode == 0
    assert "shardwise explain rowwise@dtensor --against rowwise" in ended.stdout


@FULL  # with --json: test_installed.py
def test_only_our_own_lines_are_on_the_terminal(tmp_path: Path) -> None:
    """DTensor would warn of the two all-reduces that clipping takes on two axes."""
    ended = shardwise_process(
        *("explain", "rowwise@dtensor", "--model", "llama3-debug?n_layers=1", "--seq", "32"),
        *("--mesh", "fsdp=2,tp=2", "--batch", "2"),
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr
    assert all(line.startswith("shardwise: ") for line in ended.stderr.splitlines())
