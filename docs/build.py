"""Writes the generated parts of the docs.

Whole pages: cli.md from the commands themselves, models.md from the specs, VERB-json.md from the dataclasses
that are written. Blocks, between `<!-- begin:VERB-output -->` and `<!-- end:VERB-output -->` in the README
and in any page: what a command printed, made from the file of its run in docs/example.

python docs/build.py             writes them
python docs/build.py --check     writes nothing; exit code 1 where a document differs
python docs/build.py --picture   also takes the pictures of the examples' pages (needs Chromium)
python docs/build.py --diff RUN  first makes the example of docs/diff.md anew, from the folder of a `compare
rowwise rowwise@dtensor --profile` (needs
                                 Chromium)
python docs/build.py --walkthrough  also runs styles on toys and takes the pictures of their
decisive steps (needs Chromium)
"""

import argparse
import dataclasses
import functools
import inspect
import io
import operator
import re
import shutil
import subprocess
import sys
import tempfile
import types
import typing
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer
import ways
from rich.console import Console, RenderableType

from shardwise.cli.main import app
from shardwise.core.beside import Beside
from shardwise.core.difference import Difference, RunProfile
from shardwise.core.dims import Dims
from shardwise.core.explanation import Contrast, Explanation
from shardwise.core.export import Export
from shardwise.core.look_up import LookUps
from shardwise.core.made_plan import MadePlan
from shardwise.core.measurement import Comparison
from shardwise.core.mesh import AXES
from shardwise.core.placement import Placement
from shardwise.core.plan import Plan
from shardwise.core.prediction_run import PredictionRun
from shardwise.core.rule import RuleRef
from shardwise.core.search import Search
from shardwise.core.sweep import Sweep
from shardwise.core.training import Training
from shardwise.core.verification import VerificationRun
from shardwise.files.document import read_document, worked_out, write_document
from shardwise.models import specs
from shardwise.models.gpt import GPTConfig
from shardwise.models.llama import LlamaConfig
from shardwise.models.moe import MoEConfig
from shardwise.models.source import NAMINGS
from shardwise.models.specs import SPECS, ModelSpec
from shardwise.profiles.collectives import share
from shardwise.profiles.diff import diff
from shardwise.profiles.picture import picture
from shardwise.profiles.ranks import read_ranks, trace_files
from shardwise.profiles.run import profile_run
from shardwise.report.common.deliver import show
from shardwise.report.common.formats.terminal import drawn
from shardwise.report.common.room import room_of
from shardwise.report.common.table import Table
from shardwise.report.compare.html import comparison_html
from shardwise.report.diff.html import difference_html
from shardwise.report.explain.html import explanation_html
from shardwise.report.plan.html import plan_html
from shardwise.report.predict.html import prediction_html
from shardwise.report.search.html import search_html
from shardwise.report.train.html import train_html
from shardwise.report.verify.html import verification_html
from shardwise.report.walkthrough.html import walkthrough_html
from shardwise.verbs.compare import TRACES
from shardwise.walkthrough.record import record_walkthrough
from shardwise.walkthrough.words import explain_walkthrough

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
EXAMPLE = DOCS / "example" / "comparison.json"
EXPLAINED = DOCS / "example" / "explanation.json"
DIFFERED = DOCS / "example" / "diff.json"
VERIFIED = DOCS / "example" / "verification.json"
PREDICTED = DOCS / "example" / "prediction.json"
EXPORTED = DOCS / "example" / "export.json"
PLANNED = DOCS / "example" / "plan.json"
SEARCHED = DOCS / "example" / "search.json"
TRAINED = DOCS / "example" / "training.json"
WIDTH = 100
# the pictures' window in pixels: a height that just holds the step
WALKTHROUGH_WIDTH = 1160
WALKTHROUGH_HEIGHTS = {
    "embedding/rowwise": 890,
    "embedding/colwise": 770,
    "embedding/routed": 730,
    "embedding/replicated": 1110,
    "experts/experts": 830,
    "attention/ring": 770,
}
# the step of a walk-through in which rows travel, where it isn't the first that sends something
WALKTHROUGH_STEPS = {"experts/experts": 4}
_BLOCK = re.compile(r"<!-- begin:(?P<name>\w+-output) -->\n.*?<!-- end:(?P=name) -->", re.DOTALL)


