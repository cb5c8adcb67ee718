"""Fits what the host of vTrain's cluster takes to issue an op, to its runs with TP 1.

    python -m benchmarks.vtrain_host     prints the best constants, and those without the runs of each model

Runs: hidden 1024, one stage, two replicas, one and two sequences a micro-batch. The two constants (forward,
backward) are those of GRID that bring the mean absolute error, of each size of a micro-batch, to its least.
VTRAIN_HOST_US in benchmarks/machine_files.py has them. Three to five minutes.
"""

import sys
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from itertools import product
from statistics import fmean

from benchmarks.published import program_of
from benchmarks.published_jobs import Row, by_program, read_rows, usable
from shardwise.core.machine import Machine
from shardwise.predict.machines import load_machine
from shardwise.predict.predict import predict

GRID = tuple(product(range(64, 83, 3), range(15, 37, 3)))  # microseconds: forward, backward
WANTED = {"source_group": "vtrain-single", "hidden": "1024", "tp": "1", "pp": "1", "dp": "2"}

Errors = dict[tuple[str, str], list[float]]
"""(layers, micro-batch) -> absolute errors."""


def is_wanted(row: Row) -> bool:
    return all(row[key] == value for key, value in WANTED.items()) and row["micro_batch"] in ("1", "2")


def with_host(machine: Machine, forward_us: float, backward_us: float) -> Machine:
    launch = replace(machine.launch, forward_s=forward_us * 1e-6, backward_s=backward_us * 1e-6)
    return replace(machine, launch=launch)


def errors() -> dict[tuple[int, int], Errors]:
    """By the constants of the grid."""
    machine = load_machine("a100-sxm-80gb-vtrain")
    found: dict[tuple[int, int], Errors] = {point: defaultdict(list) for point in GRID}
    for rows in by_program(row for row in read_rows() if usable(row) and is_wanted(row)):
        program = program_of(rows[0][1].traced)
        for point, (row, job) in product(GRID, rows):
            step_s = predict(program, with_host(machine, *point), job.setup).step_s
            error = abs(step_s / float(row["step_time_s"]) - 1)
            found[point][row["layers"], row["micro_batch"]].append(error)
    return found


def fit(found: dict[tuple[int, int], Errors], without: Collection[str] = ()) -> tuple[float, tuple[int, int]]:
    """(mean absolute error, constants) without the runs of models with so many layers."""

    def mean(each: Errors) -> float:
        by_size: dict[str, list[float]] = defaultdict(list)
        for (layers, size), values in each.items():
            if layers not in without:
                by_size[size] += values
        return fmean(fmean(values) for values in by_size.values())

    return min((mean(each), point) for point, each in found.items())


def main() -> int:
    found = errors()
    models = sorted({layers for each in found.values() for layers, _ in each})
    for without in ((), *((layers,) for layers in models)):
        error, (forward_us, backward_us) = fit(found, without)
        left = f" without the model of {without[0]} layers" if without else ""
        print(f"forward {forward_us} us, backward {backward_us} us{left}: mean absolute error {error:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
