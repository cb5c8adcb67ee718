"""Written tokens: what was written comes back piece by piece, whole or not at all, and hostile folders
are told in one line each."""

import json
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardwise.core.case import TextSource
from shardwise.core.errors import OptionError, RunError, TextError
from shardwise.text import reading
from shardwise.text.checking import problems_of
from shardwise.text.manifest import ENDS, MANIFEST, TOKENIZER, is_token_folder, shard_name
from shardwise.text.samples import Samples
from shardwise.text.shards import Shards
from shardwise.text.stream import TokenStream
from shardwise.text.writing import Written, write_folder
from shardwise.verbs.tokens import TokensOptions, check_tokens, tokens

DOCUMENTS = [[5, 1, 2], [7], [3, 3, 3, 3, 9], [0, 299]]


def written(vocab_size: int = 300) -> Written:
    return Written("a test", "words", b"{}", vocab_size, end_id=None)


def arrays(documents: Sequence[Sequence[int]]) -> Iterator[NDArray[np.int32]]:
    for ids in documents:
        yield np.array(ids, dtype=np.int32)


def write(folder: Path, documents: Sequence[Sequence[int]] = DOCUMENTS, shard_tokens: int = 4) -> Path:
    write_folder(folder, arrays(documents), written(), shard_tokens)
    return folder


def whole(documents: Sequence[Sequence[int]], vocab_size: int = 300) -> TokenStream:
    """The same tokens in memory."""
    ids = [np.array(each, dtype=np.int32) for each in documents if each]
    ends = np.cumsum([each.size for each in ids], dtype=np.int64)
    return TokenStream.of(
        np.concatenate(ids), vocab_size=vocab_size, source="a test", tokenizer="words", ends=ends
    )


def change(folder: Path, **fields: Any) -> None:
    table = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(table | fields))


def shard_table(folder: Path, number: int, **fields: Any) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["shards"]
    shards[number] |= fields
    return shards


def refused(folder: Path, vocab_size: int = 300) -> str:
    with pytest.raises(TextError) as caught:
        Shards(folder, vocab_size)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(folder), "FOLDER")


# there and back


@given(
    documents=st.lists(st.lists(st.integers(0, 299), max_size=9), min_size=1, max_size=9).filter(any),
    shard_tokens=st.integers(1, 20),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_what_was_written_is_read_like_the_same_tokens_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    shard_tokens: int,
    data: st.DataObject,
) -> None:
    folder = write(tmp_path_factory.mktemp("tokens") / "t", documents, shard_tokens)
    shards, stream = Shards(folder, 300), whole(documents)
    assert shards.summary.digest == stream.summary.digest
    assert shards.documents_digest == stream.documents_digest
    assert (shards.summary.tokens, shards.summary.documents) == (stream.ids.size, stream.ends.size)
    assert shards.summary.distinct_ids == stream.summary.distinct_ids
    size = stream.ids.size
    length = data.draw(st.integers(1, size))
    starts = np.array(data.draw(st.lists(st.integers(0, size - length), min_size=1)), dtype=np.int64)
    assert np.array_equal(shards.read(starts, length), stream.read(starts, length))
    first, last = sorted((data.draw(st.integers(0, size + 1)), data.draw(st.integers(0, size + 1))))
    assert np.array_equal(shards.ends_between(first, last), stream.ends_between(first, last))
    most = data.draw(st.integers(1, size + 3))
    part = shards.first(most)
    assert part.ids.tolist() == stream.ids[:most].tolist()
    assert part.ends.tolist() == sorted(
        {*stream.ends[stream.ends < min(most, size)].tolist(), min(most, size)}
    )
    assert list(problems_of(shards, lambda text, done, total: None)) == []


@pytest.mark.parametrize(("vocab_size", "dtype", "id_bytes"), [(65536, "uint16", 2), (65537, "uint32", 4)])
def test_ids_take_two_bytes_where_the_vocabulary_allows(
    tmp_path: Path, vocab_size: int, dtype: str, id_bytes: int
) -> None:
    ids = [0, vocab_size - 1, 255, 256]
    manifest = write_folder(tmp_path / "t", arrays([ids]), written(vocab_size))
    assert manifest.dtype == dtype
    assert (tmp_path / "t" / shard_name(0)).stat().st_size == 4 * id_bytes
    assert Shards(tmp_path / "t", vocab_size).read(np.array([0]), 4).tolist() == [ids]


