"""The whole result as one JSON document that ends in a newline; docs/*-json.md say what each field is."""

from shardwise.files.document import write_document
from shardwise.report.common.room import Room


def files(room: Room, result: object, **page: object) -> dict[str, bytes]:
    return {f"{room.document}.json": write_document(result)}
