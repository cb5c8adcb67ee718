"""calibrate, compare and predict on this machine, one after the other: how near the predictions are.

    python -m benchmarks.calibrated [--ranks 2] [--rounds 20] [--runs 1] [--more] [--dry]

Every built-in plan of llama3-debug under compare's default settings, on the same text. Nothing is fitted to
compare's times. After its rounds compare records some steps of each plan, which the predictions are laid
beside, so that a plan that misses says in which term. --runs: so many in a row, each calibrated anew; the
file is written after each, so that what was measured stays.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from benchmarks import calibrated_results, results
from benchmarks.calibrated_results import Predicted, Run, Runs
from shardwise.core.case import StepSettings
from shardwise.core.machine import FRESH, Machine
from shardwise.core.measurement import Comparison, Measurement
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import Setup, Term
from shardwise.core.program import Collective, Program
from shardwise.files.document import read_document
from shardwise.files.machine_file import machine_from_toml
from shardwise.models.source import find_model
from shardwise.parallel.builtin import builtin_names, builtin_plan
from shardwise.predict.layout import lay_out
from shardwise.predict.predict import predict, prediction_of
from shardwise.predict.step import step_of
from shardwise.predict.work import work_of
from shardwise.profiles.beside import beside
from shardwise.profiles.collectives import share
from shardwise.profiles.ranks import read_ranks, trace_files
from shardwise.profiles.run import profile_run
from shardwise.text.batches import Batches
from shardwise.text.stream import load_tokens
from shardwise.trace.trace import trace
from shardwise.verbs.compare_ranks import folder_name

EMBEDDING = "tok_embeddings"
REPLICATED = "replicated parameters"  # the module that a Program books their gradients' all-reduce on
COMMUNICATION = (Term.TENSOR, Term.DATA, Term.WAITING)  # their seconds are the wall's
SETTINGS = StepSettings(batch=4, seq=256)  # compare's defaults


def command(*arguments: str) -> bytes:
    """What `shardwise` prints for these arguments; its own words go to the terminal."""
    print("shardwise", *arguments, file=sys.stderr, flush=True)
    return subprocess.run(
        [sys.executable, "-m", "shardwise", *arguments], stdout=subprocess.PIPE, check=True
    ).stdout


def compare(*arguments: str) -> tuple[bytes, float | None]:
    """What `shardwise compare` prints, and the share of a core that its ranks got while they were timed: of
    the time in which they could have run, that in which they ran (Documentation/scheduler/sched-stats.rst of
    Linux; None elsewhere)."""
    print("shardwise compare", *arguments, file=sys.stderr, flush=True)
    first: dict[Path, tuple[int, int]] = {}
    last: dict[Path, tuple[int, int]] = {}
    with (
        tempfile.TemporaryFile() as document,
        subprocess.Popen(
            [sys.executable, "-m", "shardwise", "compare", *arguments],
            stdout=document,
            stderr=subprocess.PIPE,
            text=True,
        ) as running,
    ):
        assert running.stderr is not None
        for line in running.stderr:
            sys.stderr.write(line)
            if ": round " in line:
                last = _ran_and_waited(running.pid)
                first = first or last
        if running.wait():
            raise SystemExit(running.returncode)
        document.seek(0)
        printed = document.read()
    ran = sum(last[path][0] - first[path][0] for path in first if path in last)
    waited = sum(last[path][1] - first[path][1] for path in first if path in last)
    return printed, ran / (ran + waited) if ran else None


def _ran_and_waited(parent: int) -> dict[Path, tuple[int, int]]:
    """Nanoseconds that each of a command's ranks ran and waited for a core, by its main thread's file."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/schedstat"):
        try:
            if int((path.parent / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                ran, waited, _ = path.read_text().split()
                found[path] = (int(ran), int(waited))
        except OSError:  # ended meanwhile
            continue
    return found


def programs(model: str, ranks: int) -> dict[str, Program]:
    """Of every built-in plan, with the first batch of compare's text."""
    source = find_model(model)
    assert source.vocab_size is not None
    ids = Batches(load_tokens(vocab_size=source.vocab_size), SETTINGS.batch, SETTINGS.seq).at(0).ids_BS
    mesh = Mesh((("tp", ranks),))
    return {
        name: trace(source, builtin_plan(name), mesh, SETTINGS, device="cpu", ids=ids)
        for name in builtin_names()
    }


def embedding_s(program: Program, machine: Machine) -> float:
    """Of the embedding alone, forward and backward: its items one after the other, and its part of the
    replicated gradients' all-reduce. Alone it gets memory that it gave back just before, so fresh memory
    isn't dear."""
    machine = replace(machine, kernels=tuple((name, rate) for name, rate in machine.kernels if name != FRESH))
    work = work_of(program, machine, Setup())
    whole = sum(
        each.gradient_bytes for each in program.holdings if each.module == EMBEDDING and not each.is_sharded
    )
    seconds = 0.0
    for template, device_s, host_s in zip(work.template, work.device_s, work.host_s, strict=True):
        item = work.items[template]
        if item.module == EMBEDDING:
            seconds += device_s + host_s
        elif isinstance(item, Collective) and item.module == REPLICATED:
            seconds += device_s * min(1.0, whole / item.call.payload_bytes)
    return float(seconds)


def by_term(
    program: Program, machine: Machine, traces: Path
) -> tuple[tuple[str, float | None, float | None], ...]:
    """Predicted and measured seconds of each term of the steps that were recorded."""
    laid = lay_out(program, machine, Setup())
    timelines, sharing = share(read_ranks(trace_files(traces)))
    run = profile_run(traces.name, timelines, sharing)
    both = beside(step_of(laid, prediction_of(laid), SETTINGS), run, timelines)
    return tuple((each.term, _s(each.predicted_ns), _s(each.measured_ns)) for each in both.terms)


def _s(ns: float | None) -> float | None:
    return None if ns is None else ns / 1e9


def predicted(
    program: Program, machine: Machine, measured: Measurement, busier: float, traces: Path
) -> Predicted:
    """busier: by how much longer work takes at the share of a core that compare's ranks got. traces: of
    the plan's recorded steps."""
    found = predict(program, machine, Setup())
    communication_s = sum(seconds for term, seconds in found.terms if term in COMMUNICATION)
    times = measured.module_times
    assert times is not None
    return Predicted(
        measured.label,
        measured.step_s,
        tuple(one + two for one, two in zip(times.forward_s, times.backward_s, strict=True)),
        found.step_s,
        (found.step_s - communication_s) * busier + communication_s,
        embedding_s(program, machine),
        tuple((str(term), seconds) for term, seconds in found.terms),
        by_term(program, machine, traces),
    )


def measure(model: str, ranks: int, rounds: int, given: Path | None = None) -> Run:
    """Traces first, so that compare runs right after calibrate."""
    started, load = results.now(), [results.load_average()]
    traced = programs(model, ranks)
    with tempfile.TemporaryDirectory(prefix="shardwise-calibrated-") as folder:
        path = given or Path(folder) / "machine.toml"
        began = time.monotonic()
        if given is None:
            command("calibrate", "--device", "cpu", "--ranks", str(ranks), "--out", str(path))
        calibrate_s = time.monotonic() - began
        load.append(results.load_average())
        machine = machine_from_toml(path.read_text(encoding="utf-8"), "calibrated")
        began = time.monotonic()
        options = [
            "--model",
            model,
            "--mesh",
            f"tp={ranks}",
            "--device",
            "cpu",
            "--rounds",
            str(rounds),
            "--no-repeat",
            "--no-check",
            "--profile",
            "--profile-steps",
            "2",
            "--json",
        ]
        document, compare_share = compare(*builtin_names(), *options, "--out", str(Path(folder) / "compare"))
        compare_s = time.monotonic() - began
        load.append(results.load_average())
        comparison: Comparison = read_document(document, Comparison)
        share_then = _share(machine)
        busier = share_then / compare_share if compare_share is not None else 1.0
        recorded = Path(folder) / "compare" / "traces"
        plans = tuple(
            predicted(traced[each.label], machine, each, busier, recorded / folder_name(each.label))
            for each in comparison.measurements
        )
    return Run(
        environment=results.describe_machine(
            results.command_line("benchmarks.calibrated"),
            ranks,
            comparison.environment.threads_per_rank,
            comparison.environment.variables,
            started,
        ),
        settings={
            "model": model,
            "tp": ranks,
            "batch": SETTINGS.batch,
            "seq": SETTINGS.seq,
            "dtype": SETTINGS.dtype,
            "rounds": rounds,
        },
        load_average=(load[0], load[1], load[2]),
        share=share_then,
        compare_share=compare_share,
        calibrate_s=calibrate_s,
        compare_s=compare_s,
        plans=plans,
        constants=tuple((each.path, each.value, each.unit, each.source) for each in machine.constants),
    )


def _share(machine: Machine) -> float:
    """As the machine's description says it."""
    before, _, _ = machine.about.partition("% of a core each")
    return float(before.rpartition(" ")[2]) / 100


def show(plans: Sequence[Predicted]) -> None:
    """For the one who waits."""
    for plan in plans:
        print(
            f"{plan.plan:20} step {plan.step_median_s * 1e3:7.0f} ms, predicted "
            f"{plan.step_predicted_s * 1e3:7.0f} ({plan.error:+.0%}; at compare's share "
            f"{plan.step_predicted_at_share_s * 1e3:7.0f}, {plan.error_at_share:+.0%})   embedding "
            f"{plan.embedding_median_s * 1e3:6.1f} ms, predicted {plan.embedding_predicted_s * 1e3:6.1f}"
        )
        for term, expected_s, took_s in plan.profiled:
            sides = ("?" if each is None else f"{each * 1e3:.0f}" for each in (expected_s, took_s))
            print(f"    {term:45} {' predicted, took '.join(sides)} ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrated", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--model", default="llama3-debug")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runs", type=int, default=1, help="so many in a row")
    parser.add_argument("--more", action="store_true", help="after the runs that the newest file has")
    parser.add_argument("--dry", action="store_true", help="print, and write no results file")
    parser.add_argument("--raw", type=Path, help="also write the runs to this file")
    arguments = parser.parse_args()
    runs = list(calibrated_results.newest_run().runs) if arguments.more else []
    for _ in range(arguments.runs):
        run = measure(arguments.model, arguments.ranks, arguments.rounds)
        runs.append(run)
        show(run.plans)
        right, pairs, wrong = calibrated_results.in_order(run.plans)
        print(
            f"share of a core: {run.share:.0%} while calibrated, {run.compare_share or 0:.0%} while "
            f"compared; load {run.load_average}"
        )
        print(f"embeddings: {right} of {pairs} pairs in the right order {wrong}")
        print("every plan within the bar" if run.is_met else "the bar is MISSED", flush=True)
        made = Runs(tuple(runs))
        if arguments.raw is not None:
            arguments.raw.write_bytes(msgspec.json.encode(made))
        if not arguments.dry:
            print(made.write())


if __name__ == "__main__":
    main()
