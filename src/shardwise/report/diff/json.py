"""RunProfile and Difference -> one JSON document; fields as in core/difference.py, times in nanoseconds. docs/diff-json.md says what each is."""

from shardwise.core.difference import Difference, RunProfile
from shardwise.report.common.document import read_as, table_of, write_document

SCHEMA_VERSION = 1


def run_json(run: RunProfile) -> bytes:
    """One run as one JSON document that ends in a newline."""
    return write_document(table_of(run))


def difference_json(difference: Difference) -> bytes:
    """Two runs and what sets them apart as one JSON document that ends in a newline."""
    return write_document(table_of(difference))


def run_from_json(document: bytes, source: str = "run") -> RunProfile:
    """A saved run, to be drawn again. Raises InputError, which names `source`, the field and what it should be."""
    return read_as(document, RunProfile, source, command="diff", what="run", version=SCHEMA_VERSION)


def difference_from_json(document: bytes, source: str = "difference") -> Difference:
    """A saved difference, to be drawn again. Raises InputError, as run_from_json does."""
    return read_as(document, Difference, source, command="diff", what="difference", version=SCHEMA_VERSION)
