"""The small programs whose texts are kept here, and the command that accepts new ones: python -m tests.golden.programs (make golden)."""

from dataclasses import dataclass
from pathlib import Path

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
    def path(self) -> Path:
        family = "" if self.spec is SPEC else f"{self.spec.family}-"
        return HERE / f"{family}{self.plan.replace('@', '-by-')}-{self.device}.txt"

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
        path, text = program.path, program.text()
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
