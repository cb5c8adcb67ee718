"""Documents: what a file or record gives, how their ends are written, what is learnt across them, and what
hostile files are told."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from shardwise.core.errors import OptionError, TextError
from shardwise.text import records
from shardwise.text.documents import documents_of
from shardwise.text.samples import Samples
from shardwise.text.stream import TokenStream, load_tokens

WORDS = {"a": 0, "b": 1, "c": 2, "?": 3, "</s>": 4, "<mine>": 5}


def write_tokenizer(folder: Path, special: tuple[str, ...] = (), config: object = None) -> Path:
    """Words by themselves; each of `special` is a special token."""
    added = [
        {"id": WORDS[name], "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for name in special
    ]
    model = {"type": "WordLevel", "vocab": WORDS, "unk_token": "?"}
    whole = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({**empty, **whole}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def write_lines(path: Path, *texts: str, key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts))
    return path


def write_parquet(path: Path, texts: list[Any], key: str = "text", **more: Any) -> Path:
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), key: texts}), path, **more)
    return path


def loaded(tmp_path: Path, files: list[Path], tokenizer: Path, **asked: Any) -> TokenStream:
    return load_tokens(vocab_size=6, files=files, tokenizer=tokenizer, cache=tmp_path / "cache", **asked)


def refused(path: Path, text_key: str = "text") -> str:
    with pytest.raises(TextError) as caught:
        list(documents_of([path], text_key))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f'"{path}"')
    return message.removeprefix(f'"{path}"')


# what is a document


def test_a_file_is_a_document_and_so_is_each_record(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    write_lines(tmp_path / "a.jsonl", "three", "", "four\n\nfive")
    write_parquet(tmp_path / "sub" / "c.parquet", ["six", "", "seven 漢"])
    read = list(documents_of([tmp_path]))
    assert read == ["three", "four\n\nfive", "one\ntwo\n", "six", "seven 漢"]
    assert list(documents_of([tmp_path / "sub", tmp_path / "b.txt"])) == ["six", "seven 漢", "one\ntwo\n"]


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8),
    key=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5).filter(
        lambda key: key != "id"
    ),
)
@settings(max_examples=40, deadline=None)
@example(["\0", " "], "text")
def test_any_text_comes_back_from_json_lines_and_parquet(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], key: str
) -> None:
    folder = tmp_path_factory.mktemp("records")
    lines = write_lines(folder / "a.jsonl", *texts, key=key)
    table = write_parquet(folder / "a.parquet", texts, key, row_group_size=3)
    if any(text.strip() for text in texts):
        kept = [text for text in texts if text]
        assert list(documents_of([lines], key)) == list(documents_of([table], key)) == kept


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["x", "y"], pyarrow.large_string()),
        pyarrow.array(["x", "y"]).dictionary_encode(),
        pyarrow.chunked_array([["x"], ["y"]]),
    ],
    ids=["large", "dictionary", "chunks"],
)
def test_parquet_has_strings_in_several_ways(tmp_path: Path, column: Any) -> None:
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert list(documents_of([tmp_path / "a.parquet"])) == ["x", "y"]


# their ends


@pytest.mark.parametrize(
    ("special", "config", "asked", "end"),
    [
        ((), None, None, []),
        (("</s>",), None, None, [4]),
        (("</s>", "<mine>"), None, None, [4]),
        (("<mine>",), None, None, []),
        (("</s>", "<mine>"), {"eos_token": "<mine>"}, None, [5]),
        (("</s>", "<mine>"), {"eos_token": {"content": "<mine>"}}, None, [5]),
        (("</s>",), {"eos_token": "not there"}, None, [4]),
        (("</s>",), ["no object"], None, [4]),
        ((), {"eos_token": "</s>"}, "<mine>", [5]),
        ((), None, "c", [2]),
    ],
)
def test_a_document_ends_with_the_tokenizers_end_token_where_it_has_one(
    tmp_path: Path, special: tuple[str, ...], config: object, asked: str | None, end: list[int]
) -> None:
    files = [write_lines(tmp_path / "a.jsonl", "a b", "b", "a a a")]
    stream = loaded(tmp_path, files, write_tokenizer(tmp_path / "t", special, config), end_token=asked)
    documents = [[0, 1, *end], [1, *end], [0, 0, 0, *end]]
    assert stream.ids.tolist() == [token for each in documents for token in each]
    assert stream.ends.tolist() == np.cumsum([len(each) for each in documents]).tolist()
    assert stream.summary.documents == 3


def test_another_end_token_is_found_though_the_cache_is_full(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / "a.jsonl", "a", "b")]
    tokenizer = write_tokenizer(tmp_path / "t", ("</s>",))
    assert loaded(tmp_path, files, tokenizer).ids.tolist() == [0, 4, 1, 4]
    assert loaded(tmp_path, files, tokenizer, end_token="c").ids.tolist() == [0, 2, 1, 2]
    write_tokenizer(tmp_path / "t", ("</s>",), {"eos_token": "<mine>"})
    assert loaded(tmp_path, files, tokenizer).ids.tolist() == [0, 5, 1, 5]
    write_lines(tmp_path / "a.jsonl", "a b")
    assert loaded(tmp_path, files, tokenizer).ends.tolist() == [3]


def test_without_an_end_token_a_line_feed_ends_a_document_that_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no end")
    (tmp_path / "b.txt").write_text("an end\n")
    stream = load_tokens(vocab_size=256, files=[tmp_path], cache=tmp_path / "cache")
    line_feed = stream.ids[-1]
    assert [stream.ids[end - 1] for end in stream.ends] == [line_feed, line_feed]
    assert stream.ends.tolist() == [7, 14]


def test_an_end_token_that_is_not_there_or_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / "a.jsonl", "a")]
    tokenizer = write_tokenizer(tmp_path / "t", ("</s>",))
    with pytest.raises(TextError) as caught:
        loaded(tmp_path, files, tokenizer, end_token="<eof>")
    assert str(caught.value) == (
        "--end-token '<eof>': the tokenizer has no such token. Name one of its tokens, or leave it out."
    )
    with pytest.raises(TextError, match="yields id 4, and the model has vocab_size=4"):
        load_tokens(vocab_size=4, files=files, tokenizer=tokenizer, cache=tmp_path / "cache")


def test_a_document_without_tokens_is_none(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / "a.jsonl", " ", "a b", "\n", "c", " ")]
    stream = loaded(tmp_path, files, write_tokenizer(tmp_path / "t"))
    assert (stream.ids.tolist(), stream.ends.tolist()) == ([0, 1, 2], [2, 3])


def test_a_streams_bytes_have_its_documents_and_damage_to_them_is_seen() -> None:
    stream = TokenStream.of(
        np.arange(9, dtype=np.int32), vocab_size=9, source="x", tokenizer="y", ends=np.array([2, 3, 9])
    )
    content = stream.to_bytes()
    assert TokenStream.from_bytes(content).ends.tolist() == [2, 3, 9]
    at = content.index(b"\n") + 1
    damaged = content[:at] + bytes([1]) + content[at + 1 :]
    with pytest.raises(TextError, match="ends don't match their digest"):
        TokenStream.from_bytes(damaged)
    for ends in ([2, 2, 9], [3, 2, 9], [0, 3, 9], [2, 3, 8], [2, 9]):
        with pytest.raises(TextError, match="ends don't match the token ids"):
            TokenStream(stream.ids, stream.summary, np.array(ends))


# what is learnt across them


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), seq=st.integers(1, 9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_masked_labels_are_those_of_the_same_document(
    lengths: list[int], seq: int, data: st.DataObject
) -> None:
    """Against the plain rule: whose document is each token, and each label."""
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = int(ends[-1])
    stream = TokenStream.of(
        np.arange(tokens, dtype=np.int32), vocab_size=tokens, source="x", tokenizer="y", ends=ends
    )
    windows = (tokens - 1) // seq
    if windows < 2 or max(lengths) == 1:
        return
    held_out = data.draw(st.integers(1, windows - 1))
    packed, masked = (
        Samples.of(stream, seq, held_out=held_out, documents=documents) for documents in ("packed", "masked")
    )
    document = np.repeat(np.arange(len(lengths)), lengths)
    pairs = [(each.at(3, 2 * each.windows), each.held_out_at(0, held_out)) for each in (packed, masked)]
    for whole, cut in zip(*pairs, strict=True):
        assert torch.equal(whole.ids_BS, cut.ids_BS)
        is_same = document[whole.ids_BS.numpy()] == document[whole.labels_BS.numpy()]
        expected = whole.labels_BS.where(torch.from_numpy(is_same), torch.tensor(-100))
        assert torch.equal(cut.labels_BS, expected)


def test_where_labels_are_masked_the_digest_has_where_documents_end() -> None:
    ids = np.arange(9, dtype=np.int32)
    streams = [
        TokenStream.of(ids, vocab_size=9, source="x", tokenizer="y", ends=np.array(ends))
        for ends in ([2, 9], [3, 9])
    ]
    assert len({Samples.of(each, 2).digest for each in streams}) == 1
    assert len({Samples.of(each, 2, documents="masked").digest for each in streams}) == 2
    with pytest.raises(OptionError, match='--documents is "mask"'):
        Samples.of(streams[0], 2, documents="mask")


def test_documents_of_one_token_have_nothing_to_learn_where_labels_are_masked() -> None:
    ids = np.arange(5, dtype=np.int32)
    stream = TokenStream.of(ids, vocab_size=9, source="x", tokenizer="y", ends=np.arange(1, 6))
    Samples.of(stream, 2)
    with pytest.raises(TextError, match="5 documents of one token each: with --documents masked there is"):
        Samples.of(stream, 2, documents="masked")


# hostile files

LINE = "Each line is an object whose 'text' is a string. Repair the line or take it out."
OWN = "Each line is an object of its own. Repair the line or take it out."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', f"not JSON: Input data was truncated. {OWN}"),
        (b"{'text': 'x'}", f"not JSON: JSON is malformed: object keys must be strings (byte 1). {OWN}"),
        (
            b'{"text": "x"} {"text": "y"}',
            f"not JSON: JSON is malformed: trailing characters (byte 15). {OWN}",
        ),
        (b'{"text": ' + b"[" * 100_000, None),
        (b"[1]", f"Expected `object`, got `array`. {LINE}"),
        (b'{"text": 1}', f"Expected `str`, got `int`. {LINE}"),
        (b'{"text": null}', f"Expected `str`, got `null`. {LINE}"),
        (b'{"text": ["x"]}', f"Expected `str`, got `array`. {LINE}"),
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9. Repair the line or take it out."),
        (b'{"text": "\\ud800"}', None),
        (
            b'{"body": "x", "id": 1}',
            "there is no 'text'; it has body, id. Name what holds the text with --text-key.",
        ),
        (b"{}", "there is no 'text'; it has nothing. Name what holds the text with --text-key."),
        (
            json.dumps(dict.fromkeys("abcdefghijk", 1)).encode(),
            "there is no 'text'; it has a, b, c, d, e, f, g, h and 3 more. Name what holds the text with "
            "--text-key.",
        ),
        (b"\x80\x04N.", None),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_a_line_that_is_no_record_is_named_in_one_line(
    tmp_path: Path, line: bytes, message: str | None
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "fine"}\n\n' + line + b"\n")
    told = refused(path)
    assert told.startswith(", line 3: ")
    assert message is None or told == f", line 3: {message}"


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 40)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "short"}\n' + '{"text": "' + "x" * 100)
    assert refused(path) == (
        ", line 2 is longer than 40 bytes. Is this JSON lines, a record each? Cut the record, or leave the "
        "file out."
    )


def test_a_parquet_without_the_column_of_another_type_or_with_nulls_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["x"], key="body")
    assert refused(path) == (
        ": there is no 'text'; it has id, body. Name what holds the text with --text-key."
    )
    assert refused(path, "id") == (
        ": the column 'id' is of int64, and a text is of string. Name another column with --text-key."
    )
    write_parquet(path, ["x", None, "y"])
    assert refused(path) == ", record 1: its text is null. Take such records out, or leave the file out."
    path.write_text("no table")
    assert refused(path).startswith(": damaged or no Parquet, after 0 records: ")


def test_a_parquet_that_lies_is_one_line_or_gives_what_is_there(tmp_path: Path) -> None:
    """Bytes flipped anywhere and near the footer, and cut files: never another error, a hang or a crash."""
    path = write_parquet(tmp_path / "a.parquet", [f"text {n} é" * 3 for n in range(400)], row_group_size=100)
    good, chance, told = path.read_bytes(), random.Random(0), set()
    for round_ in range(300):
        bad = bytearray(good)
        if round_ % 5 == 0:
            bad = bad[: chance.randrange(len(bad))]
        for _ in range(round_ % 4):
            reach = len(bad) if round_ % 2 else min(len(bad), 1500)
            if reach:
                bad[-1 - chance.randrange(reach)] = chance.randrange(256)
        path.write_bytes(bad)
        try:
            assert len(list(documents_of([path]))) == 400
        except TextError as error:
            told.add(str(error))
    assert not any("\n" in each for each in told)
    assert all(each.startswith((f'"{path}"', f'text file "{path}" is empty')) for each in told)
    assert len({each.removeprefix(f'"{path}"')[:60] for each in told}) > 5


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["x"])
    code = (
        "import sys; sys.modules['pyarrow'] = None; from pathlib import Path\n"
        "from shardwise.text.documents import documents_of\n"
        f"try: list(documents_of([Path({str(path)!r})]))\nexcept Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f'"{path}" is Parquet, which needs pyarrow. Install it: pip install "shardwise[data]".\n'
    )


def test_a_record_file_that_holds_no_text_is_refused_and_a_folder_passes_over_it(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "", "")
    with pytest.raises(TextError, match="is empty"):
        list(documents_of([path]))
    (tmp_path / "b.txt").write_text("text")
    assert list(documents_of([tmp_path])) == ["text"]
