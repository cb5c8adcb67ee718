"""Explanation and Contrast <-> one JSON document, fields named as in core/explanation.py; how it is written: report/document.py.

Placements are the text that plan files have (`shard(1)`, `replicate`, `partial`). What the dataclasses work out from their fields
(`wire_bytes`, `total_wire_bytes`, `total_bytes`, `tokens`) is written too, for readers of the JSON, and ignored when it is read back.
Nothing is lost: explanation_from_json(explanation_json(e)) is e. Reading is strict about types and versions; unknown fields are ignored.
docs/explain-json.md says what each field means.
"""

from shardwise.core.explanation import Contrast, Explanation
from shardwise.report.common.document import read_as, table_of, write_document

SCHEMA_VERSION = 1


def explanation_json(explanation: Explanation) -> bytes:
    """The whole explanation as one JSON document that ends in a newline."""
    return write_document(table_of(explanation))


def contrast_json(contrast: Contrast) -> bytes:
    """The whole contrast, both explanations in it, as one JSON document that ends in a newline."""
    return write_document(table_of(contrast))


def explanation_from_json(document: bytes, source: str = "explanation") -> Explanation:
    """A saved explanation, to be drawn again. Raises InputError, which names `source`, the field and what it should be."""
    return read_as(
        document, Explanation, source, command="explain", what="explanation", version=SCHEMA_VERSION
    )


def contrast_from_json(document: bytes, source: str = "contrast") -> Contrast:
    """A saved contrast, to be drawn again. Raises InputError, as explanation_from_json does."""
    return read_as(document, Contrast, source, command="explain", what="contrast", version=SCHEMA_VERSION)
