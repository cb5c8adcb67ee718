"""`shardwise diff` and `compare --profile` as a user meets them: what they print, write and return; the page
in a real headless Chromium."""

import gzip
import json
import os
import signal
from pathlib import Path

import pytest

from shardwise.core.beside import Beside
from shardwise.core.measurement import Comparison
from shardwise.core.prediction import Term
from shardwise.files.document import read_document
from shardwise.predict.machines import machine_text
from tests.e2e.browser import Browser, Elements, driven, seen_by
from tests.e2e.command import MODEL, PATIENCE_S, SMALL, children_of, gone, shardwise, start, wait_until
from tests.unit.chrome_trace import all_reduce, kernel, write
from tests.unit.test_profile_diff import HOSTILE, hostile


def folder(path: Path, *, late_us: int) -> Path:
    """Traces of two ranks, of which rank 1 comes late."""
    path.mkdir()
    for rank in (0, 1):
        begin = 100 + late_us * rank
        write(
            path / f"rank{rank}.json",
            [kernel("gemm", 0, begin), all_reduce(begin, 150 + late_us - begin)],
            rank=rank,
        )
    return path


@pytest.fixture
def both(tmp_path: Path) -> tuple[str, str]:
    return str(folder(tmp_path / "before", late_us=0)), str(folder(tmp_path / "after", late_us=700))


