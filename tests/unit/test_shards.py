"""Written tokens: what was written comes back piece by piece, whole or not at all, and hostile folders
are told in one line each."""

import json
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from shardwise.text.writing import write_folder
from shardwise.verbs.tokens import TokensOptions, check_tokens, tokens
from tests.unit.written_tokens import DOCUMENTS, arrays, change, shard_table, whole, write, written

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


def test_threads_that_read_at_once_read_what_each_asked_for(tmp_path: Path) -> None:
    """More shards than are held open, so that files are closed and opened all the time."""
    folder = write(tmp_path / "t", [list(range(200))], shard_tokens=1)
    shards, expected = Shards(folder, 300), list(range(200))
    with ThreadPoolExecutor(4) as threads:
        read = list(threads.map(lambda _: shards.read(np.array([0]), 200)[0].tolist(), range(40)))
    assert all(each == expected for each in read)


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
