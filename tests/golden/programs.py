"""The small programs whose texts are kept here, and the command that accepts new ones: python -m tests.golden.programs (make golden)."""

from pathlib import Path

from shardwise.core.measurement import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.report.program_text import program_text
from shardwise.trace.trace import trace

HERE = Path(__file__).parent
PLANS = ("rowwise", "colwise", "routed", "rowwise@dtensor")
DEVICES = ("cpu", "cuda")
# every size another number, so that a line tells which it has
SPEC = ModelSpec("tiny", LlamaConfig(70, 48, 1, 4, 2, 64), "")


def path_of(plan: str, device: str) -> Path:
    return HERE / f"{plan.replace('@', '-by-')}-{device}.txt"


def text_of(plan: str, device: str) -> str:
    dtype = "bfloat16" if device == "cuda" else "float32"
    return program_text(trace(SPEC, builtin_plan(plan), Mesh.parse("tp=2"), StepSettings(3, 16, dtype=dtype), device=device))


def main() -> None:
    for plan in PLANS:
        for device in DEVICES:
            path, text = path_of(plan, device), text_of(plan, device)
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
                print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
