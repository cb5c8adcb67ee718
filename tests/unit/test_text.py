import hashlib
import json
import os
import resource
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from shardwise.core.batch_part import BatchPart
from shardwise.core.errors import OptionError, TextError
from shardwise.step.portion import Portion
from shardwise.text import tokenizer as bpe
from shardwise.text.batches import Batches
from shardwise.text.corpus import STDLIB_SOURCE, documentation_of, load_text
from shardwise.text.stream import RANDOM_TOKENS, TokenStream, load_tokens

PROSE = ("The quick brown fox jumps over the lazy dog.\nAnother line, with ümläuts and 漢字 and 🦊.\n") * 50
TRAINED = bpe.train(PROSE, 300)
WORD_LEVEL = (
    '{"version":"1.0","truncation":{"direction":"Right","max_length":2,"strategy":"LongestFirst","stride":0},'
    '"padding":null,"added_tokens":[],'
    '"normalizer":null,"pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":null,'
    '"model":{"type":"WordLevel","vocab":{"a":0,"b":1,"rare":900,"?":2},"unk_token":"?"}}'
)


def stream_of(ids: list[int], vocab_size: int = 1 << 30) -> TokenStream:
    return TokenStream.of(
        np.array(ids, dtype=np.int32), vocab_size=vocab_size, source="a test", tokenizer="none"
    )


def there_and_back(tokenizer: Tokenizer, text: str) -> str:
    ids = bpe.encode(tokenizer, text, vocab_size=300, name="trained")
    return str(decoders.ByteLevel().decode([str(tokenizer.id_to_token(id)) for id in ids.tolist()]))


def cache_files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def stdlib_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    load_tokens(vocab_size=32000, cache=cache)
    return cache


# corpus


def test_the_built_in_corpus_is_megabytes_the_same_in_every_process_and_imports_no_module_it_reads() -> None:
    corpus = load_text()
    assert corpus.source == STDLIB_SOURCE
    assert len(corpus.text) > 2_000_000
    places = [
        corpus.text.index(text) for text in ("assert_stmt", str(zipfile.__doc__)[:20], str(json.__doc__)[:60])
    ]
    assert places == sorted(places)
    code = (
        "import hashlib, sys; from shardwise.text.corpus import load_text;"
        "print(hashlib.sha256(load_text().text.encode()).hexdigest(), 'this' in sys.modules, 'antigravity' "
        "in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert (done.stdout.split(), done.stderr) == (
        [hashlib.sha256(corpus.text.encode()).hexdigest(), "False", "False"],
        "",
    )


def test_documentation_is_docstrings_in_source_order_and_then_comments() -> None:
    source = b'''"""Module."""
# first
x = 1  # not a whole line
class C:
    """Class."""
    def f(self):
        """Method."""
try:
    pass
except ValueError:
    def g():
        # second
        """Nested."""
'''
    assert documentation_of(source) == ["Module.", "Class.", "Method.", "Nested.", "first\nsecond"]


def test_a_module_that_python_warns_of_has_its_documentation() -> None:
    assert documentation_of(b'"""Module."""\nx = "\\d"\n') == ["Module."]


@pytest.mark.parametrize("source", [b"def f(:\n", b'"""\xff"""\n', b"\0", b""])
def test_a_module_that_does_not_parse_has_no_documentation(source: bytes) -> None:
    assert documentation_of(source) == []


def test_a_directory_is_read_in_sorted_order_without_hidden_folders_and_other_suffixes(
    tmp_path: Path,
) -> None:
    for name, text in {
        "b.txt": "B",
        "a.md": "A",
        "sub/c.py": "C",
        "sub/empty.py": "",
        "pub/f.txt": "F",
        "tub/g.txt": "G",
        "d.bin": "D",
        ".git/e.txt": "E",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_text([tmp_path]).text.split() == ["A", "B", "F", "C", "G"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert load_text([tmp_path / "a.txt"]).text == "hello"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "latin.txt",
            b"caf\xe9",
            "is not UTF-8: byte 0xe9 at offset 3. Convert it to UTF-8, or leave it out.",
        ),
        ("zeros.bin", b"\0" * 64, "is binary: it has a NUL byte. Give UTF-8 text, or leave it out."),
        ("empty.txt", b"", "is empty. Leave it out, or give one with text in it."),
        ("blank.txt", b" \n\t\n", "is empty. Leave it out, or give one with text in it."),
    ],
)
def test_a_file_that_is_not_text_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError) as caught:
        load_text([tmp_path / name])
    assert str(caught.value) == f'text file "{tmp_path / name}" {message}'


