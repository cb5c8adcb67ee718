"""One page that needs no network."""

from shardwise.report.common.room import Room


def files(room: Room, result: object, **page: object) -> dict[str, bytes]:
    return {f"{room.name}.html": room.page(result, **page).encode()}