def cli_reference() -> str:
    """Every command with every option, as the commands themselves tell."""
    lines = ["# Commands", "", "Made from the code by `python docs/build.py`.", ""]
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        help_text, _, examples = (command.help or "").partition("[dim]")
        lines += [f"## shardwise {name}", "", help_text.strip(), ""]
        if examples:
            shown = re.sub(r"\[/?dim\]|\[/\]", "", examples)
            lines += ["```", *[line.strip() for line in shown.splitlines() if line.strip()], "```", ""]
        lines += ["| option | meaning | default |", "|---|---|---|"]
        offered = [
            each for each in command.params if not getattr(each, "hidden", False) and each.name != "help"
        ]
        lines += [_row(parameter) for parameter in offered]
        lines.append("")
    lines += ["## Axes of a mesh", "", "Outermost first; neighbouring ranks differ in the last one.", ""]
    lines += ["| axis | is | cut over it | a step runs over it | is predicted over it |"]
    lines += ["|---|---|---|---|---|"]
    for axis in AXES:
        runs, predicted = ("yes" if can else "not yet" for can in (axis.runs, axis.predicted))
        lines.append(f"| `{axis.name}` | {axis.about} | {axis.cuts} | {runs} | {predicted} |")
    lines += [
        "",
        "Exit codes: 0 fine; 1 the answer is no (a plan doesn't agree with the unsharded model); 2 the "
        "input is wrong; 3 a rank died or the run could not go on; 130 Ctrl-C.",
        "",
    ]
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    names = (
        f"`{parameter.name.upper()}`"
        if is_argument
        else ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
    )
    default = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    shown = (
        ""
        if default is None or default is False
        else str(default).lower()
        if default is True
        else str(default)
    )
    return f"| {names} | {(parameter.help or '').replace('|', '/')} | {shown} |"


