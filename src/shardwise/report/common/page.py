"""What every HTML page of ours shares: templates whose text is escaped, JSON that is inert, and a policy that lets only known scripts run."""

import base64
import hashlib

import jinja2
import msgspec
from markupsafe import Markup


def page_environment() -> jinja2.Environment:
    """Reads the templates; escapes whatever they print; fails on a name that they don't have."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("shardwise.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def template_source(environment: jinja2.Environment, name: str) -> str:
    """A template file's text as it is, not rendered."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def csp_hash(script: str) -> str:
    """A script's name in a content security policy, which then lets it run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def script_json(value: object) -> Markup:
    """`value` as JSON that is inert inside <script type="application/json">: no character in it can end the element or a line."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
