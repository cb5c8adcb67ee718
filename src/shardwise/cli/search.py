"""`shardwise search`: the best plan for a model on a machine, its runners-up, and the proof."""

from dataclasses import replace

from shardwise.cli.asked import Call, Command, Shown, command
from shardwise.cli.predict import said_of
from shardwise.cli.progress import ProgressLine
from shardwise.core.errors import OptionError
from shardwise.core.named_path import case_for_file
from shardwise.core.search import Search
from shardwise.predict.machines import SUFFIX
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
        out="Folder for the page, the data, a plan and a case file of each plan that was found, and what "
        "--export writes.",
    )
)
def search(call: Call[SearchOptions]) -> int:
    """Find the best plan for a model on a machine: degrees, styles, recompute and micro-batches together.

    Few pieces are traced; what a plan costs is predict's. Best first, with a bound on all that isn't
    looked at: so the first is proved to be the best in this space by this machine file. It is then
    verified on its small twin, on ranks of this machine. Ctrl-C gives the best so far. --export writes it
    for a framework, and with --top as many runners-up, each of which is verified first. Exit code 1 where
    no plan was found, or one trains the model wrong.

    [dim]shardwise search --model llama3-8b --dtype bfloat16[/]
    [dim]shardwise search --model llama3-70b --devices 64 --dtype bfloat16 --batch 512 --out found[/]
    [dim]shardwise search --fix tp=8 --fix tok_embeddings=rowwise,colwise --dtype bfloat16[/]
    [dim]shardwise search --model hf:qwen3_moe --devices 16 --forbid pp=2,4,8,16 --memory 60[/]
    [dim]shardwise search --model hf:qwen3 --dtype bfloat16 --export pytorch --top 2 --out found[/]
    """
    if call.own.export is not None and call.output.out is None:
        raise OptionError(f"--export {call.own.export}: needs a folder for its files. Add --out FOLDER.")
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
    there = case_for_file(call.case, call.output.out)
    if there.model != call.case.model:
        found = replace(found, model_there=there.model)
    machine = there.machine if there.machine is not None and there.machine.endswith(SUFFIX) else ""
    own = {"predict": said_of(call.own)}
    call.output.deliver(
        found, asked, lambda: plan_files(found, machine, there.text, own), most=call.own.given_out
    )
    return exit_code(found)


def exit_code(found: Search) -> int:
    return 1 if not found.found or any(each.is_wrong for each in found.found) else 0
