"""`shardwise verify`: prove on real ranks that a plan trains the model, or name the parameter, the rule and
the reason."""

from dataclasses import dataclass
from typing import Annotated

from shardwise.cli.asked import Call, Command, Shown, command
from shardwise.cli.progress import ProgressLine
from shardwise.core.option import Option, Paths
from shardwise.verbs.checks import DEFAULT_PLAN
from shardwise.verbs.verify import VerifyOptions
from shardwise.verbs.verify import verify as prove

DEFAULT_MODEL = "llama3-debug"


@dataclass(frozen=True, slots=True)
class _Asked(VerifyOptions):
    models: Annotated[
        tuple[str, ...],
        Option(
            "As shardwise models says; give it again for more models.",
            key="model",
            shown=DEFAULT_MODEL,
            paths=Paths.CONFIG,
        ),
    ] = ()


@command(
    Command(
        _Asked,
        shared=(
            "plans",
            "model",
            "mesh",
            "device",
            "sequence_parallel",
            "context_attention",
            "accumulation",
            "param_dtype",
            "reduce_dtype",
            "reshard_after_forward",
            "reduce_once",
            "recompute",
            "recompute_layers",
            "schedule",
            "chunks",
            "stages",
        ),
        defaults={"plans": Shown(DEFAULT_PLAN), "mesh": "tp=2", "device": "cpu"},
        about={
            "plans": "Built-in plans, TOML files, hf or hf-ep (a Hugging Face model's own), own (the "
            "factory shards itself).",
            "mesh": "Axes of ranks on this machine, such as tp=2, fsdp=2,tp=2 or dp=2,ep=2.",
            "device": "cpu (gloo), cuda (NCCL), or auto: GPUs where there are enough.",
            "sequence_parallel": "Of built-in plans.",
        },
        out="Folder for the page and the data.",
    )
)
def verify(call: Call[_Asked]) -> int:
    """Prove on real ranks that a plan trains the model it should: outputs, loss, every gradient, and two
    optimizer steps.

    The same weights run unsharded and sharded. What may differ is what rounding does to the unsharded model
    itself. What differs more is named: the parameter, the rule, and the most likely reason. Exit code 1 if a
    plan is wrong, crashes, or shards nearly nothing; with --static, if a check without ranks finds something.

    [dim]shardwise verify rowwise colwise routed[/]
    [dim]shardwise verify --model hf:qwen3 --model hf:apertus[/]
    [dim]shardwise verify rowwise --mesh fsdp=2,tp=2 --param-dtype bfloat16[/]
    [dim]shardwise verify --static --model hf:path/config.json --mesh tp=8[/]
    [dim]shardwise verify my-plan.toml --model mypackage.models:build --mesh tp=4 --out page[/]
    """
    from shardwise.launch import is_main

    with ProgressLine() as progress:
        run = prove(call.case, call.own, progress, models=call.own.models or (DEFAULT_MODEL,))
    if not is_main():
        return 0
    cases = [(each.model, each.plan) for each in run.verifications]
    call.output.deliver(run, {"cases": cases, "mesh": run.mesh, "device": run.device})
    return 1 if run.is_no else 0
