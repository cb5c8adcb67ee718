"""The docs: every command, option and public name is told, every page is in the site, and every link leads
somewhere."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import shardwise
from shardwise import testing
from shardwise.cli.main import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
LINK = re.compile(r"(?<!`)\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_words_an_example_and_a_page(name: str) -> None:
    command = COMMANDS[name]
    assert command.help, f"shardwise {name} has no docstring"
    guides = [page for page in PAGES if page.name != "cli.md"]
    told = [page.name for page in guides if f"shardwise {name}" in page.read_text(encoding="utf-8")]
    assert told, f"no page but the reference says what shardwise {name} is for"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_and_stands_in_the_reference(name: str) -> None:
    reference = (DOCS / "cli.md").read_text(encoding="utf-8").partition(f"## shardwise {name}\n")[2]
    section = reference.partition("\n## ")[0]
    for parameter in COMMANDS[name].params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        assert parameter.help, f"{name}: {parameter.name} has no help"
        shown = parameter.name.upper() if parameter.param_type_name == "argument" else parameter.opts[0]
        assert f"`{shown}`" in section, f"docs/cli.md: {name} lacks {shown}. Run: make docs"


@pytest.mark.parametrize("name", shardwise.__all__)
def test_every_public_name_has_a_docstring_and_stands_on_the_python_page(name: str) -> None:
    public = getattr(shardwise, name)
    assert inspect.getdoc(public), f"shardwise.{name} has no docstring"
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    told = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    assert name in told, f"docs/api.md says nothing of shardwise.{name}"


def test_what_a_teams_own_tests_call_stands_on_the_python_page() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    public = [
        name for name, value in vars(testing).items() if getattr(value, "__module__", "") == testing.__name__
    ]
    for name in public:
        assert f"::: shardwise.testing.{name}" in page


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f": {page.name}\n" not in nav] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.finditer(text):
        target, _, anchor = link["target"].partition("#")
        if "://" in target:
            continue
        file = (page.parent / target) if target else page
        assert file.exists(), f"{page.name}: {link['target']} leads nowhere"
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{page.name}: {link['target']}: no such title"


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
