"""What every HTML page of ours shares: templates whose text is escaped, tables drawn from data, JSON that is
inert, and a policy that lets only known scripts run. A page needs no network; each number is in it as text,
so it reads and prints without its script.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache

import jinja2
import msgspec
from markupsafe import Markup, escape

from shardwise.report.common import units
from shardwise.report.common.plain import name, plain, recompute_text, repeats, sentence, step_text

# sorts tables
_SCRIPT = "common/page.js"


def draw(
    template: str, sheets: Sequence[str] = (), scripts: Sequence[str] = (_SCRIPT,), **context: object
) -> str:
    """A page. sheets: style sheets beside those that all pages have; scripts: files, or the source of one.

    context: what the template needs, besides names, units and tables, which all know.
    """
    environment = page_environment()
    sources = [
        template_source(environment, each) if each.endswith(".js") and "\n" not in each else each
        for each in scripts
    ]
    css = "".join(
        template_source(environment, each) for each in ("common/page.css", "common/bars.css", *sheets)
    )
    return environment.get_template(template).render(
        css=Markup(css),
        scripts=[Markup(source) for source in sources],
        script_hash=Markup(" ".join(map(csp_hash, sources))),
        **context,
    )


@cache
def page_environment() -> jinja2.Environment:
    """Reads the templates; escapes whatever they print; fails on a name that they don't have. One for all
    pages, for it keeps what it compiled."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shardwise.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        {
            "name": name,
            "sentence": sentence,
            "plain": plain,
            "breakable": breakable,
            "step_text": step_text,
            "repeats": repeats,
            "recompute_text": recompute_text,
            "bytes": units.format_bytes,
            "seconds": units.format_seconds,
            "count": units.format_count,
            "flops": units.format_flops,
            "error": units.format_error,
            "number": units.format_number,
            "interval": units.format_interval,
            "confidence": units.format_confidence,
        }
    )
    return environment


def template_source(environment: jinja2.Environment, name: str) -> str:
    """A template file's text as it is, not rendered."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def csp_hash(script: str) -> str:
    """A script's name in a content security policy, which then lets it run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def breakable(text: str) -> Markup:
    """A text whose names may be broken after their dots and underscores."""
    return Markup(re.sub(r"([._])(?=\w)", r"\1<wbr>", str(escape(plain(text)))))


def script_json(value: object) -> Markup:
    """`value` as JSON that is inert inside <script type="application/json">: no character in it can end the
    element or a line."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