def test_a_missing_file_a_directory_without_text_and_a_device_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"doesn't exist\. Give UTF-8 text files, or directories of them"):
        load_text([tmp_path / "missing.txt"])
    with pytest.raises(TextError, match="holds no text files"):
        load_text([tmp_path])
    with pytest.raises(TextError, match="neither a file nor a directory"):
        load_text([Path(os.devnull)])
    (tmp_path / "blank.txt").write_text(" ")
    with pytest.raises(TextError, match="holds no text, only blanks"):
        load_text([tmp_path])


def test_a_file_whose_name_is_not_utf8_can_still_be_named_in_json(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text(PROSE)
    stream = load_tokens(vocab_size=300, files=[path], cache=tmp_path / "cache")
    assert stream.summary.source.endswith("caf?.txt")
    assert TokenStream.from_bytes(stream.to_bytes()) == stream


# tokenizer


@settings(deadline=None)
@given(st.text())
def test_a_trained_tokenizer_encodes_any_text_without_loss(text: str) -> None:
    assert there_and_back(TRAINED, text) == text


def test_long_text_is_encoded_whole_though_it_is_cut_into_pieces() -> None:
    text = "x" * 200_000 + "\n" + PROSE * 20 + "no newline at the end"
    assert there_and_back(TRAINED, text) == text


def test_training_gives_the_same_tokenizer_in_every_process() -> None:
    code = (
        "import hashlib; from shardwise.text.corpus import documentation_of; "
        "from shardwise.text.tokenizer import train; import argparse, pathlib;"
        "text = '\\n'.join(documentation_of(pathlib.Path(argparse.__file__).read_bytes()));"
        "print(hashlib.sha256(train(text, 2000).to_str().encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in [("0", "1"), ("1", "4"), ("2", "2")]
    }
    assert len(digests) == 1


def test_a_vocabulary_below_the_byte_alphabet_is_refused(book: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError) as caught:
        load_tokens(vocab_size=255, files=[book], cache=tmp_path)
    assert str(caught.value) == (
        "a byte-level tokenizer needs at least 256 ids, and the model has vocab_size=255. "
        "Use a model with vocab_size >= 256, a tokenizer.json of your own, or random ids."
    )
    assert load_tokens(vocab_size=256, files=[book], cache=tmp_path).summary.tokens == len(PROSE.encode())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"null", b"{}", b"[" * 100_000, b'{"version":"1.0","model":{"type":"BPE"}}'],
)
def test_a_broken_tokenizer_file_is_an_error_in_one_line(book: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TextError) as caught:
        load_tokens(vocab_size=300, files=[book], tokenizer=path, cache=tmp_path / "cache")
    message = str(caught.value)
    assert message.startswith(f'tokenizer file "{path}" is not a tokenizer.json: ')
    assert message.endswith(". Give one of the `tokenizers` library.")
    assert "\n" not in message


def test_a_missing_tokenizer_file_and_a_directory_are_refused(book: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="doesn't exist"):
        load_tokens(vocab_size=300, files=[book], tokenizer=tmp_path / "none.json", cache=tmp_path / "cache")
    with pytest.raises(TextError, match="can't be read: Is a directory"):
        load_tokens(vocab_size=300, files=[book], tokenizer=tmp_path, cache=tmp_path / "cache")


