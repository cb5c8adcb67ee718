"""shardwise plan and explain --dims as a user starts them; the page in a real headless Chromium."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from shardwise.core.plan import Plan
from shardwise.report.plan.html import dims_html, plan_html
from tests.e2e.browser import Browser, Elements, driven, seen_by
from tests.e2e.command import shardwise, shardwise_process
from tests.matrix import FULL
from tests.unit.comparison_example import HOSTILE_MARKUP, HOSTILE_NAME
from tests.unit.plan_example import FUSED, LLAMA, NORMED, found, made

MINE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.second(self.first(x).relu())

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

def build():
    return Model()
"""
HOSTILE = replace(
    made(),
    model=HOSTILE_NAME,
    dims=replace(made().dims, model=HOSTILE_MARKUP, weights=tuple(
        replace(each, name=f"{each.name}{HOSTILE_MARKUP}") for each in made().dims.weights
    )),
)  # fmt: skip
PAGES = {
    "plan": plan_html(made()),
    "plan of fused weights": plan_html(made(FUSED)),
    "dims of what can't be cut": dims_html(found(NORMED)),
    "hostile names": plan_html(HOSTILE),
}

each_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())


def test_a_users_own_model_gets_a_plan_that_reads_back_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    ended = shardwise("plan", "--model", "mine:build", "--mesh", "tp=2", "--out", "plan", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "shardwise verify mine.toml --model mine:build --mesh tp=2" in ended.stdout
    text = (tmp_path / "plan" / "plan.toml").read_text()
    rules = {rule.pattern: str(rule.style.name) for rule in Plan.from_toml(text).rules}
    assert rules["layers.*.first"] == "colwise"
    assert rules["layers.*.second"] == "rowwise"
    assert "# each rank makes its part of the inner width (64)" in text
    assert {"plan.html", "plan.json", "plan.md", "settings.json"} <= {
        path.name for path in (tmp_path / "plan").iterdir()
    }


@FULL  # in the test's process: test_shipped_case.py; an installed command's stdout: test_installed.py
def test_stdout_is_the_file_alone_and_the_installed_command_writes_it() -> None:
    ended = shardwise_process("plan", "--model", LLAMA, "--mesh", "tp=2", "--toml")
    assert ended.returncode == 0, ended.stderr
    assert Plan.from_toml(ended.stdout) == made().plan


def test_dims_are_one_document_too() -> None:
    ended = shardwise("explain", "--dims", "--model", LLAMA, "--mesh", "tp=2", "--json")
    document = msgspec.json.decode(ended.stdout)
    assert document["schema_version"] == 1
    assert {"KV heads", "inner width"} <= {each["name"] for each in document["classes"] if each["is_cut"]}


def test_dims_and_a_walk_are_refused_together() -> None:
    ended = shardwise("explain", "--dims", "--walk", "tok_embeddings")
    assert (ended.returncode, ended.stderr) == (
        2,
        "shardwise: --dims and --walk don't go together. Leave one out.\n",
    )


@each_page
def test_the_page_is_drawn_offline_and_without_complaint(browser: Browser, tmp_path: Path, page: str) -> None:
    seen = browser.visit(page, tmp_path)
    assert seen.console == ()
    assert seen.requests == ()
    assert Elements(seen.dom).handlers == []


def test_no_two_weights_of_the_picture_lie_on_each_other(browser: Browser, tmp_path: Path) -> None:
    script = """
    const box = (element) => element.getBoundingClientRect();
    for (const svg of document.querySelectorAll(".group svg")) {
      const groups = [...svg.querySelectorAll("g")].map(box);
      const apart = (a, b) => a.right < b.left + 1 || a.bottom < b.top + 1;
      const meet = (a, b) => !apart(a, b) && !apart(b, a);
      const crossing = groups.filter((a, at) => groups.slice(at + 1).some((b) => meet(a, b)));
      const inside = groups.every((each) => each.right <= box(svg.parentElement).right + 1);
      seen.push([String(groups.length), String(crossing.length), String(inside)]);
    }
    """
    seen = seen_by(browser.visit(driven(PAGES["plan"], script), tmp_path).dom)
    assert sum(int(n) for n, _, _ in seen) == len(made().dims.weights)
    assert {(crossing, inside) for _, crossing, inside in seen} == {("0", "true")}


def test_the_first_ranks_part_of_a_weight_is_coloured_and_the_others_are_paler(
    browser: Browser, tmp_path: Path
) -> None:
    script = """
    const [own] = document.querySelectorAll(".group.of .own");
    const pale = own.parentElement.querySelector(".band:not(.own)");
    const style = (element) => getComputedStyle(element);
    const isSame = style(own).fill === style(pale).fill;
    seen.push([String(isSame), style(own).fillOpacity, style(pale).fillOpacity]);
    """
    found_there = seen_by(browser.visit(driven(PAGES["plan"], script), tmp_path).dom)
    assert found_there == [["true", "1", "0.22"]]


def test_the_page_fits_a_phone(browser: Browser, tmp_path: Path) -> None:
    script = """
    const page = document.documentElement;
    seen.push([String(page.scrollWidth), String(page.clientWidth)]);
    """
    seen = browser.visit(driven(PAGES["plan"], script), tmp_path, width=390)
    ((content, screen),) = seen_by(seen.dom)
    assert int(content) <= int(screen)
