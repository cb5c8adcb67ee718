"""Searches whose best plan nobody would guess, each beside the best that is left when one decides as one
usually does: a large vocabulary on a small body, a mixture of experts, a tied head, a memory limit that
forbids full speed.

    python -m benchmarks.search_examples              all; writes benchmarks/results/DATE-search-examples.json
    python -m benchmarks.search_examples mixture      those whose name has this in it; all others stay as the
                                                      newest file of the same versions has them

Predictions: no GPU. The best plans are verified on ranks of this machine's CPU, unless --no-verify says so.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

import torch

from benchmarks.results import newest, now
from benchmarks.search_examples_results import WHAT, Answer, Example, Run, told
from shardwise.core.case import Case
from shardwise.core.errors import ShardwiseError
from shardwise.core.search import Found, Search
from shardwise.report.search import rows
from shardwise.verbs.search import SearchOptions, search

MACHINE = "h100-sxm-80gb"
SECONDS = 600.0
COMMAND = "python -m benchmarks.search_examples"
# of what comes near the best, how many are kept
OTHERS = 4


@dataclass(frozen=True, slots=True)
class Question:
    """fix: holds for the search too; guess: for the guess alone, in words guessed."""

    name: str
    about: str
    model: str
    devices: int
    batch: int
    seq: int
    guessed: str
    guess: tuple[str, ...]
    fix: tuple[str, ...] = ()
    memory: float | None = None


QUESTIONS = (
    Question(
        "a large vocabulary on a small body",
        "Of its 1.8 B parameters 0.5 B are the table and 0.5 B the head: 256,000 tokens, 16 layers of 2,048 "
        "numbers, on one node. The logits of one sequence alone are 4 GiB in float32.",
        "llama3-8b?n_layers=16,hidden=2048,n_heads=16,n_kv_heads=8,ffn_hidden=5504,vocab_size=256000",
        8,
        64,
        4096,
        "the vocabulary, and with it the logits, cut over the node (tp=8)",
        ("tp=8",),
        ("pp=1", "dp=1", "cp=1", "micro-batch=2", "recompute=none"),
    ),
    Question(
        "a tied head",
        "The head has the table's weight: both are cut alike, or neither is.",
        "gpt3-6.7b",
        16,
        64,
        2048,
        "tensors cut over a node, copies of that over nodes (tp=8)",
        ("tp=8",),
        ("pp=1", "cp=1", "micro-batch=1,2"),
    ),
    Question(
        "a memory limit that forbids full speed",
        "A device may hold 48 GiB of its 80 GB.",
        "llama3-70b",
        64,
        128,
        4096,
        "tensors cut over the whole node (tp=8)",
        ("tp=8",),
        ("pp=1,2,4", "cp=1", "dp=1", "tp=4,8", "chunks=1", "micro-batch=1"),
        48.0,
    ),
    Question(
        "a mixture of experts",
        "128 experts, 8 of them for a token, on four nodes.",
        "qwen3-30b-a3b",
        32,
        128,
        4096,
        "experts over the 8 devices of a node (ep=8)",
        ("ep=8",),
        ("pp=1", "cp=1", "dp=1", "ep=1,8,16,32", "tp=1,2", "micro-batch=1,2"),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.search_examples", description=__doc__)
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True)
    given, started = parser.parse_args(), now()
    chosen = [question for question in QUESTIONS if given.name in question.name]
    if not chosen:
        parser.error(f"{given.name}: no example has this in its name: {', '.join(q.name for q in QUESTIONS)}")
    examples = _kept({question.name for question in chosen})
    for question in chosen:
        examples[question.name] = answered(question, does_verify=given.verify)
        print(f"\n{told(examples[question.name])}", flush=True)
        ordered = [examples[each.name] for each in QUESTIONS if each.name in examples]
        # what was found stays, should the rest be stopped
        print(f"wrote {run(started, ordered).write()}", flush=True)
    return 0


def _kept(asked: Collection[str]) -> dict[str, Example]:
    """By name, those of the newest file that aren't asked again, if it is of the same versions."""
    try:
        before = newest(Run, WHAT)
    except FileNotFoundError:
        return {}
    if before.versions != _versions():
        return {}
    return {each.name: each for each in before.examples if each.name not in asked}


def _versions() -> tuple[tuple[str, str], ...]:
    return (("torch", str(torch.__version__)),)


def run(started: datetime, examples: Sequence[Example]) -> Run:
    return Run(COMMAND, started.isoformat(timespec="seconds"), MACHINE, _versions(), tuple(examples))


def answered(question: Question, *, does_verify: bool) -> Example:
    best, best_s = _search(question, question.fix, does_verify=does_verify)
    guessed, why_not = None, ""
    try:
        guess, guess_s = _search(question, (*question.fix, *question.guess), does_verify=False)
        guessed = _answer(guess, guess_s)
    except ShardwiseError as error:
        why_not = str(error)
    first = best.found[0]
    others = [
        (rows.what_differs(each.candidate, first.candidate), each.step_s / first.step_s)
        for each in best.found[1 : 1 + OTHERS]
    ]
    tipped = [each for each in best.tippings if each.factor is not None]
    decides = [f"{each.constant}: {rows.tipping_text(each)}" for each in tipped]
    return Example(
        question.name,
        question.about,
        command(question),
        question.guessed,
        _answer(best, best_s),
        guessed,
        why_not,
        tuple(others),
        tuple(decides),
    )


def _search(question: Question, fix: Sequence[str], *, does_verify: bool) -> tuple[Search, float]:
    case = Case.of(
        model=question.model,
        mesh="tp=1",
        machine=MACHINE,
        batch=question.batch,
        seq=question.seq,
        dtype="bfloat16",
    )
    options = SearchOptions(
        devices=question.devices,
        fix=tuple(fix),
        memory=question.memory,
        seconds=SECONDS,
        top=1 + OTHERS,
        verify=does_verify,
    )
    began = time.perf_counter()
    return search(case, options, progress=_says), time.perf_counter() - began


def _says(text: str, done: int = 0, total: int = 0, left_s: float | None = None) -> None:
    print(f"\r{text.partition(chr(10))[0][:100]:<100}", end="", file=sys.stderr, flush=True)


def command(question: Question) -> str:
    """What a user types for it."""
    words = ["shardwise", "search", "--model", question.model, "--devices", str(question.devices)]
    words += ["--batch", str(question.batch), "--seq", str(question.seq), "--dtype", "bfloat16"]
    words += [] if question.memory is None else ["--memory", f"{question.memory:g}"]
    for each in question.fix:
        words += ["--fix", each]
    words += ["--seconds", f"{SECONDS:g}"]
    return shlex.join(words)


def _answer(found: Search, seconds: float) -> Answer:
    best: Found = found.found[0]
    return Answer(
        f"{best.candidate.short_mesh}, {rows.more_text(best.candidate)}",
        best.step_s,
        best.tokens_per_s_per_device,
        best.memory.device_bytes,
        tuple((term.value, seconds) for term, seconds in best.terms if seconds),
        found.is_proved,
        best.proof.verdict.value if best.proof is not None else "",
        best.why_unproved or "",
        found.candidates,
        found.traces,
        round(seconds, 1),
    )


if __name__ == "__main__":
    sys.exit(main())
