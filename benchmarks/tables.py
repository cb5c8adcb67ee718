"""Makes the tables of the documents from the results files, between `<!-- begin:benchmark-... -->` and `<!--
end:benchmark-... -->`.

    python -m benchmarks.tables           writes README.md, docs/ and benchmarks/README.md
    python -m benchmarks.tables --check   writes nothing; exit code 1 where a document differs from the files

Blocks: benchmark-WHAT (a results file's sides, ratios, run) and benchmark-WHAT-ratios (its ratios only), for
every WHAT that has a file; benchmark-bars (every stated bar, with the misses); benchmark-hf-explain and its
parts (benchmarks/hf_results.py); benchmark-explain-speed,
benchmark-plan-speed (benchmarks/explain_results.py);
benchmark-calibrated (benchmarks/calibrated_results.py); benchmark-trace-read (benchmarks/trace_results.py);
benchmark-hf-verify and its parts (benchmarks/verify_results.py); benchmark-verify-mutants
(benchmarks/mutant_results.py); benchmark-static-suspicions (benchmarks/static_results.py);
benchmark-titan (benchmarks/titan_results.py); benchmark-answer-... (benchmarks/answer_results.py);
benchmark-run-on (benchmarks/run_on.py);
benchmark-search-examples (benchmarks/search_examples_results.py); benchmark-search-speed
(benchmarks/search_results.py);
benchmark-published-best (benchmarks/published_best_results.py);
benchmark-regret and benchmark-regret-misses (benchmarks/regret.py);
benchmark-published-terms and benchmark-published-pairs (benchmarks/published_terms.py);
benchmark-published-causes (benchmarks/published_causes.py);
benchmark-published and its parts, and the plot docs/example/published.svg
(benchmarks/published_tables.py); benchmark-h100-steps and benchmark-issue-785
(benchmarks/measured_steps.py). The newest file of each WHAT counts. Ranges are of the rounds; an interval is
of the median of paired ratios.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import (
    answer_results,
    calibrated_results,
    cuda,
    explain_results,
    gpu_terms,
    hf_results,
    made_plan_results,
    measured_steps,
    museum_results,
    mutant_results,
    published_best_results,
    published_causes,
    published_results,
    published_tables,
    published_terms,
    regret,
    run_on,
    search_examples_results,
    search_results,
    static_results,
    titan_results,
    trace_results,
    verify_results,
)
from benchmarks.results import RESULTS, Bar, BarKind, Comparison, Result, Verdict, latest, read_result

ROOT = Path(__file__).parent.parent
_OTHERS = (
    calibrated_results,
    gpu_terms,
    hf_results,
    explain_results,
    trace_results,
    verify_results,
    museum_results,
    mutant_results,
    published_best_results,
    published_results,
    published_tables,
    regret,
    measured_steps,
    search_examples_results,
    search_results,
    static_results,
    titan_results,
)
_BLOCK = re.compile(
    r"<!-- begin:(?P<name>benchmark-[\w-]+) -->\n(?P<body>.*?)<!-- end:(?P=name) -->", re.DOTALL
)
_MARK = re.compile(r"<!-- (?:begin|end):benchmark-[\w-]+ -->")


class TableError(Exception):
    """A document's marks that can't be filled."""


def documents() -> list[Path]:
    found = [ROOT / "README.md", Path(__file__).parent / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if path.is_file()]


def newest_results(folder: Path = RESULTS) -> list[Result]:
    """The newest file of every benchmark with sides and times, in order of name."""
    others = {module.WHAT for module in _OTHERS} | {
        explain_results.PLAN,
        *answer_results.WHATS,
        cuda.WHAT,
        *made_plan_results.WHATS,
        *verify_results.whats(folder),
    }
    whats = sorted({path.stem[len("2026-01-01-") :] for path in folder.glob("????-??-??-*.json")} - others)
    return [read_result(latest(what, folder)) for what in whats]


def blocks(found: list[Result]) -> dict[str, str]:
    """Name of a block -> its text."""
    made = {"benchmark-bars": bars_table(found)}
    for result in found:
        made[f"benchmark-{result.what}"] = full_text(result)
        made[f"benchmark-{result.what}-ratios"] = ratios_table(result) + _source(result)
    return made


def filled(text: str, made: dict[str, str], where: str) -> str:
    """A document's text with its blocks filled. TableError for a block that no results file gives, or a mark
    without its other half."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in made:
            raise TableError(f"{where}: no results file gives {name}. Known: {', '.join(sorted(made))}.")
        return f"<!-- begin:{name} -->\n{made[name]}<!-- end:{name} -->"

    if len(_MARK.findall(text)) != 2 * len(_BLOCK.findall(text)):
        raise TableError(
            f"{where}: a benchmark mark has no other half. Write <!-- begin:NAME --> and <!-- end:NAME "
            "-->, each on its line."
        )
    return _BLOCK.sub(fill, text)


