"""What of a Search stands together in a report, in words: the plan, how sure it is, what sets others apart.

Adds up and looks up, no more. What it does not know: how a row is drawn."""

import math
from collections.abc import Iterator, Sequence

from shardwise.core.prediction import MemoryForecast, Term
from shardwise.core.search import CUT, SEQUENCE, WHOLE, Candidate, Considered, Found, Search, Tipping
from shardwise.core.verification import Verdict
from shardwise.report.common.plain import name, sentence
from shardwise.report.common.table import Line, Tone
from shardwise.report.common.units import (
    format_bytes,
    format_count,
    format_ratio,
    format_seconds,
    format_share,
)
from shardwise.report.predict.rows import memory_rows
from shardwise.report.search.picture import NEAR_BEST, Picture
from shardwise.report.verify.rows import verdict_text
from shardwise.report.verify.tables import TONES

# terms that are named where a runner-up is told from the best
COSTS = 2
# of what a device holds, what is named
LEAST_SHARE = 0.01
# between which factors a constant is tried: Tipping says so
TRIED = "between a quarter and 4 times"


def title(search: Search) -> str:
    what = "The best plan so far" if search.stopped else "The best plan" if search.found else "No plan"
    devices = counted(search.space.devices, "device")
    return f"{what} for {name(search.model)} on {devices} of {name(search.machine.name, '(machine)')}"


def counted(count: int, what: str, many: str | None = None) -> str:
    """`1 device`, `2,048 devices`."""
    return f"{count:,} {what if count == 1 else many or f'{what}s'}"


def plan_lines(found: Found) -> tuple[Line, ...]:
    """The decisions, a line a kind."""
    chosen = found.candidate
    return (
        Line(chosen.short_mesh, Tone.STRONG, "Mesh:"),
        Line(styles_text(chosen), lead="Styles:"),
        Line(step_text(chosen), lead="Step:"),
    )


def styles_text(chosen: Candidate) -> str:
    """`attention, feed_forward cut; norms whole; tok_embeddings rowwise; the sequence cut between blocks`."""
    if not chosen.styles:
        return "no layer is cut: tp is 1"
    by_option: dict[str, list[str]] = {}
    for group, option in chosen.styles:
        if group != SEQUENCE:
            by_option.setdefault(option, []).append(name(group))
    order = sorted(by_option, key=lambda option: (option != CUT, option != WHOLE))
    told = [f"{', '.join(by_option[option])} {name(option)}" for option in order]
    sequence = {CUT: "the sequence cut between blocks", WHOLE: "the sequence whole"}
    asked = chosen.style(SEQUENCE)
    return "; ".join([*told, *([sequence.get(asked, f"the sequence {name(asked)}")] if asked else [])])


def step_text(chosen: Candidate) -> str:
    """`8 micro-batches of 1 sequence · full recompute of 20 layers · 1f1b`."""
    said = [micro_text(chosen), recompute_text(chosen)]
    if chosen.mesh.stages > 1:
        said.append(f"schedule {name(chosen.schedule or '1f1b')}")
    if chosen.chunks > 1:
        said.append(f"{chosen.chunks} chunks of layers a stage")
    if chosen.mesh.fsdp > 1:
        said.append(reshard_text(chosen))
    return " · ".join(said)


def recompute_text(chosen: Candidate) -> str:
    if not chosen.recomputed or chosen.recompute == "none":
        return "nothing recomputed"
    return f"{name(chosen.recompute)} recompute of {counted(chosen.recomputed, 'layer')}"


def what_differs(chosen: Candidate, best: Candidate) -> str:
    """What sets a plan apart from the best one; nothing where it is equal to it."""
    said = [chosen.short_mesh] if chosen.axes != best.axes else []
    return " · ".join(filter(None, [*said, more_text(chosen, best)]))


def more_text(chosen: Candidate, best: Candidate | None = None) -> str:
    """The decisions besides the mesh; of those that differ from another's only."""
    if best is None:
        return f"{styles_text(chosen)} · {step_text(chosen)}"
    said = []
    if (chosen.micro_batch, chosen.micro_batches) != (best.micro_batch, best.micro_batches):
        said.append(micro_text(chosen))
    if recompute_text(chosen) != recompute_text(best):
        said.append(recompute_text(chosen))
    if chosen.mesh.stages > 1 and (chosen.schedule, chosen.chunks) != (best.schedule, best.chunks):
        said.append(f"schedule {name(chosen.schedule or '1f1b')}, {counted(chosen.chunks, 'chunk')}")
    if chosen.reshard != best.reshard and chosen.mesh.fsdp > 1:
        said.append(reshard_text(chosen))
    said += [
        f"the sequence {name(option)}" if group == SEQUENCE else f"{name(group)} {name(option)}"
        for group, option in chosen.styles
        if best.styles and best.style(group) != option
    ]
    return " · ".join(said)


def micro_text(chosen: Candidate) -> str:
    of = counted(chosen.micro_batch, "sequence")
    return f"{counted(chosen.micro_batches, 'micro-batch', 'micro-batches')} of {of}"


