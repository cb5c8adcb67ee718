"""What calibrate says of what it couldn't measure."""

import pytest

from shardwise.calibrate.ranks import CalibrateReport
from shardwise.predict.machines import load_machine
from shardwise.verbs.calibrate import CalibrateOptions, _Run


def report(share: float = 1.0, left_out: int = 0) -> CalibrateReport:
    return CalibrateReport((), (), share, left_out, memory_bytes=1, context_bytes=1, units=1)


@pytest.mark.parametrize(
    ("base", "links"),
    [
        (
            None,
            "left out of the file: a plan over several ranks can't be predicted. "
            "Name a machine file to take them from with --base.",
        ),
        ("h100-sxm-80gb", "taken from h100-sxm-80gb."),
    ],
)
def test_one_rank_says_that_it_has_measured_no_link_and_whose_it_takes(base: str | None, links: str) -> None:
    options = CalibrateOptions(ranks=1, base=base)
    run = _Run("cpu", 1, options, load_machine(base) if base is not None else None)
    assert list(run.notes([report()])) == [
        f"Collectives were not measured, one rank having nobody to talk to; the links are {links}"
    ]


def test_what_was_hurried_left_out_or_measured_on_a_busy_machine_is_said() -> None:
    run = _Run("cpu", 2, CalibrateOptions(quick=True), None)
    quick, left_out, arrivals, busy = run.notes([report(left_out=3), report(share=0.5)])
    assert quick == "Measured with --quick: a few sizes of each. Predictions by this file are rough."
    assert left_out == "3 kernel sizes were left out: their time was over. The telling ones come first."
    assert arrivals.startswith("How far apart ranks come to a collective was not measured, for ranks of")
    assert busy.startswith("A rank got 50% of a core while it was measured: this machine is busy")
