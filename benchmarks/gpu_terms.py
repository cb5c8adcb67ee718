"""Steps that ran on an H100 and an H200 beside their predictions, by term as far as their files go.

    python -m benchmarks.gpu_terms     writes benchmarks/results/DATE-gpu-terms.json (three minutes)

Steps: benchmarks/data/h100-steps.json and h200-steps.json, of one rank's part without communication. What
they hold: how long a step took, and of twenty of the H100's what its attention kernels took, forward and
backward, by a profile of which nothing else was kept. So a step has two parts with both sides: attention,
and all else. What of all else is matmuls, kernels or waiting for launches isn't there; the prediction's are
listed beside it. The H200's have totals only.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from statistics import median

import msgspec

from benchmarks.hf_results import table
from benchmarks.measured_steps import STEPS, Ran, prediction_of
from benchmarks.results import Saved, command_line, newest, now
from shardwise.core.prediction import Prediction, Term
from shardwise.predict.machines import load_machine

WHAT = "gpu-terms"
FITTED_MODELS = ("llama3-8b", "llama3-70b")
"""To whose bfloat16 profiles the H100's attention rate is fitted (benchmarks/machine_files.py)."""


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds. attention_s: measured, where a profile says so. is_fitted: the machine's attention was fitted
    to it. terms: predicted, adding up to the step."""

    device: str
    tag: str
    measured_s: float
    attention_s: float | None
    is_fitted: bool
    terms: tuple[tuple[str, float], ...]

    @property
    def predicted_s(self) -> float:
        return sum(seconds for _, seconds in self.terms)

    @property
    def predicted_attention_s(self) -> float:
        return dict(self.terms)[Term.ATTENTION]

    @property
    def predicted_rest_s(self) -> float:
        """What isn't attention."""
        return self.predicted_s - self.predicted_attention_s

    @property
    def rest_s(self) -> float | None:
        """The same, measured."""
        return None if self.attention_s is None else self.measured_s - self.attention_s


@dataclass(frozen=True, slots=True)
class Terms(Saved):
    """A run of this benchmark."""

    command: str
    started: str
    steps: tuple[Step, ...]
    what: str = WHAT
    schema_version: int = 1


def newest_run() -> Terms:
    """Raises FileNotFoundError where there is none."""
    return newest(Terms, WHAT)


def steps() -> tuple[Step, ...]:
    """Every step of the files, predicted."""
    made = []
    for name, path in STEPS.items():
        machine, held = load_machine(name), json.loads(path.read_text(encoding="utf-8"))
        for each in held["steps"]:
            ran = msgspec.convert(each, Ran)
            made.append(_step(ran, prediction_of(ran, machine), _attention_s(ran, held.get("profiled", []))))
    return tuple(made)


def _step(ran: Ran, predicted: Prediction, attention_s: float | None) -> Step:
    is_fitted = attention_s is not None and ran.model in FITTED_MODELS and ran.dtype == "bfloat16"
    terms = tuple((str(term), seconds) for term, seconds in predicted.terms)
    return Step(ran.device, ran.tag, median(ran.steps), attention_s, is_fitted, terms)


def _attention_s(ran: Ran, profiled: list[dict[str, object]]) -> float | None:
    """What its profile says; None where there is none, or of no kernel that is attention's alone."""
    keys = ("model", "layers", "tp", "plan", "batch", "seq", "dtype")
    if ran.compiled or ran.fsdp > 1 or ran.recompute not in ("none", "full"):
        return None
    for each in profiled:
        is_same = all(each[key] == getattr(ran, key) for key in keys)
        if is_same and bool(each["recompute"]) is (ran.recompute == "full"):
            times = msgspec.convert(each["attention_s"], dict[str, float])
            return sum(times.values()) or None
    return None


def blocks(run: Terms) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    known = [step for step in run.steps if step.attention_s is not None]
    others = [
        term
        for term in Term
        if term is not Term.ATTENTION and any(dict(step.terms).get(term, 0.0) > 0 for step in run.steps)
    ]
    head = ["GPU", "step", "term or terms", "measured", "predicted", "error", "of that, predicted"]
    rows: list[list[str]] = []
    for step in known:
        rest_s = step.rest_s or 0.0
        name = "attention (fitted to it)" if step.is_fitted else "attention"
        gpu = step.device.split()[1]
        rows.append([gpu, step.tag, name, *_sides(step.attention_s, step.predicted_attention_s), ""])
        parts = ", ".join(
            f"{term.value} {dict(step.terms)[term] * 1e3:.1f}" for term in others if dict(step.terms)[term]
        )
        rows.append(
            ["", "", "all else", *_sides(rest_s, step.predicted_s - step.predicted_attention_s), parts]
        )
    errors = [abs(step.predicted_rest_s / step.rest_s - 1) for step in known if step.rest_s]
    own = [
        abs(step.predicted_attention_s / step.attention_s - 1)
        for step in known
        if step.attention_s is not None and not step.is_fitted
    ]
    told = (
        f"{len(known)} of {len(run.steps)} steps have a profile of their attention kernels; all else "
        f"together is off by {median(errors):.1%} (median), attention that nothing was fitted to by "
        f"{median(own):.1%} ({len(own)} steps). Of all else no file says what each kernel took, or how long "
        "the device waited for launches; nothing ran over several GPUs; the other steps, the H200's among "
        "them, have totals only (docs/predict-accuracy.md has those).\n\n"
        if known and own
        else ""
    )
    source = f"\nSource: `benchmarks/results/{run.day}-{run.what}.json`, made by `{run.command}`.\n"
    return {f"benchmark-{WHAT}": told + table(head, rows, numbers=(3, 4, 5)) + source}


def _sides(measured_s: float | None, predicted_s: float) -> tuple[str, str, str]:
    if not measured_s:
        return "–", f"{predicted_s * 1e3:.1f} ms", "–"
    return (
        f"{measured_s * 1e3:.1f} ms",
        f"{predicted_s * 1e3:.1f} ms",
        f"{predicted_s / measured_s - 1:+.0%}",
    )


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_terms", description=(__doc__ or "").partition("\n\n")[0]
    ).parse_args()
    started = now()
    run = Terms(command_line("benchmarks.gpu_terms"), started.isoformat(timespec="seconds"), steps())
    print(*blocks(run).values())
    print(f"wrote {run.write()}; now run python -m benchmarks.tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