def models_reference() -> str:
    """The specs and how else a model is named."""
    lines = [
        "# Models",
        "",
        "Made from the code by `python docs/build.py`; `shardwise models` prints the same.",
        "",
        "| model | | parameters | layers | hidden | heads/KV | inner width | vocabulary | longest sequence "
        "| head |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for spec in SPECS.values():
        c = spec.config
        lines.append(
            f"| `{spec.name}` | {spec.about} | {c.n_parameters:,} | {c.n_layers} | {c.hidden:,} | "
            f"{c.n_heads}/{c.n_kv_heads} | {_inner_width(c)} | {c.vocab_size:,} | "
            f"{f'{spec.max_seq:,}' if spec.max_seq else 'any'} | {'tied' if c.tied else 'untied'} |"
        )
    (changed, about), *others = NAMINGS
    first, gpt, moe = next(iter(SPECS.values())), SPECS["gpt3-175b"], SPECS["qwen3-30b-a3b"]
    lines += [
        "",
        inspect.cleandoc(specs.__doc__ or "").partition("\n\n")[2].replace("\n", " "),
        "",
        f"**Other sizes**: `{changed}` is {about}:",
        f"a head's width and the ratio stay, unless you name those too. Llama's keys: {_keys(first)}.",
        f"GPT's: {_keys(gpt)}.",
        f"A mixture's, beside Llama's: {_keys(moe, first)}. `head_width` and `qk_norm` where the "
        "model has them; `capacity` drops what is beyond so many times an expert's even share of a "
        "sequence, 0 nothing; `aux_loss` is the coefficient of a loss that balances load, over all ranks' "
        "tokens.",
        "",
        "**A tied head** is refused by PyTorch's own styles (`NAME@dtensor`), which would untie it; "
        "`gpt-debug?tied=false` has another.",
        "",
        "**Not modelled**: dropout, which the published GPT runs had.",
        "",
        "**Any model**: every command also takes these ([more](hugging-face.md)):",
        "",
        "| form | what it is |",
        "|---|---|",
        *(f"| `{form}` | {about} |" for form, about in others),
        "",
    ]
    return "\n".join(lines)


def _inner_width(config: LlamaConfig | GPTConfig) -> str:
    width = f"{config.ffn_hidden:,}"
    if isinstance(config, MoEConfig):
        return f"{config.n_experts} experts of {width}, {config.top_k} for a token"
    return width


def _keys(spec: ModelSpec, beside: ModelSpec | None = None) -> str:
    known = beside.numbers if beside is not None else {}
    return ", ".join(f"`{key}`" for key in spec.numbers if key not in known)


def explain_json_reference() -> str:
    """The fields of `shardwise explain --json`, as the dataclasses that are written tell."""
    return _json_reference(
        "explain",
        [
            "`shardwise explain PLAN --json` prints one Explanation; `--against PLAN` prints one Contrast, "
            "which holds both plans' Explanations. Bytes",
            "are bytes. A placement is the text that a plan file has: `shard(0)`, `replicate` or "
            '`partial`. A number that isn\'t finite is `"NaN"`,',
            '`"Infinity"` or `"-Infinity"`. Fields marked *worked out* follow from the others and are '
            "ignored when a document is read back",
            "(`read_document` in `shardwise.files.document`); fields that a reader doesn't know are to be "
            "ignored.",
        ],
        "shardwise explain rowwise --json | jq '.wire_bytes, (.collectives[] | [.phase, .module, .kind, "
        ".count, .total_wire_bytes])'",
        [Explanation, Contrast],
    )


def compare_json_reference() -> str:
    """The fields of `shardwise compare --json`."""
    return _json_reference(
        "compare",
        [
            "`shardwise compare --json` prints one Comparison. Times are seconds, bytes are bytes; what "
            "was not measured is `null`,",
            "never 0. Fields marked *worked out* follow from the others; fields that a reader doesn't know "
            "are to be ignored.",
        ],
        "shardwise compare --json | jq -r '.standings[] | [.label, .step_s, .ratio.median] | @tsv'",
        [Comparison],
    )


def diff_json_reference() -> str:
    """The fields of `shardwise diff --json`."""
    return _json_reference(
        "diff",
        [
            "`shardwise diff RUN --json` prints one RunProfile; `shardwise diff RUN OTHER --json` one "
            "Difference, which holds both; of a prediction and a run one Beside. Times are",
            "nanoseconds; those of parts, lines and uses are per step of one rank, means over all steps of "
            "all ranks. Fields marked *worked out*",
            "follow from the others; fields that a reader doesn't know are to be ignored.",
        ],
        "shardwise diff traces-a traces-b --json | jq -r '.verdict[], (.lines[:5][] | [.what, .delta_ns / "
        "1e6] | @tsv)'",
        [RunProfile, Difference, Beside],
    )


def verify_json_reference() -> str:
    """The fields of `shardwise verify --json`."""
    return _json_reference(
        "verify",
        [
            "`shardwise verify --json` prints one VerificationRun, with a Verification for each model "
            "under each plan. Errors are relative: the norm of",
            'the difference over the norm of the unsharded one. A number that isn\'t finite is `"NaN"`, '
            '`"Infinity"` or `"-Infinity"`. Fields marked',
            "*worked out* follow from the others; fields that a reader doesn't know are to be ignored. "
            "Exit code 1: `is_no` is true.",
        ],
        "shardwise verify --model hf:apertus --json | jq -r '.verifications[] | .verdict, (.findings[] | "
        "[.subject, .cause, .relative_error] | @tsv)'",
        [VerificationRun],
    )


def predict_json_reference() -> str:
    """The fields of `shardwise predict --json`."""
    return _json_reference(
        "predict",
        [
            "`shardwise predict --json` prints one PredictionRun, with a Prediction for each plan; "
            "`--sweep` one Sweep, `--look-up` one LookUps. Times are seconds, sizes bytes. A",
            "prediction's timeline isn't in it: `--out` writes that as a trace. Fields marked *worked out* "
            "follow from the others; fields that a",
            "reader doesn't know are to be ignored. Exit code 1: `fits` is false, or nothing that a sweep "
            "found fits.",
        ],
        "shardwise predict rowwise colwise --json | jq -r '.predictions[] | [.plan, .step_s, "
        ".memory.device_bytes] | @tsv'",
        [PredictionRun, Sweep, LookUps],
    )


def search_json_reference() -> str:
    """The fields of `shardwise search --json`."""
    return _json_reference(
        "search",
        [
            "`shardwise search --json` prints one Search: `found` has the best plan first, `considered`",
            "every candidate that has a number of its own. Times are seconds, sizes bytes. A plan is a text",
            "as in its file. Fields marked *worked out* follow from the others; fields that a reader doesn't",
            "know are to be ignored. Exit code 1: nothing was found, or the best plan is proved to train the",
            "wrong model.",
        ],
        "shardwise search --model llama3-70b --devices 64 --json | jq -r '.is_proved, .gap, (.found[] | "
        "[.candidate.label, .step_s, .is_tie] | @tsv)'",
        [Search],
    )


def train_json_reference() -> str:
    """The fields of `shardwise train --json`."""
    return _json_reference(
        "train",
        [
            "`shardwise train --json` prints one Training when the run has ended; `steps.jsonl` in its",
            "folder has a StepRecord a line, as steps are done. Losses are in nats, times in seconds,",
            "sizes in bytes. Fields that a reader doesn't know are to be ignored. Exit code 1: nothing was",
            "trained, for the plan is wrong or doesn't fit, or the loss of --until wasn't reached; 3: ranks",
            "failed, or the last step couldn't be saved; 4: the run was asked to stop, and has saved.",
        ],
        "jq -r '[.step, .loss, .validation_loss] | @tsv' run/steps.jsonl",
        [Training],
    )


def plan_json_reference() -> str:
    """The fields of `shardwise plan --json`."""
    return _json_reference(
        "plan",
        [
            "`shardwise plan --json` prints one MadePlan; `shardwise explain --dims --json` one Dims, which",
            "a MadePlan holds too. `plan` is the text of the plan's file, without its comments. Patterns",
            "have `*` for the number of a layer. Fields marked *worked out* follow from the others; fields",
            "that a reader doesn't know are to be ignored.",
        ],
        "shardwise plan --model hf:qwen3 --json | jq -r '.dims.classes[] | select(.is_cut) | [.name, .units, "
        ".where] | @tsv'",
        [MadePlan, Dims],
    )


def export_json_reference() -> str:
    """The fields of `shardwise export --json`."""
    return _json_reference(
        "export",
        [
            "`shardwise export --json` prints one Export: the files as text, what the format can't say, and",
            "what that costs. Fields that a reader doesn't know are to be ignored.",
        ],
        "shardwise export rowwise --as pytorch --json | jq -r '.files[0].text'",
        [Export],
    )


def planned() -> MadePlan:
    """The example of docs/plan.md: `shardwise plan --model hf:qwen3 --mesh tp=8 --json`."""
    return read_document(PLANNED.read_bytes(), MadePlan, str(PLANNED))


def plan_output() -> str:
    """What `shardwise plan` printed for the example."""
    return _shown(planned())


def export_output() -> str:
    """The example of docs/export.md: `shardwise export mine.toml --as hf --model hf:qwen3 --mesh fsdp=8,tp=8
    --param-dtype bfloat16 --reduce-dtype float32 --seq 4096 --json`, its plan made by `shardwise plan`."""
    return _shown(read_document(EXPORTED.read_bytes(), Export, str(EXPORTED)))


def dims_output() -> str:
    """What `shardwise explain --dims` prints for the example's model."""
    return _shown(planned().dims)


def toml_output() -> str:
    """The example's file, down to the first layer's feed-forward."""
    before, rule, _ = planned().to_toml().partition('"model.layers.*.mlp.gate_proj"')
    assert rule
    return f"```toml\n{before.rpartition(chr(10) + '#')[0]}\n...\n```\n"


def _shown(result: object) -> str:
    console = Console(width=WIDTH, file=io.StringIO(), record=True, no_color=True)
    show(result, "terminal", console)
    return _fenced(console.export_text())


def predict_output() -> str:
    """docs/predict.md's example, as the terminal shows its file."""
    console = Console(width=WIDTH, file=io.StringIO(), record=True, no_color=True)
    show(read_document(PREDICTED.read_bytes(), PredictionRun, str(PREDICTED)), "terminal", console)
    return _fenced(console.export_text())


def searched() -> Search:
    """The example of docs/search.md: `shardwise search --model llama3-8b --dtype bfloat16 --batch 32 --fix
    tp=8 --fix micro-batch=1,2 --json`."""
    return read_document(SEARCHED.read_bytes(), Search, str(SEARCHED))


def search_output() -> str:
    """What `shardwise search` printed for the example."""
    return _shown(searched())


def trained() -> Training:
    """The example of docs/tutorial.md: `shardwise train rowwise --mesh tp=2 --batch 8 --seq 128 --steps 400
    --learning-rate 0.001 --warmup 20 --validate-every 20 --held-out 32 --until 6.3 --out trained`; the file
    is trained/train.json."""
    return read_document(TRAINED.read_bytes(), Training, str(TRAINED))


def train_output() -> str:
    """What `shardwise train` printed for the example."""
    return _shown(trained())


def verify_output() -> str:
    """docs/verify.md's example, as the terminal shows its file."""
    run = read_document(VERIFIED.read_bytes(), VerificationRun, str(VERIFIED))
    console = Console(width=WIDTH, file=io.StringIO(), record=True, no_color=True)
    show(run, "terminal", console)
    text = "\n".join(line.rstrip() for line in console.export_text().rstrip().splitlines())
    return f"```\n{text}\n```\n"


def _json_reference(command: str, intro: list[str], example: str, found: list[type]) -> str:
    lines = [
        f"# The JSON of `shardwise {command}`",
        "",
        "Made from the code by `python docs/build.py`.",
        "",
        *intro,
        "",
        "```sh",
        example,
        "```",
        "",
    ]
    for kind in found:
        lines += [
            f"## {kind.__name__}",
            "",
            inspect.cleandoc(kind.__doc__ or ""),
            "",
            "| field | JSON |",
            "|---|---|",
        ]
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            lines.append(f"| `{field.name}` | {_json_type(hints[field.name], found)} |")
        for name in worked_out(kind):
            shown = _json_type(typing.get_type_hints(getattr(kind, name).fget)["return"], found)
            lines.append(
                f"| `{name}` | {shown}, *worked "
                f"out*{'. ' if getattr(kind, name).__doc__ else ''}{getattr(kind, name).__doc__ or ''} |"
            )
        lines.append("")
    return "\n".join(lines)


def _json_type(kind: Any, found: list[type]) -> str:
    """A type as its JSON, in words; dataclasses that are new go into `found`."""
    choices = set(typing.get_args(kind)) if isinstance(kind, types.UnionType) else {kind}
    if types.NoneType in choices:
        rest = functools.reduce(
            operator.or_, (choice for choice in typing.get_args(kind) if choice is not types.NoneType)
        )
        return f"{_json_type(rest, found)}, or null"
    if choices == set(typing.get_args(Placement)):
        return "placement"
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if inner[-1] is Ellipsis:
            return f"array of {_json_type(inner[0], found)}"
        return f"[{', '.join(_json_type(item, found) for item in inner)}]"
    if kind in (RuleRef, Plan):
        return "string"
    if typing.get_origin(kind) is Mapping:
        return f"object of {_json_type(typing.get_args(kind)[1], found)}"
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind not in found:
            found.append(kind)
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return f"one of ({', '.join(f'`{member.value}`' for member in kind)})"
    return {int: "integer", float: "number", str: "string", bool: "true or false"}[kind]


def compare_output() -> str:
    """What `shardwise compare` printed for the example, without colour; the table of collectives is left to
    the report."""
    comparison = read_document(EXAMPLE.read_bytes(), Comparison, str(EXAMPLE))
    blocks = room_of(comparison).report(comparison).blocks
    parts = [_printed(drawn(block, WIDTH)) for block in blocks]
    return _fenced("\n".join(part for part in parts if not part.lstrip().startswith("Collectives")))


def explain_output() -> str:
    """What `shardwise explain` printed for the example, without colour, down to the collectives of the
    forward."""
    explanation = read_document(EXPLAINED.read_bytes(), Explanation, str(EXPLAINED))
    printed = []
    for block in room_of(explanation).report(explanation).blocks:
        if isinstance(block, Table):
            forward = tuple(row for row in block.rows if row.cells[1].value == "forward")
            printed.append(_printed(drawn(replace(block, rows=forward, notes=()), WIDTH)))
            break
        printed.append(_printed(drawn(block, WIDTH)))
    return _fenced("\n".join(printed) + "\n...")


def _printed(part: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(part)
    return captured.get()


def _fenced(printed: str) -> str:
    return "```\n" + "\n".join(line.rstrip() for line in printed.splitlines()).strip() + "\n```\n"


def diff_output() -> str:
    """The first part of what `shardwise diff` printed, for docs/diff.md."""
    difference = read_document(DIFFERED.read_bytes(), Difference, str(DIFFERED))
    console = Console(file=io.StringIO(), width=WIDTH, record=True)
    show(difference, "terminal", console)
    printed = console.export_text().partition(f"Collectives of {difference.first.label}")[0]
    return "```\n" + "\n".join(line.rstrip() for line in printed.splitlines()).strip() + "\n...\n```\n"


def take_diff_example(run: Path) -> None:
    """From the folder of `shardwise compare rowwise rowwise@dtensor --profile`: the example's file, and the
    picture of its page."""
    read = []
    for label in ("rowwise", "rowwise@dtensor"):
        timelines, sharing = share(read_ranks(trace_files(run / TRACES / label)))
        # each single collective would be most of the file, and isn't shown
        profiled = profile_run(label, timelines, dataclasses.replace(sharing, collectives=()))
        whole = profile_run(label, timelines, sharing)
        read.append((dataclasses.replace(whole, sharing=profiled.sharing), picture(label, timelines)))
    difference = diff(read[0][0], read[1][0])
    DIFFERED.write_bytes(write_document(difference))
    page = difference_html(difference, [drawn for _, drawn in read if drawn is not None])
    take_picture(page, DOCS / "example" / "diff.png", 1200, 1950)


def take_picture(page: str, target: Path, width: int, height: int, address: str = "") -> None:
    """A picture of what a window shows of a page, opened at `#address`."""
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
        None,
    )
    if browser is None:
        raise SystemExit(
            "docs/build.py: no Chromium found. Install it, or leave --picture and --walkthrough out."
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
        ]
        subprocess.run(
            [
                browser,
                *options,
                "--force-prefers-reduced-motion",
                f"--user-data-dir={folder}/profile",
                f"--window-size={width},{height}",
                "--virtual-time-budget=8000",
                f"--screenshot={target}",
                f"{file.as_uri()}#{address}",
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )


def take_walkthrough_pictures() -> None:
    """The step in which rows travel."""
    (DOCS / "walkthrough").mkdir(exist_ok=True)
    walkthroughs = [explain_walkthrough(record_walkthrough(subject)) for subject in WALKTHROUGH_HEIGHTS]
    page = walkthrough_html(walkthroughs)
    for explained in walkthroughs:
        first = next(index for index, step in enumerate(explained.steps, start=1) if step.transfers)
        number = WALKTHROUGH_STEPS.get(explained.subject, first)
        name = explained.subject.rpartition("/")[2]
        height = WALKTHROUGH_HEIGHTS[explained.subject]
        take_picture(
            page,
            DOCS / "walkthrough" / f"{name}.png",
            WALKTHROUGH_WIDTH,
            height,
            f"{explained.subject}/{number}",
        )


OUTPUTS = {
    "compare-output": compare_output,
    "diff-output": diff_output,
    "explain-output": explain_output,
    "dims-output": dims_output,
    "export-output": export_output,
    "plan-output": plan_output,
    "predict-output": predict_output,
    "search-output": search_output,
    "toml-output": toml_output,
    "train-output": train_output,
    "verify-output": verify_output,
}
"""What a command printed, by the name of the block in a document that it fills."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--walkthrough", action="store_true")
    parser.add_argument("--diff", type=Path, metavar="RUN")
    arguments = parser.parse_args()
    if arguments.diff is not None:
        take_diff_example(arguments.diff)
    wanted = {
        DOCS / "cli.md": cli_reference(),
        DOCS / "models.md": models_reference(),
        DOCS / "compare-json.md": compare_json_reference(),
        DOCS / "explain-json.md": explain_json_reference(),
        DOCS / "diff-json.md": diff_json_reference(),
        DOCS / "verify-json.md": verify_json_reference(),
        DOCS / "predict-json.md": predict_json_reference(),
        DOCS / "search-json.md": search_json_reference(),
        DOCS / "train-json.md": train_json_reference(),
        DOCS / "plan-json.md": plan_json_reference(),
        DOCS / "export-json.md": export_json_reference(),
        ways.PICTURE: ways.picture(),
    }
    for path in sorted([README, *DOCS.glob("*.md")]):
        text = path.read_text(encoding="utf-8") if path not in wanted else wanted[path]
        wanted[path] = _BLOCK.sub(
            lambda block: (
                f"<!-- begin:{block['name']} -->\n{OUTPUTS[block['name']]()}<!-- end:{block['name']} -->"
            ),
            text,
        )
    stale = [
        path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if arguments.check:
        for path in stale:
            print(
                f"docs/build.py: {path.relative_to(DOCS.parent)} differs from what the code says. Run: "
                "make docs",
                file=sys.stderr,
            )
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    if arguments.picture:
        comparison = read_document(EXAMPLE.read_bytes(), Comparison, str(EXAMPLE))
        take_picture(comparison_html(comparison), DOCS / "example" / "report.png", 1200, 1750)
        explanation = read_document(EXPLAINED.read_bytes(), Explanation, str(EXPLAINED))
        take_picture(explanation_html(explanation), DOCS / "example" / "explain.png", 1200, 1500)
        verification = read_document(VERIFIED.read_bytes(), VerificationRun, str(VERIFIED))
        take_picture(verification_html(verification), DOCS / "example" / "verify.png", 1200, 1300)
        predicted = read_document(PREDICTED.read_bytes(), PredictionRun, str(PREDICTED))
        take_picture(prediction_html(predicted), DOCS / "example" / "predict.png", 1200, 1450)
        take_picture(search_html(searched()), DOCS / "example" / "search.png", 1200, 2000)
        take_picture(train_html(trained()), DOCS / "example" / "train.png", 1200, 1500)
        take_picture(plan_html(planned()), DOCS / "example" / "plan.png", 1200, 1330)
    if arguments.walkthrough:
        take_walkthrough_pictures()
    return 0


if __name__ == "__main__":
    sys.exit(main())