def test_a_tokenizer_file_truncates_nothing_and_is_held_to_the_models_vocabulary(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(WORD_LEVEL)
    text = tmp_path / "text.txt"
    text.write_text("a b a b unheard\n")
    stream = load_tokens(vocab_size=3, files=[text], tokenizer=tokenizer, cache=tmp_path / "cache")
    assert stream.ids.tolist() == [0, 1, 0, 1, 2]
    assert stream.summary.tokenizer == str(tokenizer)
    text.write_text("a rare b")
    with pytest.raises(TextError) as caught:
        load_tokens(vocab_size=900, files=[text], tokenizer=tokenizer, cache=tmp_path / "cache")
    assert str(caught.value) == (
        f'tokenizer "{tokenizer}" yields id 900, and the model has vocab_size=900 (ids 0 to 899). '
        "Use the model's own tokenizer, or a model with vocab_size >= 901."
    )


def test_a_tokenizer_file_that_cannot_encode_the_text_is_an_error(book: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(WORD_LEVEL.replace('"unk_token":"?"', '"unk_token":"[UNK]"'))
    with pytest.raises(TextError, match="can't encode the text: WordLevel error"):
        load_tokens(vocab_size=1000, files=[book], tokenizer=tokenizer, cache=tmp_path / "cache")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in Linux's /proc")
def test_tokenizing_leaves_no_thread_that_a_fork_could_lose_and_the_environment_as_before() -> None:
    code = (
        "import os; os.environ.pop('TOKENIZERS_PARALLELISM', None); from shardwise.text import tokenizer;"
        "before = os.listdir('/proc/self/task'); t = tokenizer.train('a b c\\n' * 100000, 300);"
        "tokenizer.encode(t, 'a b c\\n' * 100000, vocab_size=300, name='t');"
        "assert os.listdir('/proc/self/task') == before; assert 'TOKENIZERS_PARALLELISM' not in os.environ;"
        "pid = os.fork(); pid or os._exit(0); os.waitpid(pid, 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# stream


def test_the_summary_tells_the_truth_about_the_ids(book: Path, tmp_path: Path) -> None:
    stream = load_tokens(vocab_size=400, files=[book], cache=tmp_path / "cache")
    assert stream.ids.dtype == np.int32
    assert stream.summary.source == str(book)
    assert stream.summary.tokens == len(stream.ids)
    assert stream.summary.distinct_ids == len(set(stream.ids.tolist())) <= 400
    assert stream.summary.vocab_size == 400
    with pytest.raises(ValueError, match="read-only"):
        stream.ids[0] = 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1))
def test_a_stream_survives_its_bytes(ids: list[int]) -> None:
    stream = stream_of(ids, vocab_size=1000)
    back = TokenStream.from_bytes(stream.to_bytes())
    assert back == stream
    assert back.ids.tolist() == ids


@settings(deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=20), st.data())
def test_a_damaged_stream_is_refused_or_unharmed(ids: list[int], data: st.DataObject) -> None:
    stream = stream_of(ids, vocab_size=1000)
    content = bytearray(stream.to_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        read = TokenStream.from_bytes(bytes(content))
    except TextError:
        return
    # what no digest guards: the two names and the vocabulary's size
    assert read.ids.tolist() == ids
    assert replace(read.summary, source="", tokenizer="", vocab_size=1) == replace(
        stream.summary, source="", tokenizer="", vocab_size=1
    )


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"{}\n", b"\xff\xfe\n\0\0\0\0", b"\x80\x04N.", b'{"x":' + b"[" * 100_000]
)
def test_bytes_that_are_no_stream_are_a_text_error(content: bytes) -> None:
    with pytest.raises(TextError):
        TokenStream.from_bytes(content)


def test_a_stream_is_valid_from_birth() -> None:
    good = stream_of([1, 2, 3], vocab_size=4)
    with pytest.raises(TextError, match=r"run from 1 to 3\. vocab_size=3 allows 0 to 2"):
        TokenStream(good.ids, replace(good.summary, vocab_size=3))
    with pytest.raises(TextError, match="run from -1"):
        stream_of([-1, 2])
    with pytest.raises(TextError, match=r"1-D int64\. Give a 1-D int32 array"):
        TokenStream(good.ids.astype(np.int64), good.summary)
    with pytest.raises(TextError, match="don't match their summary"):
        TokenStream(good.ids[::-1], good.summary)
    with pytest.raises(TextError, match="gives no tokens"):
        stream_of([])