def reshard_text(chosen: Candidate) -> str:
    return f"parameters {'freed' if chosen.reshard else 'kept'} after the forward"


def speed_text(found: Found) -> str:
    rate = format_count(found.tokens_per_s_per_device)
    return f"a step takes {format_seconds(found.step_s)}: {rate} tokens/s per device"


def memory_text(search: Search, memory: MemoryForecast) -> str:
    """What a device holds at the peak, against what it may, and of what."""
    limit, has = search.space.memory_bytes, memory.capacity_bytes
    of = f"{format_bytes(limit)} that it may hold" if limit < has else f"its {format_bytes(has)}"
    kinds = sorted(memory_rows(memory), key=lambda each: -each[2])
    least = LEAST_SHARE * memory.device_bytes
    parts = [f"{label} {format_bytes(n_bytes)}" for _, label, n_bytes in kinds if n_bytes >= least]
    small = sum(n_bytes for *_, n_bytes in kinds if n_bytes < least)
    parts += [f"all else {format_bytes(small)}"] if small else []
    beside = memory.device_bytes - memory.active_bytes
    parts += [f"allocator and process {format_bytes(beside)}"] if beside > 0 else []
    return f"{format_bytes(memory.device_bytes)} of {of} at the peak: {', '.join(parts)}"


def standing(search: Search) -> Line:
    """Whether the best is proved to be, and in which space."""
    if search.is_proved:
        return Line(
            "Best in this space by this machine file: none of its "
            f"{counted(search.candidates, 'candidate')} is faster, in any of its styles.",
            Tone.GOOD,
        )
    if search.stopped:
        said = f"Stopped early ({_rest(search.stopped)}): this is the best so far."
        return Line(f"{said} {_gap_text(search)}", Tone.CAUTION)
    return Line(f"Not proved to be the best. {_gap_text(search)}", Tone.CAUTION)


def _gap_text(search: Search) -> str:
    if not math.isfinite(search.gap):
        return "How much faster something that wasn't looked at could be isn't known."
    if search.gap <= 0:
        return "Nothing that was looked at is faster."
    return f"Something that wasn't looked at could be up to {format_share(search.gap)} faster."


def effort_text(search: Search) -> str:
    """How the candidates were costed."""
    bounds = f", {search.ruled_out:,} ruled out by bounds" if search.ruled_out else ""
    left = f", {search.unlooked:,} not looked at" if search.unlooked else ""
    return (
        f"{counted(search.candidates, 'candidate')}, each in its styles and recompute: {search.predicted:,} "
        f"predicted, {search.composed:,} put together from {counted(search.traces, 'traced piece')}"
        f"{bounds}{left}."
    )


def seconds_text(search: Search) -> str:
    """`12.0 s: traces 6.10 s, the proof 3.50 s`."""
    parts = sorted(search.seconds, key=lambda pair: -pair[1])
    told = ", ".join(f"{name(what)} {format_seconds(seconds)}" for what, seconds in parts)
    return f"{format_seconds(sum(seconds for _, seconds in parts))}{': ' if told else ''}{told}"


def proof_line(found: Found) -> Line:
    """Whether it trains the right model."""
    if found.proof is None:
        why = f": {_rest(found.why_unproved)}" if found.why_unproved else ""
        return Line(
            f"NOT VERIFIED{why}. Nothing ran, so whether it trains the right model is not known.",
            Tone.CAUTION,
        )
    twin = f" ({name(found.proof.twin)})" if found.proof.twin else ""
    ranks = f"ranks {name(found.proof_mesh)}" if found.proof_mesh else f"{found.proof.tp} tp ranks"
    ran = "" if found.proof.is_static else f" On {ranks}{twin}."
    text = sentence(verdict_text(found.proof))
    return Line(f"{text}{ran}", TONES[found.proof.verdict])


def _rest(text: str) -> str:
    return sentence(text).rstrip(".")


def is_right(found: Found) -> bool:
    return found.proof is not None and found.proof.verdict is Verdict.RIGHT


def proof_word(found: Found) -> tuple[str, Tone]:
    """For a table's cell."""
    if found.proof is None:
        return "not verified", Tone.CAUTION
    return found.proof.verdict.value, TONES[found.proof.verdict]


def slower_text(found: Found, best: Found) -> str:
    """`1.020 tie`: of the best one's step."""
    return f"{format_ratio(found.step_s / best.step_s)}{' tie' if found.is_tie else ''}"


def costs_text(costs: Sequence[tuple[Term, float]]) -> str:
    """`+500 ms data-parallel communication, -300 ms tensor-parallel communication`: what it loses by, and
    what it wins back."""
    loses = [(term, seconds) for term, seconds in costs if seconds > 0][:COSTS]
    wins = sorted((pair for pair in costs if pair[1] < 0), key=lambda pair: pair[1])[:1]
    told = [f"+{format_seconds(seconds)} {term}" for term, seconds in loses]
    return ", ".join([*told, *(f"-{format_seconds(-seconds)} {term}" for term, seconds in wins)])


