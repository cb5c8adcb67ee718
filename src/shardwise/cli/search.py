"""`shardwise search`: the best plan for a model on a machine, its runners-up, and the proof."""

from shardwise.cli.asked import Call, Command, Shown, command
from shardwise.cli.progress import ProgressLine
from shardwise.report.search.commands import plan_files
from shardwise.verbs.predict import MACHINE, SEQ
from shardwise.verbs.search import SearchOptions
from shardwise.verbs.search import search as look


@command(
    Command(
        SearchOptions,
        shared=(
            "model",
            "machine",
            "context_attention",
            "batch",
            "seq",
            "dtype",
            "param_dtype",
            "reduce_dtype",
            "reduce_once",
            "expert_load",
            "text",
            "random_ids",
        ),
        defaults={
            "model": "llama3-8b",
            "machine": MACHINE,
            "batch": Shown("a million tokens, and a sequence for each device"),
            "seq": SEQ,
        },
        about={"random_ids": "Uniform random ids instead of text, for routed plans."},
        out="Folder for the page, the data, and a plan and a case file of each plan that was found.",
    )
)
def search(call: Call[SearchOptions]) -> int:
    """Find the best plan for a model on a machine: degrees, styles, recompute and micro-batches together.

    Few pieces are traced; what a plan costs is predict's. Best first, with a bound on all that isn't
    looked at: so the first is proved to be the best in this space by this machine file. It is then
    verified on its small twin, on ranks of this machine. Ctrl-C gives the best so far. Exit code 1 where a
    plan that was found trains the model wrong.

    [dim]shardwise search --model llama3-8b --dtype bfloat16[/]
    [dim]shardwise search --model llama3-70b --devices 64 --dtype bfloat16 --batch 512 --out found[/]
    [dim]shardwise search --fix tp=8 --fix tok_embeddings=rowwise,colwise --dtype bfloat16[/]
    [dim]shardwise search --model hf:qwen3_moe --devices 16 --forbid pp=2,4,8,16 --memory 60[/]
    """
    with ProgressLine() as progress:
        found = look(call.case, call.own, progress)
    asked = {
        "model": found.model,
        "machine": found.machine.name,
        "devices": found.space.devices,
        "settings": found.settings,
        "fix": found.space.fixed,
        "forbid": found.space.forbidden,
    }
    call.output.deliver(found, asked, lambda: plan_files(found), most=call.own.top)
    return 1 if any(each.proof is not None and each.proof.verdict.is_no for each in found.found) else 0
