"""RunProfile and Difference -> one JSON document; fields as in core/difference.py, times in nanoseconds. docs/diff-json.md says what each is."""

from shardwise.core.difference import Difference, RunProfile
from shardwise.report.document import table_of, write_document


def run_json(run: RunProfile) -> bytes:
    """One run as one JSON document that ends in a newline."""
    return write_document(table_of(run))


def difference_json(difference: Difference) -> bytes:
    """Two runs and what sets them apart as one JSON document that ends in a newline."""
    return write_document(table_of(difference))