def ties_text(search: Search) -> str:
    """Who can't be told from the best; or that nothing says so."""
    ties = [index + 1 for index, each in enumerate(search.found) if index and each.is_tie]
    whom = (
        f"Plans {', '.join(map(str, ties))} lie" if len(ties) > 1 else f"Plan {ties[0]} lies" if ties else ""
    )
    if search.error is None:
        unknown = "The machine file doesn't say how wrong predictions on it are"
        near = f"{whom} too near for any prediction: a tie with plan 1. " if ties else ""
        return f"{near}{unknown}, so differences of a few percent mean little."
    within = f"{format_share(search.error)}, by which predictions on this machine are wrong"
    return f"{whom} within {within}: a tie with plan 1." if ties else f"None lies within {within}."


def tipping_text(tipping: Tipping) -> str:
    """What becomes of the best when a constant changes."""
    if tipping.factor is None:
        return f"plan 1, at {TRIED} its value"
    winner = f"plan {tipping.winner + 1}" if tipping.winner is not None else "another plan"
    side = "or more" if tipping.factor > 1 else "or less"
    return f"{winner}, at {tipping.factor:.3g} times its value {side}"


def unmoved_text(search: Search) -> str:
    """The constants that decide nothing; nothing where all do."""
    names = [sentence(each.constant) for each in search.tippings if each.factor is None]
    return f"Plan 1 stays the best at {TRIED} the value of: {'; '.join(names)}." if names else ""


def smallest(search: Search) -> Considered | None:
    """Of what was considered, where nothing fits: what needs least."""
    sized = (each for each in search.considered if math.isfinite(each.device_bytes))
    return min(sized, key=lambda each: each.device_bytes, default=None)


def nothing_lines(search: Search) -> Iterator[Line]:
    """Why there is no plan, and what would do."""
    limit = format_bytes(search.space.memory_bytes)
    if not search.candidates:
        yield Line("Nothing in this space can run: each candidate was refused.", Tone.BAD)
    elif search.stopped and not search.predicted:
        yield Line("No plan is known yet: none was predicted.", Tone.BAD)
    elif search.stopped:
        yield Line(f"No plan is known yet to fit in {limit} a device.", Tone.BAD)
    else:
        yield Line(f"None of {counted(search.candidates, 'candidate')} fits in {limit} a device.", Tone.BAD)
    least = smallest(search)
    if least is not None and not least.fits:
        yield Line(
            f"The smallest that was looked at needs {format_bytes(least.device_bytes)}: "
            f"{sentence(least.candidate.label)}."
        )
    if search.stopped:
        yield Line(
            f"The search ended early ({sentence(search.stopped)}): what wasn't looked at might.", Tone.CAUTION
        )


def space_rows(search: Search) -> Iterator[tuple[str, str]]:
    """What was open, a row a decision."""
    space = search.space
    for axis, degrees in space.degrees:
        yield f"{name(axis)}", ", ".join(map(str, degrees))
    for group in space.groups:
        options = ", ".join(map(name, group.options))
        why = "".join(f"; not {name(option)}: {sentence(reason)}" for option, reason in group.why)
        label = "the sequence between blocks" if group.name == SEQUENCE else name(group.name)
        yield label, f"{options}{why}"
    yield "sequences at a time", ", ".join(map(str, space.micro_batches))
    yield "recompute", ", ".join(map(name, space.recompute))
    yield "chunks of layers a stage", ", ".join(map(str, space.chunks))
    kept = {True: "freed", False: "kept"}
    yield "parameters after the forward", ", ".join(kept[each] for each in space.reshard)
    yield "memory of a device", f"at most {format_bytes(space.memory_bytes)}"
    yield from (("fixed", sentence(each)) for each in space.fixed)
    yield from (("forbidden", sentence(each)) for each in space.forbidden)


def drawn_text(search: Search, drawn: Picture) -> str:
    """How honest the picture is: what dots stand for, and what isn't in it."""
    n_dots = len(drawn.dots) + len(drawn.edge)
    said = f"{counted(drawn.considered, 'candidate')}"
    if n_dots < drawn.considered:
        one = "those that would lie upon one another are one, which says how many"
        said += f" as {counted(n_dots, 'mark')}: {one}"
    if drawn.edge:
        at_edge = sum(dot.count for dot in drawn.edge)
        said += f". Marks at the left edge are {at_edge:,} that are too slow whatever they hold"
    if drawn.left_out:
        said += f". {drawn.left_out:,} more have no time, and aren't drawn"
    rest = search.candidates - len(search.considered)
    if rest > 0:
        why = (
            "were ruled out together with others"
            if not search.unlooked
            else "were ruled out or not looked at"
        )
        said += f". The other {rest:,} {why}, without a number of their own"
    return f"{said}."


def near_text() -> str:
    return format_share(NEAR_BEST - 1)


def composed_text(found: Found) -> str:
    """How far what pieces gave is from predict's own."""
    assert found.composed_s is not None
    off = found.composed_s / found.step_s - 1
    return (
        f"Put together from pieces it took {format_seconds(found.composed_s)}, {100 * off:+.2f} % of what "
        "predict gives for the whole plan, which is what counts."
    )
