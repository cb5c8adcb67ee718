"""PredictionRun and Sweep -> one JSON document; fields as in core/prediction.py, core/prediction_run.py and core/sweep.py, seconds and bytes.

A prediction's timeline isn't in it: `--out` writes that as a trace. docs/predict-json.md says what each field is.
"""

from shardwise.core.prediction_run import PredictionRun
from shardwise.core.sweep import Sweep
from shardwise.report.common.document import read_as, table_of, write_document

SCHEMA_VERSION = 1


def prediction_json(run: PredictionRun) -> bytes:
    """The whole run as one JSON document that ends in a newline."""
    return write_document(table_of(run))


def prediction_from_json(document: bytes, source: str = "prediction") -> PredictionRun:
    """A saved run, to be drawn again. Raises InputError, which names `source`, the field and what it should be."""
    return read_as(
        document, PredictionRun, source, command="predict", what="prediction", version=SCHEMA_VERSION
    )


def sweep_json(sweep: Sweep) -> bytes:
    """The whole sweep as one JSON document that ends in a newline."""
    return write_document(table_of(sweep))


def sweep_from_json(document: bytes, source: str = "sweep") -> Sweep:
    """A saved sweep, to be drawn again. Raises InputError, as prediction_from_json does."""
    return read_as(document, Sweep, source, command="predict", what="sweep", version=SCHEMA_VERSION)
