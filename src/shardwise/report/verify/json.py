"""VerificationRun -> one JSON document; fields as in core/verification.py and core/finding.py. docs/verify-json.md says what each is."""

from shardwise.core.verification import VerificationRun
from shardwise.report.common.document import read_as, table_of, write_document

SCHEMA_VERSION = 1


def verification_json(run: VerificationRun) -> bytes:
    """All cases as one JSON document that ends in a newline."""
    return write_document(table_of(run))


def verification_from_json(document: bytes, source: str = "verification") -> VerificationRun:
    """A saved run, to be drawn again. Raises InputError, which names `source`, the field and what it should be."""
    return read_as(
        document, VerificationRun, source, command="verify", what="verification", version=SCHEMA_VERSION
    )
