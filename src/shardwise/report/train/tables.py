"""Training -> tables and words: how a run ended, how fast it was, what its loss did, what went wrong on its
way."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from shardwise.core.training import Ended, Restart, Training, Validated, is_reached
from shardwise.report.common.plain import name, sentence
from shardwise.report.common.table import Block, Column, Columns, Line, Report, Table, Tone, Words, tabled
from shardwise.report.common.units import NUMBER, Format, format_bytes, format_seconds

_ROWS = 12
_LAST_TOLD = 3
_NUMBER = re.compile(r"\d[\d.,]*(e[+-]?\d+)?( (ms|s)\b)?")
LOSS = Format(lambda value: f"{value:.4f}", "nats")


def train_report(run: Training) -> Report:
    title = f"{name(run.model)} under {name(run.plan)} on {name(run.mesh)}, {run.device}"
    blocks: list[Block] = [Words(tuple(headline(run)), title, boxed=True)]
    if run.validated:
        blocks.append(validated_table(run))
    if run.restarts:
        blocks.append(restarts_table(run))
    if run.told:
        blocks.append(Words(tuple(told_lines(run.told)), items=True))
    return Report(title, tuple(blocks))


def headline(run: Training) -> Iterator[Line]:
    last = run.last
    if run.ended is Ended.REFUSED:
        yield Line("Nothing was trained: the plan isn't right for this model, or doesn't fit.", Tone.BAD)
        return
    done = last.step if last is not None else run.first_step
    began = f", from step {run.first_step} on" if run.first_step else ""
    if run.unsaved is not None:
        yield Line(
            f"Step {done:,} was done and couldn't be saved: {sentence(run.unsaved)} --resume goes on from an "
            "earlier checkpoint, where there is one.",
            Tone.BAD,
        )
    elif run.ended is Ended.DONE:
        yield Line(f"Done: {done:,} steps{began}, in {format_seconds(run.seconds)}.", Tone.GOOD)
    else:
        yield Line(
            f"Stopped as asked after step {done:,} of {run.steps:,}{began}, and saved. --resume goes on.",
            Tone.CAUTION,
        )
    if run.until is not None and run.validated and run.ended is Ended.DONE:
        yield _reached(run, run.until)
    if last is not None:
        held = f", {format_bytes(last.held_bytes)} held by a rank" if last.held_bytes else ""
        yield Line(f"Last step: loss {last.loss:.4f}, gradient norm {last.gradient_norm:.3g}{held}.")
    if run.step_s is not None and run.tokens_per_s is not None:
        began = (
            ""
            if run.first_step_s is None
            else f" The first was done after {format_seconds(run.first_step_s)}."
        )
        speed = f"{run.tokens_per_s:,.0f} tokens/s"
        yield Line(f"A step took {format_seconds(run.step_s)} (median): {speed}.{began}")
    if run.step_s is not None and run.predicted_s is not None:
        yield Line(
            f"Predicted for {name(run.machine or '')}: {format_seconds(run.predicted_s)}; it took "
            f"{run.step_s / run.predicted_s:.2f} times that."
        )
    yield Line(f"Checkpoints: {name(run.checkpoints)}")


def _reached(run: Training, until: float) -> Line:
    lowest = min(each.loss for each in run.validated)
    if is_reached(run):
        return Line(f"The loss on held-out text is {lowest:.4f}, as asked ({until:g} or less).", Tone.GOOD)
    return Line(f"The loss on held-out text is {lowest:.4f}, and {until:g} was asked.", Tone.BAD)


def told_lines(told: Sequence[str]) -> Iterator[Line]:
    """In their order; of those that differ in numbers alone the last few, and before them how many there
    were."""
    kinds = [_NUMBER.sub("#", line) for line in told]
    counts, met = Counter(kinds), Counter[str]()
    for line, kind in zip(told, kinds, strict=True):
        met[kind] += 1
        left_out = counts[kind] - _LAST_TOLD
        if met[kind] <= left_out:
            continue
        if left_out > 0 and met[kind] == left_out + 1:
            yield Line(
                f"The next was told {counts[kind]:,} times; here are the last {_LAST_TOLD}, and train.json "
                "has all."
            )
        yield Line(sentence(line))


def validated_table(run: Training) -> Table:
    """Evenly chosen where there are many; the last one is always there."""
    columns: Columns[Validated] = (
        (Column("step", NUMBER), lambda each: each.step),
        (Column("loss on held-out text", LOSS), lambda each: each.loss),
    )
    stride = max(1, -(-len(run.validated) // _ROWS))
    chosen = run.validated[::-1][::stride][::-1]
    return tabled(chosen, columns, key="validated", title="Validation")


def restarts_table(run: Training) -> Table:
    columns: Columns[Restart] = (
        (Column("after step", NUMBER), lambda each: each.step),
        (Column("what ended the ranks", wraps=True, spills=True), lambda each: sentence(each.why)),
    )
    return tabled(run.restarts, columns, key="restarts", title="Started again")
