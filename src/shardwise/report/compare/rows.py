"""Which measurement, standing and ratio belong together: one Row per plan, in the order of the comparison.

Looks things up and computes nothing. What it does not know: how a row is drawn.
"""

from dataclasses import dataclass

from shardwise.core.measurement import Comparison, Measurement, Ratio, Standing


@dataclass(frozen=True, slots=True)
class Row:
    """One plan's numbers, side by side.

    color: position of the plan among the distinct plans; the second run of the first plan (`is_repeat`, A/A)
    has the first's.
    """

    measurement: Measurement
    standing: Standing | None
    ratio: Ratio | None
    color: int
    is_first: bool
    is_repeat: bool

    @property
    def label(self) -> str:
        return self.measurement.label

    @property
    def step_s(self) -> float | None:
        return self.standing.step_s if self.standing else None

    @property
    def tokens_per_s(self) -> float | None:
        return self.standing.tokens_per_s if self.standing else None

    @property
    def module_forward_s(self) -> float | None:
        return self.standing.module_forward_s if self.standing else None

    @property
    def module_backward_s(self) -> float | None:
        return self.standing.module_backward_s if self.standing else None


def comparison_rows(comparison: Comparison) -> tuple[Row, ...]:
    """One Row per measurement."""
    standings = {standing.label: standing for standing in comparison.standings}
    rows: list[Row] = []
    color = 0
    for index, measurement in enumerate(comparison.measurements):
        is_repeat = measurement.repeats is not None
        standing = standings.get(measurement.label)
        ratio = standing.ratio if standing else None
        if is_repeat and ratio is None:
            ratio = comparison.noise
        rows.append(
            Row(
                measurement,
                standing,
                ratio,
                0 if is_repeat else color,
                is_first=index == 0,
                is_repeat=is_repeat,
            )
        )
        color += not is_repeat
    return tuple(rows)


def measured_module(comparison: Comparison) -> str | None:
    """The module whose forward and backward were timed alone: the same for every plan; None where no plan has
    such times."""
    times = (measurement.module_times for measurement in comparison.measurements)
    return next((each.module for each in times if each is not None), None)


def not_measured(comparison: Comparison) -> tuple[str, ...]:
    """What no plan of this comparison has a number for, in words, so that a report can leave it out and say
    so."""
    runs = comparison.measurements
    peaks_of_runs = [
        (run.memory.active_bytes, run.memory.reserved_bytes, run.memory.resident_bytes) for run in runs
    ]
    absent = (
        ("the second run of the first plan (A/A), so the noise is unknown", comparison.noise is None),
        ("bytes sent on sockets", all(run.sent_bytes is None for run in runs)),
        ("peak memory", all(peaks == (None, None, None) for peaks in peaks_of_runs)),
        ("one module alone", comparison.module is None and all(run.module_times is None for run in runs)),
        ("agreement with the unsharded model", all(run.agreement is None for run in runs)),
        ("losses", not any(run.losses for run in runs)),
    )
    return tuple(name for name, is_absent in absent if is_absent)