def full_text(result: Result) -> str:
    parts = [sides_table(result), ratios_table(result), "\n".join(_about(result)) + "\n"]
    return "\n".join(parts) + _source(result)


def sides_table(result: Result) -> str:
    """Every side's median and range; what is known of its gradient or its throughput."""
    is_step = any("tokens_per_s" in side.facts for side in result.sides)
    head = ["side", "what", "median ms", "range ms"]
    head += ["tokens/s"] if is_step else ["sends MB, by formula", "table gradient per rank"]
    rows = []
    for side in result.sides:
        facts = side.facts
        row = [
            side.name,
            side.about,
            _ms(side.median_s),
            f"{_ms(min(side.times_s))} to {_ms(max(side.times_s))}",
        ]
        if is_step:
            row.append(f"{facts['tokens_per_s']:,.0f}" if facts else "")
        elif facts:
            row += [
                f"{facts['wire_bytes'] / 1e6:.1f}",
                f"{facts['gradient_rows']:,.0f} x {facts['gradient_columns']:,.0f}",
            ]
        else:
            row += ["", ""]
        rows.append(row)
    return _table(head, rows, numbers=(2, 3, 4))


def ratios_table(result: Result) -> str:
    rows = [
        [*_ratio_cells(comparison), _bar_text(comparison.bar), _verdict_text(comparison)]
        for comparison in result.comparisons
    ]
    return _table(["compared", "ratio", "interval", "bar", "verdict"], rows, numbers=(1, 2))


def bars_table(found: list[Result]) -> str:
    """Every stated bar of every benchmark."""
    rows = []
    for result in found:
        for comparison in result.comparisons:
            if comparison.bar is not None:
                rows.append(
                    [
                        result.what,
                        *_ratio_cells(comparison),
                        _bar_text(comparison.bar),
                        _verdict_text(comparison),
                    ]
                )
    missed = sum(row[-1] != str(Verdict.MET) for row in rows)
    summary = f"\n{len(rows)} bars: {len(rows) - missed} met, {missed} missed or met by the median only.\n"
    return (
        _table(["benchmark", "compared", "ratio", "interval", "bar", "verdict"], rows, numbers=(2, 3))
        + summary
    )


def _ratio_cells(comparison: Comparison) -> list[str]:
    ratio = comparison.ratio
    compared = f"{'cost' if comparison.is_cost else 'speedup'} of {comparison.ours} over {comparison.other}"
    # a bar of a percent wants more than hundredths
    is_fine = comparison.bar is not None and 0 < abs(comparison.bar.value - 1) < 0.05
    digits = 5 if is_fine else 2
    return [compared, f"{ratio.median:.{digits}f}", f"{ratio.low:.{digits}f} to {ratio.high:.{digits}f}"]


def _bar_text(bar: Bar | None) -> str:
    if bar is None:
        return ""
    match bar.kind:
        case BarKind.SPEEDUP_AT_LEAST:
            return f"at least {bar.value:g}"
        case BarKind.COST_AT_MOST:
            return f"at most {bar.value:g}"
        case BarKind.FASTER | BarKind.NOT_SLOWER:
            return str(bar.kind)


