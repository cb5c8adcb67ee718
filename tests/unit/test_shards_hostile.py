"""Hostile folders of tokens: each is told in one line, takes nothing down, and names no file outside
itself."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.core.errors import TextError
from shardwise.text.manifest import ENDS, MANIFEST, TOKENIZER, shard_name
from shardwise.text.samples import Samples
from shardwise.text.shards import Shards
from shardwise.verbs.tokens import check_tokens
from tests.unit.written_tokens import change, refused, shard_table, write

DIGEST = "0" * 32
LIES: list[tuple[dict[str, Any], str]] = [
    ({"format": 2}, "format is 2, and this Shardwise reads 1"),
    ({"dtype": "object"}, "dtype is 'object', and ids are uint16 or uint32"),
    ({"dtype": "uint16", "vocab_size": 70000}, "vocab_size is 70000, and 1 to 65536 is allowed"),
    ({"largest_id": 300}, "largest_id is 300, and 0 to 299 is allowed"),
    ({"end_id": -1}, "end_id is -1, and 0 to 299 is allowed"),
    ({"tokens": 0}, "tokens is 0, and 1 to 1152921504606846976 is allowed"),
    ({"tokens": 12}, "tokens is 12, and the shards have 11"),
    ({"tokens": 2**62}, "tokens is 4611686018427387904, and 1 to 1152921504606846976 is allowed"),
    ({"tokens": "many"}, "Expected `int`, got `str` - at `$.tokens`"),
    ({"distinct_ids": 301}, "distinct_ids is 301, and 1 to 300 is allowed"),
    ({"documents": 12}, "documents is 12, and 1 to 11 is allowed"),
    ({"digest": "../../etc"}, "'../../etc' is no digest: 32 digits of hex"),
    ({"shards": []}, "tokens is 11, and the shards have 0"),
    ({"shards": None}, "Expected `array`, got `null` - at `$.shards`"),
]
NAMES = ["../shard-00001.bin", "/etc/passwd", "shard-00000.bin", "shard-1.bin", "x/shard-00001.bin", "", "\n"]


@pytest.mark.parametrize(("fields", "message"), LIES, ids=[message[:40] for _, message in LIES])
def test_a_manifest_that_lies_is_told_what_is_allowed(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "t")
    change(folder, **fields)
    said = refused(folder)
    assert said.startswith(f'"FOLDER/{MANIFEST}" is no manifest of tokens: {message}')
    assert said.endswith(". Write the folder anew with shardwise tokens.")


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "t")
    change(folder, shards=shard_table(folder, 1, name=name))
    assert "files lie in the folder itself: it must be shard-00001.bin" in refused(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b"\x80\x04N.", b'{"x":' + b"[" * 100_000, b"{}"]
)
def test_a_manifest_that_is_none_is_one_line(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path / "t")
    (folder / MANIFEST).write_bytes(content)
    assert refused(folder).startswith(f'"FOLDER/{MANIFEST}" is no manifest of tokens: ')


@pytest.mark.parametrize("name", [MANIFEST, shard_name(1), ENDS])
def test_links_pipes_and_missing_files_are_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "t")
    (folder / name).rename(tmp_path / "elsewhere")
    assert (
        refused(folder) == f'"FOLDER/{name}" doesn\'t exist. Copy the folder again whole, or write it anew.'
    )
    alone = (
        "and a folder of tokens holds files alone, so that nothing else is read. Put the file itself there."
    )
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert refused(folder) == f'"FOLDER/{name}" is a link, {alone}'
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert refused(folder) == f'"FOLDER/{name}" is no file, {alone}'


@pytest.mark.parametrize("name", [shard_name(0), shard_name(2), ENDS])
def test_a_file_of_another_size_is_found_on_opening(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "t")
    size = (folder / name).stat().st_size
    for wrong in (size - 1, size + 1, 0):
        os.truncate(folder / name, wrong)
        assert refused(folder) == (
            f'"FOLDER/{name}" has {wrong} bytes, and the manifest says {size}. Copy the file again whole, or '
            "write the folder anew with shardwise tokens."
        )


def test_a_shard_cut_off_while_it_is_read_is_an_error_and_takes_nothing_down(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    shards = Shards(folder, 300)
    assert shards.read(np.array([0]), 11).size == 11
    os.truncate(folder / shard_name(1), 3)
    assert shards.read(np.array([0]), 4).tolist() == [[5, 1, 2, 7]]
    with pytest.raises(TextError) as caught:
        shards.read(np.array([0]), 11)
    assert str(caught.value) == (
        f'"{folder / shard_name(1)}" ends at byte 3, and 8 were there when it was opened. Copy the file '
        "again whole."
    )


def test_a_shard_that_vanishes_before_it_is_read_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    shards = Shards(folder, 300)
    (folder / shard_name(2)).unlink()
    assert shards.read(np.array([0]), 8).size == 8
    with pytest.raises(TextError, match=r"shard-00002\.bin\" doesn't exist\. Copy the folder again whole"):
        shards.read(np.array([0]), 11)


def test_ids_beyond_the_models_vocabulary_or_the_manifest_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    assert refused(folder, vocab_size=299) == (
        "FOLDER has token ids up to 299, and the model has vocab_size=299 (ids 0 to 298). Use the model "
        "whose tokenizer wrote it, or write the folder anew with the model's own."
    )
    (folder / shard_name(1)).write_bytes(np.array([3, 3, 65535, 3], dtype="<u2").tobytes())
    with pytest.raises(TextError) as caught:
        Shards(folder, 300).read(np.array([5]), 4)
    assert str(caught.value) == (
        f'"{folder / shard_name(1)}" is damaged: id 65535 at byte 4, and the manifest allows 0 to 299. Copy '
        "the file again, or write the folder anew."
    )


def test_documents_ends_that_make_no_order_take_nothing_down_and_a_check_finds_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    for ends in ([3, 2, 9, 11], [3, 3, 9, 11], [-5, 2**60, 9, 11], [2**62] * 4):
        (folder / ENDS).write_bytes(np.array(ends, dtype="<i8").tobytes())
        samples = Samples.of(Shards(folder, 300), seq=2, documents="masked")
        with suppress(TextError):
            samples.at(0, samples.windows)
        assert any("don't end one after the other" in each for each in check_tokens(folder).problems)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_flipped_bit_is_found_by_a_check(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write(tmp_path_factory.mktemp("tokens") / "t")
    name = data.draw(st.sampled_from([shard_name(0), shard_name(1), shard_name(2), ENDS, TOKENIZER]))
    content = bytearray((folder / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    problems = check_tokens(folder).problems
    assert problems
    assert all(each.startswith(f"{name}: ") and "\n" not in each for each in problems)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"digest": DIGEST}, f"it says {DIGEST}."),
        ({"distinct_ids": 7}, "the manifest: distinct_ids of the shards is 8, and it says 7."),
        ({"documents_digest": DIGEST}, f"{ENDS}: its digest is"),
        ({"tokenizer_digest": DIGEST}, f"{TOKENIZER}: its digest is"),
        ({"vocab_size": 301, "largest_id": 300}, "largest_id of the shards is 299, and it says 300."),
    ],
)
def test_what_only_reading_all_shows_a_check_finds(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "t")
    assert check_tokens(folder).problems == ()
    change(folder, **fields)
    (problem,) = check_tokens(folder).problems
    assert message in problem
