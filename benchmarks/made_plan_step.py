"""A training step of a Hugging Face model under the plan that Shardwise makes for it, against its own.

    python -m benchmarks.made_plan_step          writes benchmarks/results/DATE-made-plan-step.json
    python -m benchmarks.made_plan_step --dry    prints, writes nothing

Both are proved, and then timed in the same processes and rounds, by `shardwise compare`: the model that
transformers builds, with its own initialisation, fp32, real text, AdamW(fused=True), our loop. The model has
the sizes of llama3-debug. What a rank keeps between blocks is traced, with each block recomputed.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks import results
from benchmarks.results import Bar, BarKind, Result, Side, compare
from shardwise.core.case import Case
from shardwise.core.measurement import Comparison, Measurement
from shardwise.core.program import MemoryKind
from shardwise.verbs.compare import CompareOptions
from shardwise.verbs.compare import compare as measure
from shardwise.verbs.explain import explain
from shardwise.verbs.plan import plan

WHAT = "made-plan-step"
MODEL = (
    "hf:llama?num_hidden_layers=6,hidden_size=384,intermediate_size=1024,num_attention_heads=12,"
    "num_key_value_heads=4,vocab_size=32000"
)
TP, BATCH, SEQ, ROUNDS = 2, 4, 256, 15
MADE, OWN = "made", "hf"
ABOUT = {MADE: "the plan of `shardwise plan`, native engine", OWN: "transformers' own plan"}
BLOCKS = "model.layers.*"


def run(rounds: int) -> Result:
    """Both sides, proved and timed."""
    started, load_before = results.now(), results.load_average()
    given = {"model": MODEL, "mesh": f"tp={TP}", "batch": BATCH, "seq": SEQ, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{MADE}.toml")
        made = plan(Case.of(**given)).plan
        path.write_text(made.to_toml().replace(f'name = "{made.name}"\n', "", 1))
        case = Case.of(plans=(str(path), OWN), **given)
        found = measure(case, CompareOptions(rounds=rounds, repeat=False), _say).answer
        assert found is not None
        kept = [_kept(Case.of(plans=(each,), recompute="full", **given)) for each in case.plans]
    if not found.measurements:
        raise SystemExit("\n".join(found.verdict))
    sides = tuple(_side(name, each) for name, each in zip(ABOUT, found.measurements, strict=True))
    return Result(
        what=WHAT,
        settings={
            "model": "hf:llama, llama3-debug's sizes",
            "parameters": found.parameters,
            "tp": TP,
            "batch": BATCH,
            "seq": SEQ,
            "dtype": found.settings.dtype,
            "rounds": rounds,
        },
        environment=results.describe_machine(
            results.command_line(f"benchmarks.{Path(__file__).stem}"), TP, 1, (), started
        ),
        load_average=(load_before, results.load_average()),
        text=found.text,
        checks=(_proved(found), _between(*kept)),
        sides=sides,
        comparisons=(compare(sides, MADE, OWN, Bar(BarKind.SPEEDUP_AT_LEAST, 1.3)),),
        notes=(
            "transformers shards without sequence parallelism and gathers the logits; a ranking on gloo need "
            "not hold on NCCL.",
        ),
    )


def _say(text: str, done: int = 0, total: int = 0, left_s: float | None = None) -> None:
    print(text, f"({done} of {total})" if total else "")


def _side(name: str, measured: Measurement) -> Side:
    side = Side(name, ABOUT[name], measured.rank_step_s, {}, measured.losses)
    side.facts["tokens_per_s"] = BATCH * SEQ / side.median_s
    return side


def _proved(found: Comparison) -> str:
    worst = max(each.agreement.worst_gradient_error for each in found.measurements if each.agreement)
    return f"Both were proved before: all gradients within {worst:.0e} of the unsharded model's."


def _kept(case: Case) -> int:
    """Bytes of activations that a rank keeps of all blocks, each recomputed in the backward."""
    (explanation,) = explain(case).explanations
    holders = explanation.peak.holders
    return sum(
        each.n_bytes for each in holders if each.kind is MemoryKind.ACTIVATION and each.module == BLOCKS
    )


def _between(made: int, own: int) -> str:
    return (
        f"Between blocks a rank keeps {made / 2**20:.2f} MiB of activations under the made plan, "
        f"{own / 2**20:.2f} MiB under the model's own: {own / made:.2f} times as much."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{Path(__file__).stem}", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dry", action="store_true", help="print, and write no results file")
    arguments = parser.parse_args()
    result = run(arguments.rounds)
    results.show(result)
    print(*result.checks, sep="\n")
    if not arguments.dry:
        print(f"written: {result.write()}")


if __name__ == "__main__":
    main()
