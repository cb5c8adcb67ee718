"""Searches whose best plan nobody would guess, as data: their file, and what docs/search.md says of them. No
torch, no processes."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.hf_results import cell, table
from benchmarks.results import RESULTS, Saved, newest
from shardwise.report.common.units import format_bytes, format_seconds

WHAT = "search-examples"
# terms that are named where two plans differ, from this share of the difference on
_TERMS, _LEAST = 3, 0.1


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one search. label: what was chosen, in words. terms: (name, seconds), adding up to step_s.
    is_proved: nothing else in its space can take less. verdict: of its proof on ranks; why: there is none."""

    label: str
    step_s: float
    tokens_per_s_per_device: float
    device_bytes: float
    terms: tuple[tuple[str, float], ...]
    is_proved: bool
    verdict: str
    why: str
    candidates: int
    traces: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Example:
    """One question. guess: what one would fix without a search, in words; guessed: the best that is left
    then, or None where nothing fits, and why_not says so. others: of what comes near the best: (label,
    ratio)."""

    name: str
    about: str
    command: str
    guess: str
    best: Answer
    guessed: Answer | None
    why_not: str
    others: tuple[tuple[str, float], ...]
    decides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run(Saved):
    command: str
    started: str
    machine: str
    versions: tuple[tuple[str, str], ...]
    examples: tuple[Example, ...]
    what: str = WHAT
    schema_version: int = 1


def newest_blocks(folder: Path = RESULTS) -> dict[str, str]:
    """Of the newest file; none where there is none."""
    try:
        return blocks(newest(Run, WHAT, folder))
    except FileNotFoundError:
        return {}


def blocks(run: Run) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions)
    source = (
        f"\nPredicted for {run.machine}; {versions}.\nSource: "
        f"`benchmarks/results/{run.day}-{run.what}.json`, made by `{run.command}`.\n"
    )
    words = "\n".join(f"{told(each)}\n" for each in run.examples)
    return {f"benchmark-{WHAT}": f"{_table(run)}\n{words}{source}"}


def _table(run: Run) -> str:
    head = ["", "the best plan", "step", "the guess", "step", "times as long"]
    rows = []
    for each in run.examples:
        best, guessed = each.best, each.guessed
        ratio = f"{guessed.step_s / best.step_s:.2f}" if guessed else ""
        step = format_seconds(guessed.step_s) if guessed else "doesn't fit"
        rows.append([each.name, cell(best.label), format_seconds(best.step_s), each.guess, step, ratio])
    return table(head, rows, numbers=(2, 4, 5))


def told(example: Example) -> str:
    """An example in words: what is best, and by which terms it beats the guess."""
    best, guessed = example.best, example.guessed
    proved = (
        "proved to be the best of its space" if best.is_proved else "not proved to be the best of its space"
    )
    verdict = f"verified on ranks: {best.verdict}" if best.verdict else f"not verified: {best.why}"
    lines = [
        f"**{example.name[:1].upper()}{example.name[1:]}.** {example.about}\n",
        f"```\n{example.command}\n```\n",
        f"The best is {cell(best.label)}: {format_seconds(best.step_s)} a step, "
        f"{format_bytes(best.device_bytes)} a device; {proved}, {verdict}.",
    ]
    if guessed is None:
        lines.append(f"The guess, {example.guess}, can't be: {cell(example.why_not)}")
    else:
        lines.append(
            f"The best with the guess, {example.guess}, is {cell(guessed.label)}: {_against(best, guessed)}"
        )
    if example.others:
        other, ratio = example.others[0]
        lines.append(f"Next to the best comes {cell(other)}: {100 * (ratio - 1):.1f} % longer.")
    if example.decides:
        lines.append(f"What decides: {'; '.join(example.decides)}.")
    return "\n".join(lines)


def _against(best: Answer, guessed: Answer) -> str:
    more_s = guessed.step_s - best.step_s
    if more_s <= 0:
        return "the guess is the best."
    known = dict(best.terms)
    differences = [(term, seconds - known.get(term, 0.0)) for term, seconds in guessed.terms]
    ordered = sorted(differences, key=lambda pair: -abs(pair[1]))[:_TERMS]
    named = [
        f"{format_seconds(abs(seconds))} {'more' if seconds > 0 else 'less'} {term}"
        for term, seconds in ordered
        if abs(seconds) >= _LEAST * more_s
    ]
    share = 100 * more_s / best.step_s
    return (
        f"{format_seconds(guessed.step_s)}, {share:.1f} % longer ({', '.join(named)}), with "
        f"{format_bytes(guessed.device_bytes)} a device."
    )
