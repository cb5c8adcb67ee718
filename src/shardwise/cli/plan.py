"""`shardwise plan`: makes a native plan for any model, with the reason for each rule."""

from dataclasses import dataclass
from typing import Annotated

from shardwise.cli.asked import Call, Command, Shown, command
from shardwise.cli.output import JSON, OUTPUT, TERMINAL
from shardwise.cli.progress import ProgressLine
from shardwise.core.errors import OptionError
from shardwise.core.option import Option
from shardwise.report.common.streams import write_out
from shardwise.verbs.plan import SEQ, PlanOptions
from shardwise.verbs.plan import plan as make

PLAN_FILE = "plan.toml"


@dataclass(frozen=True, slots=True)
class _Asked(PlanOptions):
    toml: Annotated[bool, Option("The plan's file on stdout, nothing else.", OUTPUT)] = False


@command(
    Command(
        _Asked,
        shared=("model", "mesh", "seq", "sequence_parallel"),
        defaults={
            "model": "llama3-8b",
            "mesh": "tp=8",
            "seq": Shown(f"{SEQ}, or what the model has positions for"),
        },
        about={
            "mesh": "The tp axis that the plan is for, such as tp=8.",
            "seq": "Tokens per sequence, at which it is weighed what to cut.",
            "sequence_parallel": "Activations cut along the sequence between blocks, where the model allows "
            "it.",
        },
        panels={"sequence_parallel": "The plan", "seq": "The plan"},
        out=f"Folder for {PLAN_FILE}, the page and the data.",
    )
)
def plan(call: Call[_Asked]) -> int:
    """Make a plan for any model: what is cut and why, what stays whole and why, as a file of your own.

    The model's forward runs once, on tensors that hold nothing. Which dims of which weights go together is
    read off what it does, and the plan is made of that: heads, inner widths, the vocabulary, and the sequence
    between blocks. Nothing in it depends on the model's name.

    [dim]shardwise plan --model hf:qwen3 --mesh tp=8[/]
    [dim]shardwise plan --model hf:qwen3 --mesh tp=2 --toml > mine.toml[/]
    [dim]shardwise verify mine.toml --model hf:qwen3 --mesh tp=2[/]
    [dim]shardwise plan --model mypackage.models:build --mesh tp=4 --embedding routed --out plan[/]
    """
    own, output = call.own, call.output
    if own.toml and (output.form != TERMINAL or output.out is not None):
        other = "--out" if output.out is not None else "--json" if output.form == JSON else "--format"
        raise OptionError(f"--toml and {other} don't go together. Leave one out.")
    with ProgressLine() as progress:
        made = make(call.case, own, progress)
    if own.toml:
        write_out(made.to_toml().encode())
        return 0
    asked = {"model": made.model, "mesh": made.mesh, "embedding": own.embedding}
    output.deliver(made, asked, beside=lambda: {PLAN_FILE: made.to_toml()})
    output.say_file("Plan", PLAN_FILE)
    return 0
