"""The small programs whose texts are kept here, and the command that accepts new ones: python -m
tests.golden.programs (make golden).

The texts here are those of torch BASE. Where another version runs other ops, its text stands in a folder of
its name (2.15/), and only there: a program that is the same under both has one text.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.program import Program
from shardwise.models.gpt import GPTConfig
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.report.explain.program_text import program_text
from shardwise.trace.trace import trace

HERE = Path(__file__).parent
BASE = "2.13"
VERSION = ".".join(torch.__version__.split(".")[:2])
PLANS = ("rowwise", "colwise", "routed", "rowwise@dtensor")
DEVICES = ("cpu", "cuda")
# every size another number, so that a line tells which it has
SPEC = ModelSpec("tiny", LlamaConfig(70, 48, 1, 4, 2, 64), "")
GPT = ModelSpec("tiny gpt", GPTConfig(70, 48, 1, 4, 64, 20), "")


@dataclass(frozen=True, slots=True)
class Small:
    """A small program: whose step it is."""

    spec: ModelSpec
    plan: str
    device: str

    @property
    def name(self) -> str:
        family = "" if self.spec is SPEC else f"{self.spec.family}-"
        return f"{family}{self.plan.replace('@', '-by-')}-{self.device}.txt"

    def path(self, version: str = VERSION) -> Path:
        """Of the text that holds for a version of torch."""
        own = HERE / version / self.name
        return own if own.exists() else HERE / self.name

    def accept(self, text: str, version: str = VERSION) -> Path | None:
        """Makes `text` the one that holds for the version; what was written, if anything was."""
        base, own = HERE / self.name, HERE / version / self.name
        if version == BASE:
            own = base
        elif base.exists() and base.read_text() == text:
            own.unlink(missing_ok=True)
            return None
        if own.exists() and own.read_text() == text:
            return None
        own.parent.mkdir(exist_ok=True)
        own.write_text(text)
        return own

    def program(self) -> Program:
        settings = StepSettings(3, 16, dtype="bfloat16" if self.device == "cuda" else "float32")
        plan = builtin_plan(self.plan, family=self.spec.family)
        return trace(self.spec, plan, Mesh.parse("tp=2"), settings, device=self.device)

    def text(self) -> str:
        return program_text(self.program())


PROGRAMS = (
    *(Small(SPEC, plan, device) for plan in PLANS for device in DEVICES),
    Small(GPT, "rowwise", "cuda"),
)


def main() -> None:
    for program in PROGRAMS:
        path = program.accept(program.text())
        if path is not None:
            print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
