"""A folder of tokens as `shardwise tokens` wrote or checked it."""

from dataclasses import dataclass

from shardwise.core.measurement import TextSummary


@dataclass(frozen=True, slots=True)
class TokenFolder:
    """text: its source is what was read, its vocab_size the tokenizer's. end_id: of the token behind each
    document, None where the tokenizer has none. bytes: of ids and documents' ends. checked: whether every
    byte was read and held against the manifest; problems: what isn't as it says."""

    folder: str
    text: TextSummary
    end_id: int | None
    dtype: str
    shards: int
    bytes: int
    checked: bool = False
    problems: tuple[str, ...] = ()
    schema_version: int = 1