def test_samples_of_written_tokens_are_those_of_the_tokens_in_memory(tmp_path: Path) -> None:
    documents = [list(range(start, start + size)) for start, size in ((0, 30), (30, 1), (31, 66), (97, 40))]
    folder = write(tmp_path / "t", documents, shard_tokens=11)
    for asked in ("packed", "masked"):
        one, other = (
            Samples.of(text, seq=8, seed=3, held_out=2, documents=asked)
            for text in (Shards(folder, 300), whole(documents))
        )
        assert one.digest == other.digest
        for position, count in ((0, 5), (12, 40), (10**9, 3)):
            for mine, theirs in ((one.at(position, count), other.at(position, count)),):
                assert torch.equal(mine.ids_BS, theirs.ids_BS)
                assert torch.equal(mine.labels_BS, theirs.labels_BS)
        assert torch.equal(one.held_out_at(0, 3).labels_BS, other.held_out_at(0, 3).labels_BS)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_the_same_stream_and_nothing_twice(tmp_path: Path, ranks: int) -> None:
    """As processes would: each opens the folder itself, as it was sent, and reads its part of each batch;
    in the middle the batch is another one, and half of the run another number of ranks."""
    folder = write(tmp_path / "t", [list(range(241))], shard_tokens=50)
    sent = reading.to_bytes(Shards(folder, 300))
    read, position = [], 0
    for step, batch in enumerate([12] * 4 + [24] * 3 + [12] * 10):
        now = ranks if step < 8 else 5 - ranks
        for rank in range(now):
            samples = Samples.of(reading.from_bytes(sent), seq=4, seed=1)
            size = batch // now
            read += samples.at(position + rank * size, size).ids_BS[:, 0].tolist()
        position += batch
    assert sorted(read[:60]) == sorted(read[60:120]) == list(range(0, 240, 4))
    assert read == Samples.of(whole([list(range(241))]), seq=4, seed=1).at(0, position).ids_BS[:, 0].tolist()


def test_reading_ten_thousand_million_tokens_takes_no_memory(tmp_path: Path) -> None:
    """A shard of 20 GB without content: a hole, as file systems have it."""
    folder = write(tmp_path / "t", [[1, 2]], shard_tokens=10)
    count = 10**10
    shards = shard_table(folder, 0, tokens=count)
    change(folder, tokens=count, shards=shards)
    os.truncate(folder / shard_name(0), 2 * count)
    tracemalloc.start()
    samples = Samples.of(Shards(folder, 300), seq=1000, seed=0, held_out=10, documents="masked")
    batch = samples.at(10**12, 8)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert samples.windows == 10**7 - 11
    assert batch.ids_BS.shape == (8, 1000)
    assert peak_bytes < 1_000_000


def test_writing_holds_a_document_at_a_time(tmp_path: Path) -> None:
    def many() -> Iterator[NDArray[np.int32]]:
        for _ in range(2000):
            yield np.zeros(1000, dtype=np.int32)

    tracemalloc.start()
    write_folder(tmp_path / "t", many(), written(), 300_000)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert Shards(tmp_path / "t", 300).summary.tokens == 2_000_000
    assert peak_bytes < 500_000


def test_many_shards_are_read_with_few_open_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", [[1] * 200], shard_tokens=1)
    before = len(os.listdir("/dev/fd"))
    shards = Shards(folder, 300)
    assert shards.read(np.array([0, 0]), 200).sum() == 400
    assert len(os.listdir("/dev/fd")) - before <= 64
    del shards
    assert len(os.listdir("/dev/fd")) == before


# whole or not at all


