"""What a search writes for a framework: the best plan, runners-up that were verified, nothing that is wrong;
and how the answer tells it. A search that exports: tests/e2e/test_search.py."""

from dataclasses import replace

from shardwise.core.case import Case
from shardwise.core.search import Found, Search
from shardwise.report.search import commands
from shardwise.report.search.html import search_html
from shardwise.search.solve import BY_HAND
from shardwise.verbs.progress import silent
from shardwise.verbs.search import SearchOptions
from shardwise.verbs.search.exported import exported
from shardwise.verbs.search.proof import PROOF_STOPPED
from tests.unit import search_example as example
from tests.unit.test_search_report import printed, words

CASE = Case.of(model="llama3-debug", mesh="tp=1")
# of FSDP alone, so that any model can have it
PLAIN = replace(
    example.THIRD,
    settings=replace(example.THIRD.settings, recompute_layers=None, seq=64),
    why_unproved="the ranks were killed",
)


def search(*found: Found, **more: object) -> Search:
    return example.search(model="llama3-debug", found=found, **more)


def asked(made: Search, framework: str = "pytorch", *, verify: bool = True) -> Search:
    return exported(made, CASE, SearchOptions(export=framework, top=2, verify=verify), silent)


def test_the_best_is_written_and_a_runner_up_that_could_not_be_verified_is_not() -> None:
    best, second = asked(search(PLAIN, PLAIN)).found
    assert best.export is not None
    assert best.export.files[0].text.startswith(
        "# Made by: shardwise export unsharded --as pytorch --model llama3-debug --mesh fsdp=64,tp=1 "
    )
    assert second.export is None
    assert second.why_not_exported == "it could not be verified: the ranks were killed"


def test_where_fewer_were_found_than_were_asked_for_that_is_said() -> None:
    said = "--top 2: 1 of the space could be given out, so no more is written"
    assert asked(search(PLAIN)).notes[-1:] == (said,)
    assert said in words(printed(asked(search(PLAIN))))
    assert said not in asked(search(PLAIN, PLAIN)).notes


def test_without_verify_runners_up_are_written_too_and_each_says_that_it_was_not_verified() -> None:
    made = asked(search(PLAIN, PLAIN), verify=False)
    assert all(each.export is not None for each in made.found)
    said = words(printed(made))
    assert said.count("NOT VERIFIED. It is written all the same: prove it before you train.") == 2
    assert "Written for a framework: plan 2" in said
    files = commands.plan_files(made)
    assert {"export-1/sharded.py", "export-2/sharded.py"} <= set(files)


def test_a_plan_that_trains_the_model_wrong_is_never_written() -> None:
    wrong = replace(PLAIN, proof=example.WRONG)
    for verify in (True, False):
        (best,) = asked(search(wrong), verify=verify).found
        assert best.export is None
    said = words(printed(asked(search(wrong))))
    assert "Not written: it trains the model wrong, so it isn't written" in said


def test_after_ctrl_c_nothing_is_written() -> None:
    (best,) = asked(search(PLAIN, stopped=BY_HAND)).found
    assert best.why_not_exported == "the search was stopped"
    stopped = replace(PLAIN, why_unproved=PROOF_STOPPED)
    assert [each.why_not_exported for each in asked(search(stopped, PLAIN)).found] == [
        PROOF_STOPPED,
        "it could not be verified: the ranks were killed",
    ]


def test_a_format_that_can_not_say_a_plan_says_so_and_the_answer_stays() -> None:
    (best,) = asked(search(PLAIN), "torchtitan").found
    assert best.export is None
    assert best.why_not_exported is not None
    assert "\n" not in best.why_not_exported


def test_the_page_has_the_files_and_no_command_that_would_write_them_again() -> None:
    made = asked(search(replace(PLAIN, proof=example.PROOF, why_unproved=None)))
    page = search_html(made)
    assert "Written for a framework" in page
    assert "# Made by: shardwise export unsharded" in page
    assert "Written for a framework" not in search_html(example.search())


def test_a_machine_file_is_named_in_the_case_as_it_was_asked_for() -> None:
    files = commands.plan_files(search(PLAIN), "/mine/machine.toml")
    assert 'machine = "/mine/machine.toml"' in files["case-1.toml"]
    assert 'machine = "h100-sxm-80gb"' in commands.plan_files(search(PLAIN))["case-1.toml"]
