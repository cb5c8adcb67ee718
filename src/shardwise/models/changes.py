"""`?KEY=VALUE,...` behind a model's name: numbers that replace some of its configuration's."""

from shardwise.core.errors import ModelError
from shardwise.core.shown import shown


def parse_changes(query: str, name: str) -> dict[str, int | float | bool]:
    """What follows the question mark, as key -> number. name: the model as it was named. Raises
    ModelError."""
    changes: dict[str, int | float | bool] = {}
    for part in query.split(",") if len(query) <= 10_000 else [query]:
        key, equals, text = part.partition("=")
        value = _number(text.strip())
        if not equals or not key.strip() or value is None:
            raise ModelError(
                f'model "{name}": can\'t read "{shown(part)}". Write KEY=VALUE with a number, true or false.'
            )
        changes[key.strip()] = value
    return changes


def _number(text: str) -> int | float | bool | None:
    if text in ("true", "false"):
        return text == "true"
    if len(text) > 40:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None
