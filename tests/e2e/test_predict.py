"""`shardwise predict` and `shardwise machines` as a user meets them: what they print, write and return, and
what they say to a mistake."""

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.command import PATIENCE_S, children_of, gone, shardwise, start, wait_until
from tests.matrix import FULL

SMALL = ("--model", "llama3-debug?n_layers=2", "--mesh", "tp=2", "--seq", "32")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two plans side by side, with a folder: the folder, and what was printed."""
    out = tmp_path_factory.mktemp("predict") / "page"
    ended = shardwise("predict", "rowwise", "colwise", *SMALL, "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    return out, ended.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "p.json"
    ended = shardwise(
        "predict",
        "--model",
        "llama3-debug",
        "--mesh",
        "fsdp=2,tp=2",
        "--seq",
        "32",
        "--save-program",
        str(path),
    )
    assert ended.returncode == 0, ended.stderr
    return path


def test_plans_are_put_side_by_side(run: tuple[Path, str]) -> None:
    _, printed = run
    words = " ".join(printed.split())
    assert "2 plans" in words
    assert "waiting for launches" in words
    assert "waiting for late ranks" in words
    assert "h100-sxm-80gb" in words


def test_the_folder_holds_the_page_the_data_and_the_steps_for_perfetto(run: tuple[Path, str]) -> None:
    out, printed = run
    files = ["case.toml", "predict.html", "predict.md", "prediction.json", "settings.json", "tables"]
    files += ["step-a.json", "step-b.json", "timeline-a.json.gz", "timeline-b.json.gz"]
    assert sorted(path.name for path in out.iterdir()) == sorted(files)
    document = json.loads((out / "prediction.json").read_bytes())
    assert [prediction["plan"] for prediction in document["predictions"]] == ["rowwise", "colwise"]
    for prediction in document["predictions"]:
        assert sum(seconds for _, seconds in prediction["terms"]) == pytest.approx(prediction["step_s"])
    assert json.loads(gzip.decompress((out / "timeline-a.json.gz").read_bytes()))["traceEvents"]
    assert f"Page: {out}/predict.html" in printed


def test_the_case_that_predict_wrote_gives_the_same_numbers(tmp_path: Path) -> None:
    asked = (
        "--model",
        "llama3-debug?n_layers=2",
        "--mesh",
        "tp=2",
        "--seq",
        "32",
        "--recompute",
        "selective",
    )
    own = ("--compiled", "--overlap-tensor", "--spread", "0.02", "--without", "launch", "--filled", "whole")
    found: list[object] = []
    for more in ((*asked, *own, "--attention", "unfused"), ("--config", str(tmp_path / "one" / "case.toml"))):
        out = tmp_path / ("two" if found else "one")
        ended = shardwise("predict", *more, "--out", str(out), "--json")
        assert ended.returncode == 0, ended.stderr
        found.append(json.loads(ended.stdout)["predictions"])
    assert found[0] == found[1]
    assert (tmp_path / "one" / "case.toml").read_text() == (tmp_path / "two" / "case.toml").read_text()


def test_mixed_precision_and_context_ranks_are_one_step(tmp_path: Path) -> None:
    options = (
        "--mesh fsdp=1,cp=2,tp=2 --param-dtype bfloat16 --reduce-dtype float32 "
        "--recompute selective-ops --compiled-loss --json"
    )
    ended = shardwise("predict", "--model", "llama3-debug", "--seq", "64", *options.split(), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    (prediction,) = document["predictions"]
    assert (prediction["devices"], prediction["tokens"], dict(prediction["axes"])) == (
        4,
        64,
        {"fsdp": 1, "cp": 2, "tp": 2},
    )
    assert prediction["setup"]["compiled_loss"]
    assert dict(prediction["terms"])["data-parallel communication"] > 0


def test_json_is_one_document(tmp_path: Path) -> None:
    ended = shardwise(
        "predict", *SMALL, "--json", "--without", "launch,tensor", "--without", "data", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    (prediction,) = json.loads(ended.stdout)["predictions"]
    off = ["tensor-parallel communication", "data-parallel communication", "waiting for launches"]
    assert prediction["setup"]["without"] == off
    assert all(dict(prediction["terms"])[term] == 0 for term in off)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_does_not_fit_is_an_answer_of_no() -> None:
    ended = shardwise(
        "predict", "--model", "llama3-70b", "--mesh", "tp=2", "--seq", "128", "--dtype", "bfloat16", "--json"
    )
    assert ended.returncode == 1, ended.stderr
    document = json.loads(ended.stdout)
    assert document["fits"] is False


def test_a_saved_program_is_predicted_at_other_sizes_without_torch(saved: Path) -> None:
    code = (
        "import sys, contextlib; from shardwise.cli.main import _run; "
        f"code = _run(['predict', '--program', {str(saved)!r}, '--mesh', 'pp=2,fsdp=512,tp=2', "
        "'--accumulation', '4', '--json']); "
        "print(code, 'torch' in sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr == "0 False\n"
    document = json.loads(ended.stdout)
    (prediction,) = document["predictions"]
    assert (prediction["devices"], prediction["tokens"]) == (2048, 512 * 4 * 32)
    assert document["settings"]["batch"] == 2048


def test_a_saved_program_is_predicted_as_the_traced_one(saved: Path) -> None:
    traced = shardwise(
        "predict", "--model", "llama3-debug", "--mesh", "fsdp=64,tp=2", "--seq", "32", "--json"
    )
    again = shardwise("predict", "--program", str(saved), "--mesh", "fsdp=64,tp=2", "--json")
    assert json.loads(traced.stdout) == json.loads(again.stdout)


def test_a_pipeline_s_stages_are_in_a_trace_of_their_own(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = shardwise(
        "predict",
        "--program",
        str(saved),
        "--mesh",
        "pp=3,fsdp=2,tp=2",
        "--accumulation",
        "6",
        "--out",
        str(out),
    )
    assert ended.returncode == 0, ended.stderr
    assert "pipeline bubble" in ended.stdout
    events = json.loads(gzip.decompress((out / "stages-a.json.gz").read_bytes()))["traceEvents"]
    spans = [event["name"] for event in events if event["ph"] == "X"]
    assert sum(name != "bubble" for name in spans) == 3 * 6 * 2
    assert spans.count("bubble") >= 3


def test_a_sweep_finds_every_mesh_and_says_what_it_left_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = (
        "--devices",
        "4",
        "--micro-batches",
        "1,2",
        "--model",
        "llama3-debug?n_layers=2",
        "--seq",
        "32",
    )
    ended = shardwise("predict", "--sweep", *options, "--json", "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    found = {(tuple(map(tuple, point["axes"])), point["micro_batch"]) for point in document["points"]}
    assert ((("pp", 2), ("fsdp", 2), ("tp", 1)), 2) in found
    assert ((("tp", 4),), 1) in found
    assert len(found) == len(document["points"])
    assert [refusal["reason"] for refusal in document["refused"]] == [
        "pp=4: llama3-debug?n_layers=2 has 2 layers, and can't be cut into 4 stages. Use at most pp=2."
    ]
    rates = [point["tokens_per_s_per_device"] for point in document["points"]]
    assert rates == sorted(rates, reverse=True)
    assert (out / "sweep.html").exists()


@FULL  # of as many processes diff shows it
def test_ctrl_c_leaves_no_process_of_a_sweep(tmp_path: Path) -> None:
    running = start(
        "predict", "--sweep", "--devices", "8", "--model", "llama3-debug", "--seq", "32", cwd=tmp_path
    )
    wait_until(lambda: len(children_of(running)) >= 2 or running.poll() is not None)
    children = children_of(running)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130, errors
    assert "Traceback" not in errors
    assert gone(children)


def test_diff_reads_the_steps_that_predict_wrote(run: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = run
    ended = shardwise("diff", str(out / "timeline-a.json.gz"), str(out / "timeline-b.json.gz"), "--json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    predicted = json.loads((out / "prediction.json").read_text())["predictions"]
    for side, prediction in zip(("first", "second"), predicted, strict=True):
        assert found[side]["losses"] == []
        # a profile's step begins with its first work, a predicted one with the host that issues it
        assert found[side]["step_ns"] * 1e-9 == pytest.approx(prediction["step_s"], rel=0.01)
    assert shardwise("diff", str(out), "--json").stdout == ended.stdout
    for name in ("settings.json", "prediction.json", "timeline-a.json.gz"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    assert shardwise("diff", str(tmp_path)).returncode == 0


REFUSED = [
    (("rowise",), 'unknown plan "rowise". Did you mean "rowwise"?'),
    (("--machine", "h100"), 'unknown machine "h100". Did you mean "h100-sxm-80gb"?'),
    (("--machine", "no.toml"), "machine file no.toml: No such file or directory."),
    (
        ("--without", "tensor,lunch"),
        '--without: unknown term "lunch". Did you mean "launch"? Allowed: matmul,',
    ),
    (
        ("--without", "matmul,attention,kernels,embedding,optimizer,tensor,data,slowed,launch,bubble"),
        "--without: nothing is left of the step.",
    ),
    (
        ("--mesh", "dp=2,tp=2", "--batch", "6", "--accumulation", "2"),
        "--batch 6 can't be cut into 2 data-parallel parts of 2 micro-batches. Use a multiple of 4.",
    ),
    (("--seq", "33", "--mesh", "cp=2"), "--seq 33 can't be cut into 4 chunks, two for each of 2 ranks"),
    (
        ("--mesh", "pp=7,tp=1"),
        "pp=7: llama3-debug has 6 layers, and can't be cut into 7 stages. Use at most pp=6.",
    ),
    (("--stages", "2,x"), '--stages is "2,x". Use even, balanced, or a count of layers for each stage'),
    (("--context", "2"), "context ranks are an axis of the mesh."),
    (("--chunks", "2"), "--chunks 2: chunks of layers are of a pipeline's stages."),
    (("--attention", "x"), '--attention is "x". Allowed: fused, unfused, flash-1, flash-2.'),
    (("--matmul-dtype", "float4"), '--matmul-dtype is "float4". Did you mean "float8"?'),
    (("--recompute", "ful"), '--recompute is "ful". Did you mean "full"?'),
    (("--precision", "mixed"), '--precision is "mixed".'),
    (
        ("--mesh", "fsdp=1,tp=2", "--param-dtype", "bfloat16"),
        "--param-dtype bfloat16: is FSDP's mixed precision, and mesh fsdp=1,tp=2 has no fsdp ranks.",
    ),
    (("--sweep", "--reduce-dtype", "float8"), '--reduce-dtype is "float8". Did you mean'),
    (("--devices", "8"), "--devices: it is a sweep's. Add --sweep, or leave it out."),
    (
        ("--sweep", "--mesh", "tp=2"),
        "--mesh tp=2: a sweep goes over all axes but cp and ep. Give these alone, or none.",
    ),
    (
        ("--sweep", "--micro-batches", "1,0"),
        '--micro-batches is "1,0". Write sizes with commas between, such as 1,2,4.',
    ),
    (("--sweep", "rowise", "--devices", "2"), 'unknown plan "rowise". Did you mean "rowwise"?'),
    (("--program", "no.json"), "--program no.json: No such file or directory."),
    (("rowwise", "--program", "no.json"), "plans: a saved program has its own."),
    (
        ("rowwise", "colwise", "--save-program", "p.json"),
        "--save-program p.json: is one program's, and 2 plans are given.",
    ),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=[" ".join(options)[:50] for options, _ in REFUSED]
)
def test_a_mistake_gets_one_clear_line_and_exit_code_2(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    common = (
        ()
        if "--program" in options
        else ("--model", "llama3-debug", *(() if "--seq" in options else ("--seq", "32")))
    )
    mesh = () if {"--mesh", "--sweep", "--program"} & set(options) else ("--mesh", "tp=2")
    ended = shardwise("predict", *common, *mesh, *options, cwd=tmp_path)
    lines = [
        line
        for line in ended.stderr.splitlines()
        if not line.startswith(("shardwise: building", "shardwise: tracing", "shardwise: putting"))
    ]
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith(f"shardwise: {message}")
    assert ended.returncode == 2
    assert ended.stdout == ""


def test_a_machine_is_printed_as_the_file_that_makes_it(tmp_path: Path) -> None:
    shown = shardwise("machines", "--show", "h100-sxm-80gb")
    assert shown.returncode == 0
    (tmp_path / "mine.toml").write_text(shown.stdout.replace('name = "h100-sxm-80gb"', 'name = "mine"'))
    ended = shardwise("predict", *SMALL, "--machine", "mine.toml", "--json", cwd=tmp_path)
    assert json.loads(ended.stdout)["machine"]["name"] == "mine"
    names = [machine["name"] for machine in json.loads(shardwise("machines", "--json").stdout)["machines"]]
    assert "h100-sxm-80gb" in names
    assert all(name in shardwise("machines").stdout for name in names)


def test_help_shows_examples() -> None:
    ended = shardwise("predict", "--help")
    assert ended.returncode == 0
    assert "shardwise predict --sweep --devices 64" in ended.stdout
