"""Values that no option and no file may have: what is said names the value, and what is allowed."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest

from shardwise.cli.main import verbs
from shardwise.core.case import StepSettings
from shardwise.core.errors import ModelError, OptionError, PlanError
from shardwise.core.option import options_of
from shardwise.core.plan import Plan, suggest
from shardwise.models.source import find_model

NOUNS: list[Any] = [StepSettings, *dict.fromkeys(what.options for what in verbs().values())]
FLOATS = [
    pytest.param(noun, asked, id=f"{noun.__module__} {asked.key}")
    for noun in NOUNS
    if not any(each.default is each.default_factory is MISSING for each in fields(noun))
    for asked in options_of(noun)
    if float in (asked.kind, *get_args(asked.kind))
]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(("noun", "asked"), FLOATS)
def test_a_number_that_is_not_finite_is_refused(noun: Any, asked: Any, value: float) -> None:
    flag = asked.flag.partition("/")[0]
    with pytest.raises(OptionError, match=rf"^{flag} is (inf|nan)\. Use a finite number\."):
        noun(**{asked.field: value})


def test_a_dtype_that_another_option_takes_is_named_with_it() -> None:
    with pytest.raises(OptionError) as refused:
        StepSettings(dtype="float8")
    assert str(refused.value) == (
        '--dtype is "float8". Linears that multiply in it are predict\'s --matmul-dtype float8. Allowed: '
        "float32, bfloat16, float64."
    )


@pytest.mark.parametrize("text", ["{}".encode("utf-16"), b'{"a": "\xff"}'])
def test_a_configuration_that_is_not_utf_8_is_called_so(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"not UTF-8 text\.$"):
        find_model(f"hf:{tmp_path}/config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[rules]\n"a" = { style = "colwise", pieces = "32/0" }',
            'plan: rule "a": pieces: "32/0": a piece has 1 part or more. Write a count that divides 32 '
            "behind the slash, or no slash for a part for each rank.",
        ),
        ('rules = ["a"]', "plan: rules is ['a'], and not a table. Write [rules] and then "),
        ('context_attention = true\n[rules]\n"a" = "colwise"', "plan: context_attention is true. Allowed: "),
        ('engine = 5\n[rules]\n"a" = "colwise"', "plan: engine is 5. Allowed: "),
    ],
)
def test_a_plan_file_is_told_which_value_is_wrong(text: str, message: str) -> None:
    with pytest.raises(PlanError) as refused:
        Plan.from_toml(text)
    assert str(refused.value).startswith(message)


def test_only_a_name_that_is_like_it_is_suggested() -> None:
    assert suggest("nope", ["inpl", "build"]) == ""
    assert suggest("biuld", ["inpl", "build"]) == ' Did you mean "build"?'
