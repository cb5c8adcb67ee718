"""Files of records -> their texts, one at a time: JSON lines, and Parquet by pyarrow (the extra `data`).

Files are hostile until read: each error names the file and the line or record, what it is and what to do.
No code comes from a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from shardwise.core.errors import TextError
from shardwise.core.shown import shown

LONGEST_LINE = 1 << 28
_ROWS_AT_ONCE = 256
_KEYS_SHOWN = 8
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT = msgspec.json.Decoder(str)


def json_lines(path: Path, name: str, text_key: str) -> Iterator[str]:
    """The text of each line's object; lines of blanks are passed over."""
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            where = f'"{name}", line {number}'
            if len(line) > LONGEST_LINE:
                raise TextError(
                    f"{where} is longer than {LONGEST_LINE} bytes. Is this JSON lines, a record each? Cut "
                    "the record, or leave the file out."
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if record := line.strip():
                yield _json_text(record, where, text_key)


def _json_text(line: bytes, where: str, text_key: str) -> str:
    advice = "Repair the line or take it out."
    try:
        record = _OBJECT.decode(line)
        if text_key not in record:
            raise TextError(_no_key(where, text_key, tuple(record)))
        return _TEXT.decode(record[text_key])
    except msgspec.ValidationError as error:
        raise TextError(
            f"{where}: {shown(error)}. Each line is an object whose {shown(text_key)!r} is a string. {advice}"
        ) from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise TextError(f"{where}: not UTF-8: byte 0x{byte:02x}. {advice}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise TextError(
            f"{where}: not JSON: {shown(error)}. Each line is an object of its own. {advice}"
        ) from None


def _no_key(where: str, text_key: str, has: tuple[str, ...]) -> str:
    named = ", ".join(shown(key, 40) for key in has[:_KEYS_SHOWN])
    more = f" and {len(has) - _KEYS_SHOWN} more" if len(has) > _KEYS_SHOWN else ""
    return (
        f"{where}: there is no {shown(text_key)!r}; it has {named or 'nothing'}{more}. Name what holds the "
        "text with --text-key."
    )


def parquet(path: Path, name: str, text_key: str) -> Iterator[str]:
    """The text of each row's column, read a few hundred rows at a time."""
    try:
        import pyarrow
        from pyarrow import parquet as reader
    except ImportError:
        raise TextError(
            f'"{name}" is Parquet, which needs pyarrow. Install it: pip install "shardwise[data]".'
        ) from None
    where = f'"{name}"'
    row = 0
    try:
        with path.open("rb") as opened, reader.ParquetFile(opened, page_checksum_verification=True) as file:
            _check_column(file.schema_arrow, where, text_key)
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[text_key], use_threads=False):
                for value in batch.column(0):
                    yield _row_text(value, f"{where}, record {row}")
                    row += 1
            said = file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise TextError(
            f"{where}: damaged or no Parquet, after {row} records: {shown(error)}. Fetch or write it "
            "again, or leave it out."
        ) from None
    if row != said:
        raise TextError(
            f"{where}: its footer says {said} records, and {row} are there. Fetch or write it again, or "
            "leave it out."
        )


def _check_column(schema: Any, where: str, text_key: str) -> None:
    from pyarrow import types

    columns = schema.names
    if columns.count(text_key) != 1:
        raise TextError(_no_key(where, text_key, tuple(columns)))
    kind = schema.field(text_key).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise TextError(
            f"{where}: the column {shown(text_key)!r} is of {shown(kind, 40)}, and a text is of string. Name "
            "another column with --text-key."
        )


def _row_text(value: Any, where: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise TextError(
            f"{where}: not UTF-8: byte 0x{byte:02x} at offset {error.start} of its text. Write the file "
            "again with text in it, or leave it out."
        ) from None
    if not isinstance(text, str):
        raise TextError(f"{where}: its text is null. Take such records out, or leave the file out.")
    return text