def test_two_runs_are_put_side_by_side_on_the_terminal(both: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "page"
    ended = shardwise("diff", *both, "--out", str(out))
    assert ended.returncode == 0, ended.stderr
    assert "after is slower: 0.85 ms a step against 0.15 ms of before" in " ".join(
        ended.stdout.replace("│", " ").split()
    )
    assert f"Page: {out}/diff.html" in ended.stdout
    assert sorted(each.name for each in out.iterdir()) == [
        "aligned-a.json.gz",
        "aligned-b.json.gz",
        "diff.html",
        "diff.json",
        "diff.md",
        "settings.json",
        "tables",
    ]
    assert json.loads((out / "diff.json").read_text())["second"]["label"] == "after"
    assert json.loads(gzip.decompress((out / "aligned-b.json.gz").read_bytes()))["traceEvents"]


def test_json_is_one_document_on_stdout(both: tuple[str, str]) -> None:
    found = json.loads(shardwise("diff", *both, "--json", "--labels", "old, new").stdout)
    assert found["schema_version"] == 1
    assert (found["first"]["label"], found["second"]["label"]) == ("old", "new")
    assert found["second"]["collectives"][0]["late"][0] == 1


def test_a_run_of_two_plans_is_compared_with_itself(both: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "run" / "traces").mkdir(parents=True)
    for name, path in zip(("a", "b"), both, strict=True):
        (tmp_path / "run" / "traces" / name).symlink_to(path, target_is_directory=True)
    found = shardwise("diff", str(tmp_path / "run"), "--json").stdout
    assert json.loads(found) == json.loads(shardwise("diff", *both, "--json").stdout)


def test_one_run_alone_is_told_of_too(both: tuple[str, str]) -> None:
    ended = shardwise("diff", both[1])
    assert ended.returncode == 0, ended.stderr
    assert "Where the time goes" in ended.stdout
    assert "for rank 1, which was in gemm" in " ".join(ended.stdout.replace("│", " ").split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Missing argument 'first'. Try: shardwise diff --help."),
        (
            ("missing.json",),
            "missing.json: there is no such file or folder. Name a profile, or a folder of them.",
        ),
        (
            ("before", "after", "--labels", "one"),
            "--labels one: give 2 different names, separated by commas.",
        ),
        (("before", "--labels", "a,b"), "--labels a,b: give 1 different name, separated by commas."),
        (
            ("empty",),
            "empty: no file in it ends in .json or .json.gz. Give a trace file, or a folder with one file "
            "per rank.",
        ),
        (
            ("run",),
            "run/traces: no file in it ends in .json or .json.gz. It has the plans colwise, routed, "
            "rowwise: give one, such as run/traces/colwise.",
        ),
        (
            ("text.json",),
            "text.json: is no Chrome trace: it begins with 'hello', not with { or [. Give torch.profiler's "
            "JSON, plain or gzip.",
        ),
    ],
)
def test_a_mistake_gets_one_clear_line_and_exit_code_2(
    both: tuple[str, str], tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    for plan in ("rowwise", "colwise", "routed"):
        (tmp_path / "run" / "traces" / plan).mkdir(parents=True)
    (tmp_path / "text.json").write_text("hello")
    ended = shardwise("diff", *args, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines()[-1] == f"shardwise: {message}"
    assert "Traceback" not in ended.stderr


def test_ctrl_c_while_reading_leaves_no_process(tmp_path: Path) -> None:
    for rank in range(4):
        write(
            tmp_path / f"rank{rank}.json",
            [kernel(f"kernel {number % 50}", number, 1) for number in range(60_000)],
            rank=rank,
        )
    running = start("diff", str(tmp_path), "--workers", "2", cwd=tmp_path)
    wait_until(lambda: len(children_of(running)) >= 3 or running.poll() is not None)
    children = children_of(running)
    assert len(children) >= 3, "the readers never started"
    os.kill(running.pid, signal.SIGINT)
    _, stderr = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130
    assert stderr.splitlines()[-1] == "shardwise: stopped by Ctrl-C; no rank was left behind."
    assert "Traceback" not in stderr
    assert gone(children)


@pytest.fixture(scope="module")
def cpu_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine file for this one's devices, with constants that are none of its own."""
    path = tmp_path_factory.mktemp("machine") / "here.toml"
    text = machine_text("h100-sxm-80gb").replace('device = "cuda"', 'device = "cpu"')
    assert 'device = "cpu"' in text
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, cpu_machine: Path) -> Path:
    out = tmp_path_factory.mktemp("profiled") / "run"
    ended = shardwise(
        "compare",
        "rowwise",
        "rowwise@dtensor",
        *SMALL,
        "--no-check",
        "--profile",
        "--profile-steps",
        "2",
        "--machine",
        str(cpu_machine),
        "--out",
        str(out),
    )
    assert ended.returncode == 0, ended.stderr
    assert "Where a step's time goes" in ended.stdout
    assert "rowwise@dtensor: predicted and profiled" in ended.stdout
    return out


def test_compare_records_every_plan_on_every_rank_and_says_where_its_step_went(recorded: Path) -> None:
    comparison = read_document((recorded / "comparison.json").read_bytes(), Comparison)
    assert [profile.label for profile in comparison.profiles] == ["rowwise", "rowwise@dtensor"]
    for profile in comparison.profiles:
        assert profile.steps == 2
        assert profile.parts.compute_ns > 0
        assert profile.parts.exposed_transfer_ns > 0
        assert profile.parts.exposed_communication_ns == 0
        assert sorted(path.name for path in Path(profile.traces).iterdir()) == [
            "rank0.json.gz",
            "rank1.json.gz",
        ]
    assert (recorded / "profile-rowwise.html").exists()
    assert (recorded / "diff-rowwise@dtensor.html").exists()


def test_what_compare_recorded_can_be_given_to_diff_and_has_each_collective_by_its_module(
    recorded: Path,
) -> None:
    ended = shardwise(
        "diff", str(recorded / "traces" / "rowwise"), str(recorded / "traces" / "rowwise@dtensor"), "--json"
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert not found["first"]["losses"]
    calls = {(use["op"], use["origin"]): use["use"]["count"] for use in found["first"]["collectives"]}
    assert calls["all_to_all", "tok_embeddings"] == 1
    assert calls["all_gather", "layers.*.attention"] == 2
    reduced = sum(
        use["use"]["count"] for use in found["second"]["collectives"] if use["op"] == "reduce_scatter"
    )
    assert reduced == 10  # 5 either way, as the plan's Program has them


def test_what_compare_predicted_of_its_plans_stands_beside_their_profiles(recorded: Path) -> None:
    comparison = read_document((recorded / "comparison.json").read_bytes(), Comparison)
    for profile in comparison.profiles:
        both = read_document((recorded / f"beside-{profile.label}.json").read_bytes(), Beside)
        assert both.terms == profile.terms
        assert sum(line.measured.ns for line in both.lines) == pytest.approx(both.measured.step_ns)
        assert sum(line.predicted.ns for line in both.lines) == pytest.approx(both.predicted.step_ns)
        assert both.measured.step_ns == pytest.approx(profile.parts.total_ns)
        assert both.matched > 0.98
        by_term = {each.term: each.measured_ns for each in both.terms}
        assert min(by_term[term] or 0 for term in (Term.MATMUL, Term.TENSOR, Term.LAUNCH)) > 0


def test_a_saved_prediction_and_one_that_is_made_now_say_the_same_of_a_run(
    browser: Browser, recorded: Path, cpu_machine: Path, tmp_path: Path
) -> None:
    traces = str(recorded / "traces" / "rowwise")
    case = ("--model", MODEL, "--batch", "2", "--mesh", "tp=2", "--machine", str(cpu_machine))
    saved, out = tmp_path / "predicted", tmp_path / "page"
    made = shardwise("predict", "rowwise", *case, "--seq", "32", "--out", str(saved))
    assert made.returncode == 0, made.stderr
    asked = ("--predict", "--plan", "rowwise", *case)
    now = shardwise("diff", traces, *asked, "--seq", "32", "--out", str(out), "--json")
    assert now.returncode == 0, now.stderr
    then = shardwise("diff", str(saved), traces, "--json")
    assert then.returncode == 0, then.stderr
    assert json.loads(now.stdout)["terms"] == json.loads(then.stdout)["terms"]
    script = """
    const lanes = [...document.querySelectorAll("svg.lanes")];
    const drawn = (each) => each.querySelectorAll("rect").length > 2;
    seen.push([String(lanes.length), String(lanes.every(drawn))]);
    """
    seen = browser.visit(driven((out / "diff.html").read_text(), script), tmp_path)
    assert seen_by(seen.dom) == [["2", "true"]]
    assert seen.console == ()
    longer = shardwise("diff", traces, *asked, "--seq", "64")
    assert longer.returncode == 2
    assert "ran another step than was predicted" in longer.stderr
    alone = shardwise("diff", traces, "--machine", "h100-sxm-80gb")
    assert alone.returncode == 2
    assert "--machine: it is a prediction's. Add --predict, or leave it out." in alone.stderr


def test_the_report_of_a_profiled_run_is_drawn_with_its_parts(
    browser: Browser, recorded: Path, tmp_path: Path
) -> None:
    script = """
    const parts = [...document.querySelectorAll("section[aria-labelledby=profiles] .bar > span")];
    seen.push([String(parts.length > 5), 
      String(parts.every((part) => getComputedStyle(part).backgroundColor !== "rgba(0, 0, 0, 0)"))]);
    """
    page = (recorded / "report.html").read_text()
    seen = browser.visit(driven(page, script), tmp_path)
    assert seen_by(seen.dom) == [["true", "true"]]
    assert seen.console == ()
    assert seen.requests == ()


def test_the_page_is_drawn_offline_sorts_and_hostile_names_stay_text(
    browser: Browser, tmp_path: Path
) -> None:
    _, page = hostile(tmp_path)
    script = """
    const table = document.querySelector("section[aria-labelledby=lines] table");
    const first = () => table.tBodies[0].rows[0].cells[0].textContent.trim().slice(0, 20);
    const before = first();
    const button = table.tHead.rows[0].cells[0].querySelector("button");
    button.click(); button.click();
    seen.push([before, first(), String(document.querySelectorAll("svg.lanes rect").length >= 2),
      String(document.images.length), String(window.alerted || "")]);
    """
    seen = browser.visit(driven(page, script), tmp_path)
    assert seen.console == ()
    assert seen.requests == ()
    assert Elements(seen.dom).handlers == []
    [[before, after, has_lanes, images, alerted]] = seen_by(seen.dom)
    assert before != after
    assert (has_lanes, images, alerted) == ("true", "0", "")
    assert HOSTILE not in page


def test_the_page_fits_a_phone(browser: Browser, tmp_path: Path) -> None:
    _, page = hostile(tmp_path)
    script = "seen.push([String(document.documentElement.scrollWidth <= window.innerWidth)]);"
    assert seen_by(browser.visit(driven(page, script), tmp_path, width=420).dom) == [["true"]]