def test_a_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[NDArray[np.int32]]:
        yield from arrays(DOCUMENTS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "t", broken(), written(), 4)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TextError, match=r"^a test gives no tokens with tokenizer words\. Give more text\.$"):
        write_folder(tmp_path / "t", arrays([[], []]), written())
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_killed_leaves_no_folder_and_the_next_one_begins_anew(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; import numpy as np; from pathlib import Path\n"
        "from shardwise.text.writing import Written, write_folder\n"
        "def ids():\n"
        "    for _ in range(9): yield np.zeros(1000, dtype=np.int32)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_folder(Path(sys.argv[1]), ids(), Written('x', 'y', b'', 9, None), 700)"
    )
    folder = tmp_path / "t"
    killed = subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (partial,) = tmp_path.iterdir()
    assert (partial.name, is_token_folder(partial)) == ("t.partial", False)
    assert len(list(partial.iterdir())) > 10
    write(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]
    names = [ENDS, *(shard_name(number) for number in range(3)), MANIFEST, TOKENIZER]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OptionError) as caught:
        write(folder)
    assert str(caught.value) == (
        f"--out {folder}: is there already, and nothing is written over. Name another folder, or remove it."
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    (tmp_path / "u.partial").mkdir()
    (tmp_path / "u.partial" / "notes.txt").write_text("mine")
    for name, message in (
        ("file", "is there already"),
        ("file/below", "is no folder"),
        ("none/below", "is no folder"),
        ("u", r"holds notes\.txt, which shardwise tokens hasn't written"),
    ):
        with pytest.raises(OptionError, match=message):
            write(tmp_path / name)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")


def test_of_two_runs_into_one_folder_one_is_refused(tmp_path: Path) -> None:
    def other() -> Iterator[NDArray[np.int32]]:
        yield from arrays(DOCUMENTS)
        with pytest.raises(OptionError, match=r"another run writes .*t\.partial\. Wait for it"):
            write(tmp_path / "t")

    write_folder(tmp_path / "t", other(), written(), 4)
    assert check_tokens(tmp_path / "t").problems == ()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(RunError) as caught:
            write(tmp_path / "t", [[1] * 1000], shard_tokens=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        f"--out {tmp_path / 't'}: can't be written: File too large; nothing of it was left. Free space "
        "there, or name another folder."
    )
    assert list(tmp_path.iterdir()) == []


# hostile folders

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


# as a case names it


def source(folder: Path, **more: Any) -> TextSource:
    return TextSource(files=(str(folder),), **more)


def test_a_folder_of_tokens_is_a_text_like_any_other(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    said: list[str] = []
    read = reading.tokens_of(source(folder), 512, 0, said.append)
    assert isinstance(read, Shards)
    assert (read.summary.tokens, read.summary.vocab_size, said) == (11, 512, [])
    back = reading.from_bytes(reading.to_bytes(read))
    assert back.summary == read.summary
    stream = reading.tokens_of(TextSource(random_ids=True), 9, 1, said.append)
    assert reading.from_bytes(reading.to_bytes(stream)).summary == stream.summary


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda folder: source(folder, end_token="x"), "is written already, with the end token that it has"),
        (lambda folder: source(folder, tokenizer=str(folder / ENDS)), "was written with another one"),
        (lambda folder: TextSource(files=(str(folder),) * 2), "is read alone"),
    ],
)
def test_what_goes_with_no_folder_of_tokens_is_refused(
    tmp_path: Path, asked: Callable[[Path], TextSource], message: str
) -> None:
    folder = write(tmp_path / "t")
    with pytest.raises(OptionError, match=message):
        reading.tokens_of(asked(folder), 512, 0, print)
    reading.tokens_of(source(folder, tokenizer=str(folder / TOKENIZER)), 512, 0, print)


def test_a_rank_that_finds_other_tokens_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    sent = reading.to_bytes(Shards(folder, 300))
    folder.rename(tmp_path / "gone")
    with pytest.raises(TextError, match=r"shardwise-tokens\.json\" doesn't exist"):
        reading.from_bytes(sent)
    write(folder, [[1, 2, 3]])
    with pytest.raises(TextError, match="holds other tokens on this host than on the first one's"):
        reading.from_bytes(sent)
    with pytest.raises(TextError, match="bytes are no tokens"):
        reading.from_bytes(b"written {")


def test_the_verb_writes_what_loading_the_same_text_gives(tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps({"body": f"line {n} of many"}) + "\n" for n in range(60)))
    case = TextSource(text_key="body")
    done = tokens(tmp_path / "t", case, TokensOptions((str(text),), vocab_size=300, shard_tokens=100))
    in_memory = reading.tokens_of(TextSource(files=(str(text),), text_key="body"), 300, 0, print)
    assert done.text.digest == in_memory.summary.digest
    assert (done.text.documents, done.text.vocab_size, done.dtype) == (60, 300, "uint16")
    assert done.shards == -(-done.text.tokens // 100)
    tokenizer = str(tmp_path / "t" / TOKENIZER)
    again = tokens(
        tmp_path / "u", TextSource(tokenizer=tokenizer, text_key="body"), TokensOptions((str(text),))
    )
    assert again.text.digest == done.text.digest
