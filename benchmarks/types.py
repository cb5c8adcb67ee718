"""What the sweeps over transformers' causal language model types share: which types are asked for, and a line
for each that is answered."""

import argparse
import sys
from collections.abc import Sequence

from shardwise.core.verification import Verification
from shardwise.models.hugging_face import causal_types
from shardwise.report.verify import rows


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """Of a sweep's command line. doc: the script's own."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command}", description=(doc or "").partition("\n\n")[0]
    )
    made.add_argument("types", nargs="*", help="these types only; nothing is written then")
    return made


def asked(types: Sequence[str]) -> list[str] | None:
    """The types to go through: all if none is named. None, and a line on stderr, for names that are none."""
    known = causal_types()
    unknown = [name for name in types if name not in known]
    if unknown:
        print(f"no causal language model types: {', '.join(unknown)}", file=sys.stderr)
        return None
    return list(types or known)


def shown(proved: Verification) -> str:
    """A line: the type, the verdict, how long it took."""
    name = proved.model.removeprefix("hf:")
    return f"{name:28} {proved.verdict:22} {proved.seconds:5.1f} s  {rows.headline(proved)}"