def _verdict_text(comparison: Comparison) -> str:
    verdict = comparison.verdict
    return "" if verdict is None else f"**{verdict}**" if verdict is Verdict.MISSED else str(verdict)


def _about(result: Result) -> Iterator[str]:
    """The run in a few lines: what a reader needs to judge the tables."""
    where, settings = result.environment, result.settings
    versions = dict(where.versions)
    confidence = result.comparisons[0].ratio.confidence
    before, after = result.load_average
    yield (
        "A ratio is the other side's time over ours, a cost our time over the floor's: medians of "
        f"{settings['rounds']} paired rounds, intervals of {confidence:.1%} confidence. A round's time is "
        "its slowest rank's."
    )
    shown = ", ".join(
        f"{name} {value}"
        for name, value in settings.items()
        if name in ("model", "tp", "cp", "vocab", "hidden", "batch", "seq", "dtype")
    )
    yield (
        f"Run: {shown}; {where.backend}, {where.world_size} ranks with {where.threads_per_rank} thread each."
    )
    yield (
        f"Machine: {where.machine}, {where.cores} cores, load average {before:.1f} before and {after:.1f} "
        f"after; torch {versions['torch']}, transformers {versions['transformers']}."
    )
    yield f"Text: {result.text.source}; {result.text.tokenizer}."
    yield from (f"- {line}" for line in (*result.checks, *result.notes))


def _source(result: Result) -> str:
    name = f"{result.day}-{result.what}.json"
    return f"\nSource: `benchmarks/results/{name}`, made by `{result.environment.command}`.\n"


def _table(head: list[str], rows: list[list[str]], numbers: tuple[int, ...]) -> str:
    rule = ["---:" if index in numbers else "---" for index in range(len(head))]
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rows))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit code 1 where a document differs from the results files",
    )
    check = parser.parse_args().check
    try:
        made = blocks(newest_results()) | hf_results.blocks(hf_results.newest_sweep())
        made |= mutant_results.blocks(mutant_results.newest_run())
        made |= static_results.newest_blocks() | search_results.newest_blocks()
        made |= museum_results.blocks(museum_results.newest_run())
        for what in verify_results.whats():
            made |= verify_results.blocks(verify_results.newest_sweep(what))
        for tp in made_plan_results.SIZES:
            made |= made_plan_results.blocks(made_plan_results.newest_run(tp))
        made |= calibrated_results.blocks(calibrated_results.newest_run())
        published = published_results.newest_run()
        made |= published_tables.blocks(published) | published_terms.blocks(published)
        made |= measured_steps.blocks(measured_steps.newest_run())
        made |= gpu_terms.blocks(gpu_terms.newest_run())
        for what in (explain_results.WHAT, explain_results.PLAN):
            made |= explain_results.blocks(explain_results.newest_run(what=what))
        made |= regret.blocks(regret.newest_run()) | published_causes.blocks()
        made |= trace_results.blocks(trace_results.newest_run())
        made |= titan_results.newest_blocks() | answer_results.newest_blocks() | run_on.blocks()
        made |= search_examples_results.newest_blocks() | published_best_results.newest_blocks()
        texts = {path: path.read_text(encoding="utf-8") for path in documents()}
        texts[published_tables.PLOT] = (
            published_tables.PLOT.read_text(encoding="utf-8") if published_tables.PLOT.exists() else ""
        )
        new = {path: filled(text, made, str(path.relative_to(ROOT))) for path, text in texts.items()}
        new[published_tables.PLOT] = published_tables.plot(published_results.newest_run())
    except (TableError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    stale = [path for path in texts if texts[path] != new[path]]
    for path in stale:
        shown = path.relative_to(ROOT)
        if check:
            print(
                f"{shown} differs from the results files. Run python -m benchmarks.tables.", file=sys.stderr
            )
        else:
            path.write_text(new[path], encoding="utf-8")
            print(f"wrote {shown}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