def test_a_second_load_comes_from_the_cache_and_is_equal(stdlib_cache: Path) -> None:
    stages: list[str] = []
    first = load_tokens(vocab_size=32000, cache=stdlib_cache, progress=stages.append)
    assert stages == []
    assert first.summary.source == STDLIB_SOURCE
    assert first.summary.tokens > 500_000
    assert first.summary.distinct_ids > 20_000


def test_the_cache_tells_apart_texts_sizes_and_tokenizers(book: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(WORD_LEVEL)
    stages: list[str] = []

    def load(vocab_size: int, tokenizer: Path | None = None) -> TokenStream:
        return load_tokens(
            vocab_size=vocab_size, files=[book], tokenizer=tokenizer, cache=cache, progress=stages.append
        )

    streams = [load(300), load(400), load(1000, tokenizer)]
    tokenizer.write_text(WORD_LEVEL.replace('"lazy"', '"unused"').replace('"b":1', '"lazy":1'))
    streams.append(load(1000, tokenizer))
    book.write_text(PROSE + "One more.")
    streams.append(load(300))
    assert len({stream.summary.digest for stream in streams}) == len(streams) == len(cache_files(cache))
    assert stages.count("encoding 0.0 million characters") == len(streams)


@pytest.mark.parametrize(
    "damage",
    ["truncated", "cut within an id", "flipped", "emptied", "pickled", "another vocabulary", "a directory"],
)
def test_a_damaged_cache_is_made_anew(book: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    stream = load_tokens(vocab_size=300, files=[book], cache=cache)
    (entry,) = cache_files(cache)
    content = entry.read_bytes()
    match damage:
        case "truncated":
            entry.write_bytes(content[:-4])
        case "cut within an id":
            entry.write_bytes(content[:-1])
        case "flipped":
            entry.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
        case "emptied":
            entry.write_bytes(b"")
        case "pickled":
            entry.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
        case "another vocabulary":
            entry.write_bytes(TokenStream(stream.ids, replace(stream.summary, vocab_size=400)).to_bytes())
        case "a directory":
            entry.unlink()
            entry.mkdir()
    stages: list[str] = []
    assert load_tokens(vocab_size=300, files=[book], cache=cache, progress=stages.append) == stream
    assert stages
    assert cache_files(cache) == [entry]
    if damage != "a directory":
        assert entry.read_bytes() == content


def test_a_cache_that_cannot_be_written_only_costs_time(book: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    cached = load_tokens(vocab_size=300, files=[book], cache=tmp_path / "cache")
    assert (
        load_tokens(vocab_size=300, files=[book], cache=book / "below a file", progress=stages.append)
        == cached
    )
    assert stages[-1] == "the tokens can't be cached (Not a directory), so the next run makes them again"


def test_a_full_disk_leaves_nothing_half_written(book: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        stream = load_tokens(vocab_size=300, files=[book], cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stream.summary.tokens > 1000
    assert cache_files(cache) == []


def test_the_cache_is_the_users_own_by_default(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_tokens(vocab_size=300, files=[book])
    assert len(cache_files(tmp_path / "xdg" / "shardwise")) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    load_tokens(vocab_size=300, files=[book])
    assert len(cache_files(tmp_path / ".cache" / "shardwise")) == 1


def test_random_ids_are_uniform_and_follow_the_seed() -> None:
    stream = load_tokens(vocab_size=1000, random_ids=True, seed=7)
    assert stream == load_tokens(vocab_size=1000, random_ids=True, seed=7)
    assert stream != load_tokens(vocab_size=1000, random_ids=True, seed=8)
    assert stream.summary.tokens == RANDOM_TOKENS
    counts = np.bincount(stream.ids, minlength=1000)
    assert abs(counts - RANDOM_TOKENS / 1000).max() < 6 * (RANDOM_TOKENS / 1000) ** 0.5
    assert load_tokens(vocab_size=1, random_ids=True).summary.distinct_ids == 1


def test_options_that_contradict_each_other_are_refused(book: Path) -> None:
    with pytest.raises(OptionError, match="random ids come without text"):
        load_tokens(vocab_size=300, random_ids=True, files=[book])
    with pytest.raises(OptionError, match="random ids come without text"):
        load_tokens(vocab_size=300, random_ids=True, tokenizer=book)
    with pytest.raises(OptionError, match=r"vocab_size is 0\. Use 1 to 2147483647"):
        load_tokens(vocab_size=0)
    with pytest.raises(OptionError, match="seed of random ids is -1"):
        load_tokens(vocab_size=300, random_ids=True, seed=-1)


def test_loading_text_imports_no_torch() -> None:
    code = "import sys; import shardwise.text.stream; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


# batches

sizes = st.integers(1, 6)


@settings(deadline=None)
@given(tokens=st.integers(2, 60), batch=sizes, seq=sizes, step=st.integers(0, 1000))
def test_labels_are_the_ids_shifted_by_one(tokens: int, batch: int, seq: int, step: int) -> None:
    seq = min(seq, tokens - 1)
    made = Batches(stream_of(list(range(tokens))), batch, seq).at(step)
    for part in (made.ids_BS, made.labels_BS):
        assert part.shape == (batch, seq)
        assert part.dtype == torch.int64
        assert part.is_contiguous()
    # ids count up, so the next token is the next number; a label from over the end would be smaller
    assert torch.equal(made.labels_BS, made.ids_BS + 1)


@settings(deadline=None)
@given(tokens=st.integers(2, 60), batch=sizes, seq=sizes)
def test_steps_go_through_every_whole_window_once_before_any_comes_again(
    tokens: int, batch: int, seq: int
) -> None:
    seq = min(seq, tokens - 1)
    windows = (tokens - 1) // seq
    batches = Batches(stream_of(list(range(tokens))), batch, seq)
    ids = torch.cat([batches.at(step).ids_BS for step in range(2 * windows)]).flatten()[: 2 * windows * seq]
    assert ids.tolist() == 2 * list(range(windows * seq))


@settings(deadline=None)
@given(places=sizes, micro_batches=sizes, share=sizes, seq=sizes, step=st.integers(0, 50))
def test_the_portions_of_all_ranks_make_up_the_global_batch(
    places: int, micro_batches: int, share: int, seq: int, step: int
) -> None:
    batch = Batches(stream_of(list(range(40))), places * micro_batches * share, seq).at(step)
    portions = [Portion(None, BatchPart(place, places), micro_batches) for place in range(places)]
    cut = [part for portion in portions for part in portion.cut(batch.ids_BS, batch.labels_BS)]
    assert all(ids_BS.shape == (share, seq) for ids_BS, _ in cut)
    assert torch.equal(torch.cat([ids_BS for ids_BS, _ in cut]), batch.ids_BS)
    assert torch.equal(torch.cat([labels_BS for _, labels_BS in cut]), batch.labels_BS)


@settings(deadline=None)
@given(places=sizes, micro_batches=sizes, share=sizes)
def test_one_process_has_the_micro_batches_that_all_ranks_have_together(
    places: int, micro_batches: int, share: int
) -> None:
    batch = torch.arange(places * micro_batches * share).unsqueeze(1)
    portions = [Portion(None, BatchPart(place, places), micro_batches) for place in range(places)]
    together = zip(*(portion.of(batch) for portion in portions), strict=True)
    alone = portions[0].of_one_process
    assert all(
        torch.equal(own, torch.cat(theirs)) for own, theirs in zip(alone.of(batch), together, strict=True)
    )
    assert torch.equal(alone.joined(alone.of(batch)), batch)


def test_a_stream_shorter_than_one_sequence_and_its_label_is_refused() -> None:
    Batches(stream_of([1, 2, 3, 4]), batch=8, seq=3)
    with pytest.raises(TextError) as caught:
        Batches(stream_of([1, 2, 3, 4]), batch=1, seq=4)
    assert (
        str(caught.value)
        == "a test has 4 tokens, and a sequence of 4 needs 5. Give more text, or use seq <= 3."
    )
    with pytest.raises(OptionError, match="batch=0, seq=4 is no batch"):
        Batches(stream_of([1, 2, 3, 4]), batch=0, seq=4)


def test_a_batch_can_be_changed_without_changing_the_stream() -> None:
    batches = Batches(stream_of([1, 2, 3, 4, 5]), batch=1, seq=2)
    batches.at(0).ids_BS.zero_()
    assert batches.at(0).ids_BS.tolist() == [[1, 2]]
