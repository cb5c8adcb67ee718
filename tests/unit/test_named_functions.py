"""Functions that go to ranks by name."""

import sys
from pathlib import Path

import msgspec
import pytest

from shardwise.core.errors import OptionError
from shardwise.verify.loop.loop import Loop
from shardwise.verify.loop.named import Named, _imported
from tests.distributed import loops


def test_a_function_of_a_module_is_imported_by_its_name() -> None:
    named = Named.of(loops.plain, "step")
    sent = msgspec.json.decode(msgspec.json.encode(named), type=Named)
    assert (sent.module, sent.path) == ("tests.distributed.loops", "plain")
    assert sent.load() is loops.plain


def test_a_function_of_a_file_that_is_no_importable_module_is_loaded_from_the_file(tmp_path: Path) -> None:
    """As pytest's are with --import-mode=importlib."""
    file = tmp_path / "test_theirs.py"
    file.write_text("def step(model): return 'theirs'\n")
    assert Named("nowhere.test_theirs", "step", str(file)).load()(None) == "theirs"
    assert sys.modules.pop("nowhere.test_theirs").__file__ == str(file)


def test_a_scripts_own_guard_stays_shut_on_ranks(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text("def step(): return __name__\nassert __name__ != '__main__'\n")
    assert Named("__main__", "step", str(file)).load()() == "__shardwise_script__"
    del sys.modules["__shardwise_script__"]


def test_a_file_that_fails_to_load_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise ValueError('no such thing')\n")
    with pytest.raises(OptionError, match=r"broken: on a rank, importing .* raised ValueError: no"):
        _imported("broken", str(file))


def test_a_step_that_needs_what_nobody_gives_is_refused() -> None:
    def step(model: object, batch: object, tokenizer: object) -> None: ...

    with pytest.raises(OptionError) as told:
        Loop(step, None, None, None, None, None, None, 1, (1, 1), None)  # type: ignore[arg-type]
    assert str(told.value) == (
        'step: it needs an argument "tokenizer". It may take model, batch, optimizer, mesh, number, each '
        "by that "
        "name; give any other a default."
    )
