"""Case files: TOML with what all verbs share at the top, and a table per verb for what only that one knows.

    model = "llama3-8b"
    mesh = "tp=8"

    [compare]
    rounds = 40

A verb reads the top and its own table; of other verbs' tables it needs to know only that they are there.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, get_args

from shardwise.core.case import SHARED, Case
from shardwise.core.errors import OptionError
from shardwise.core.option import Asked
from shardwise.core.plan import suggest

_SHARED = frozenset(asked.key for asked in SHARED)
WHAT = """\
# A case: what shardwise is asked. Any verb takes it: shardwise compare --config THIS_FILE.
# Options on the command line win. A key that is commented out is the verb's to choose.
"""


def read_case(
    text: str, source: str, verb: str, own: Iterable[str], verbs: Mapping[str, Iterable[str]]
) -> dict[str, Any]:
    """What a verb finds in a case file, by key; its table's values win over those at the top.

    source: what messages call the file. own: keys that only this verb knows; they may stand at the top too,
    as they did before there were tables, but for those that all verbs share by another meaning. verbs: the
    keys of every verb. Raises OptionError for what no verb knows."""
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise OptionError(f"{source}: not valid TOML: {error}.") from None
    own = frozenset(own)
    top = {key.replace("-", "_"): value for key, value in table.items()}
    mine = top.pop(verb) if isinstance(top.get(verb), dict) else {}
    top = {key: value for key, value in top.items() if not (key in verbs and isinstance(value, dict))}
    mine = {key.replace("-", "_"): value for key, value in mine.items()}
    for where, values in ((source, top), (f"{source}: [{verb}]", mine)):
        for key, value in values.items():
            if key not in _SHARED | own:
                raise OptionError(f"{where}: {_unknown(key, verb, own, verbs)}")
            if isinstance(value, dict):
                raise OptionError(f"{where}: {key} is a table. Write a plain value.")
    shared = {key: value for key, value in top.items() if not (key in _SHARED and key in own)}
    return {**shared, **mine}


def _unknown(key: str, verb: str, own: frozenset[str], verbs: Mapping[str, Iterable[str]]) -> str:
    theirs = [name for name, keys in verbs.items() if key in keys]
    if theirs:
        return f'"{key}" is no key of {verb}. Write it in a table: [{theirs[0]}].'
    allowed = sorted(_SHARED | own)
    return f'unknown key "{key}".{suggest(key, (*allowed, *verbs))} Allowed: {", ".join(allowed)}.'


def said_by(case: Case) -> frozenset[str]:
    """Keys with something that isn't the default; the model and the mesh have none."""
    values = _flat(case)
    said = (asked.key for asked in SHARED if values[asked.key] not in (asked.default, None, ()))
    return frozenset(("model", "mesh", *said))


def case_text(
    case: Case,
    given: Iterable[str],
    verbs: Mapping[str, Iterable[Asked]],
    own: Mapping[str, Iterable[tuple[Asked, Any]]] = MappingProxyType({}),
) -> str:
    """A case as a file: each key with what it is. given: keys with a value; the others are commented out, as
    are those of each verb's table. own: what stands in a verb's table, with its values."""
    values = _flat(case)
    lines = [WHAT]
    for asked in SHARED:
        lines.append(_line(asked, values[asked.key], is_given=asked.key in given))
    for verb, keys in verbs.items():
        lines += ["", f"# [{verb}]", *(_line(asked, asked.default, is_given=False) for asked in keys)]
    for verb, pairs in own.items():
        said = [_line(asked, value, is_given=True) for asked, value in pairs]
        lines += ["", f"[{verb}]", *said] if said else []
    return "\n".join(lines) + "\n"


def _flat(case: Case) -> dict[str, Any]:
    nouns = (case, case.step, case.text)
    return {
        asked.key: next(getattr(noun, asked.field) for noun in nouns if hasattr(noun, asked.field))
        for asked in SHARED
    }


def _line(asked: Asked, value: Any, *, is_given: bool) -> str:
    shown = _toml(_empty(asked) if value is None else value)
    default = f" Default: {asked.option.shown}." if asked.option.shown and not is_given else ""
    return f"{'' if is_given else '# '}{asked.key} = {shown}  # {asked.option.about}{default}"


def _empty(asked: Asked) -> Any:
    """A value of the right type, for a key whose value the verb finds out."""
    return int(asked.option.least or 0) if int in (asked.kind, *get_args(asked.kind)) else ""


def _toml(value: Any) -> str:
    """JSON's strings, numbers and truth values are TOML too."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml(each) for each in value)}]"
    return json.dumps(value if isinstance(value, bool | int | float) else str(value), ensure_ascii=False)
