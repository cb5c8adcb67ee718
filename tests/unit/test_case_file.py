"""A case file is read by every verb: what all share at the top, a table per verb for what only that one
knows."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from shardwise.cli.main import verbs
from shardwise.core.case import SHARED, Case
from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh
from shardwise.files.case import case_text, read_case
from tests.e2e.command import shardwise

SHIPPED = Path(__file__).parents[2] / "src" / "shardwise" / "cli" / "configs" / "llama3_8b_tp8.toml"
KEYS = {"compare": ("rounds", "module"), "explain": ("rank",), "verify": ("batch", "static")}


def read(text: str, verb: str) -> dict[str, object]:
    return read_case(text, "mine.toml", verb, KEYS[verb], KEYS)


def test_a_verb_reads_the_top_and_its_own_table_and_leaves_the_others_alone() -> None:
    text = 'mesh = "tp=4"\nseq = 64\n[compare]\nrounds = 3\n[explain]\nrank = 2\nseq = 32\n'
    assert read(text, "compare") == {"mesh": "tp=4", "seq": 64, "rounds": 3}
    assert read(text, "explain") == {"mesh": "tp=4", "seq": 32, "rank": 2}


def test_a_flat_file_of_one_verb_is_still_read_by_it() -> None:
    assert read("rounds = 3\nsequence-parallel = false\n", "compare") == {
        "rounds": 3,
        "sequence_parallel": False,
    }


def test_what_a_verb_calls_by_a_shared_name_is_in_its_table_only() -> None:
    assert read("batch = 512\n[verify]\nbatch = 4\n", "verify") == {"batch": 4}
    assert read("batch = 512\n", "verify") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds = 3", 'mine.toml: "rounds" is no key of explain. Write it in a table: [compare].'),
        ("ranc = 3", 'mine.toml: unknown key "ranc". Did you mean "rank"? Allowed: accumulation, '),
        ("[explane]\nrank = 3", 'mine.toml: unknown key "explane". Did you mean "explain"? Allowed: '),
        ("[explain]\nrounds = 3", 'mine.toml: [explain]: "rounds" is no key of explain.'),
        ("[seq]\nrank = 3", "mine.toml: seq is a table. Write a plain value."),
        ("seq", "mine.toml: not valid TOML: "),
    ],
)
def test_a_mistake_in_a_case_file_is_named_in_one_line(text: str, message: str) -> None:
    with pytest.raises(OptionError) as refused:
        read(text, "explain")
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("verb", ["compare", "explain", "predict", "verify"])
def test_the_shipped_case_is_taken_by_every_verb_that_takes_a_case(verb: str) -> None:
    known = {name: what.own_keys() for name, what in verbs().items()}
    found = read_case(SHIPPED.read_text(), "llama3_8b_tp8", verb, known[verb], known)
    assert (found["model"], found["mesh"], found.get("rounds")) == (
        "llama3-8b",
        "tp=8",
        20 if verb == "compare" else None,
    )


def test_every_verb_offers_a_case_file() -> None:
    assert {"compare", "explain", "verify", "diff", "predict", "calibrate"} <= set(verbs())


def test_a_written_case_is_the_same_case_when_it_is_read() -> None:
    case = Case.of(model='a "b"', mesh="fsdp=2,tp=2", plans=["rowwise", "x.toml"], seq=16, random_ids=True)
    given = {"model", "mesh", "plans", "seq", "random_ids"}
    text = case_text(case, given, {})
    assert Case.of(**read_case(text, "mine.toml", "compare", (), {})) == case
    assert {asked.key for asked in SHARED if f"# {asked.key} = " in text} | given == {
        asked.key for asked in SHARED
    }


def test_the_command_case_writes_what_it_was_given(tmp_path: Path) -> None:
    ended = shardwise("case", "rowwise", "--mesh", "tp=4", "--max-norm", "0.5", cwd=tmp_path)
    assert tomllib.loads(ended.stdout) == {"mesh": "tp=4", "plans": ["rowwise"], "max_norm": 0.5}
    assert "# [compare]\n# rounds = 20  # Timed steps of every plan, interleaved." in ended.stdout


def test_a_key_that_is_commented_out_shows_a_value_of_its_type(tmp_path: Path) -> None:
    ended = shardwise("case", cwd=tmp_path)
    assert ended.stdout.count("# plans = []  #") == 1
    assert ended.stdout.count("# devices = 1  #") == 2  # a sweep's and a search's
    assert '# machine = ""  #' in ended.stdout


def test_a_case_is_valid_from_birth() -> None:
    case = Case.of(model="llama3-debug", mesh="dp=2,tp=2", batch=4)
    for wrong, message in (
        (
            {"batch": 3},
            "--batch 3 can't be cut into 2 data-parallel parts of 1 micro-batches. Use a multiple of 2.",
        ),
        ({"dtype": "float16"}, '--dtype is "float16". Did you mean "bfloat16"?'),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0. Use a number above 0."),
    ):
        with pytest.raises(OptionError) as refused:
            replace(case, step=replace(case.step, **wrong))
        assert str(refused.value).startswith(message)
    with pytest.raises(OptionError, match=r'unknown key "modle"\. Did you mean "model"\?'):
        Case.of(modle="llama3-debug", mesh=Mesh.parse("tp=2"))
    with pytest.raises(OptionError, match="case: mesh is missing"):
        Case.of(model="llama3-debug")
