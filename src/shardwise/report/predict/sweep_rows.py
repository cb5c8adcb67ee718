"""What of a Sweep stands together in a report. Adds up and looks up, no more."""

from shardwise.core.mesh import Mesh, Role
from shardwise.core.pipeline import Schedule
from shardwise.core.prediction import COMPUTE_TERMS, Term
from shardwise.core.sweep import Sweep, SweepPoint
from shardwise.report.common.plain import name
from shardwise.report.common.units import format_count, format_seconds
from shardwise.report.predict import rows

# bars of the page; rows of its table; refusals in the terminal
BARS = 12
PAGE_ROWS = 2000
REFUSALS = 6


# what a table has room for
SHORT_TERMS = {
    Term.TENSOR: "tp sends",
    Term.EXPERTS: "ep sends",
    Term.CONTEXT: "cp sends",
    Term.DATA: "data sends",
    Term.SLOWED: "slowed",
    Term.LAUNCH: "launches",
    Term.WAITING: "late ranks",
    Term.BUBBLE: "bubble",
}


def mesh_text(point: SweepPoint) -> str:
    """`pp=2,fsdp=2,tp=4`, and of several chunks how many."""
    chunks = f", {point.chunks} chunks" if point.chunks > 1 else ""
    return f"{Mesh(point.axes)}{chunks}"


def assumptions(sweep: Sweep) -> tuple[str, ...]:
    """What all points take for granted; some have replicas."""
    mesh = Mesh.of({Role.REPLICATES: 2, Role.CUTS_SEQUENCE: sweep.setup.context})
    chunks = sorted({point.chunks for point in sweep.points if point.stages > 1})
    if not chunks:
        return rows.assumptions(sweep.settings, sweep.setup, mesh, sweep.machine)
    first = Schedule.GPIPE if sweep.setup.schedule is Schedule.GPIPE else Schedule.ONE_F_ONE_B
    schedules = [first if each == 1 else f"interleaved with {each} chunks a stage" for each in chunks]
    said = f"Pipelines run {' or '.join(schedules)}; layers are dealt evenly."
    return (*rows.assumptions(sweep.settings, sweep.setup, mesh, sweep.machine), said)


def micro_text(point: SweepPoint) -> str:
    """`4 x 16`: sequences at a time, and how many times a step."""
    return f"{point.micro_batch} x {point.micro_batches}"


def label(point: SweepPoint, has_plans: bool) -> str:
    plan = f"{name(point.plan, '(no plan)')}, " if has_plans else ""
    return f"{plan}{mesh_text(point)}, {micro_text(point)}"


def has_plans(sweep: Sweep) -> bool:
    """Whether the points are of more than one plan."""
    return len({point.plan for point in sweep.points}) > 1


def lost(point: SweepPoint) -> tuple[Term, float]:
    """The largest term that is no work of the device, and its share of the step."""
    terms = [(term, seconds) for term, seconds in point.terms if term not in COMPUTE_TERMS]
    term, seconds = max(terms, key=lambda pair: pair[1])
    return term, seconds / point.step_s


def lost_text(point: SweepPoint) -> str:
    """`12 % bubble`."""
    term, share = lost(point)
    return f"{100 * share:.0f} % {SHORT_TERMS.get(term, term.value)}"


def headline(sweep: Sweep) -> str:
    fitting = [point for point in sweep.points if point.fits]
    if not fitting:
        return (
            f"None of {len(sweep.points):,} ways to use {sweep.devices:,} devices fits in their memory."
            if sweep.points
            else "Nothing could be predicted."
        )
    best = fitting[0]
    return (
        f"Best of {len(sweep.points):,}, of which {len(fitting):,} fit: {label(best, has_plans(sweep))}: "
        f"{format_count(best.tokens_per_s_per_device)} tokens/s per device, a step takes "
        f"{format_seconds(best.step_s)}."
    )


def traced_text(sweep: Sweep) -> str:
    return f"{len(sweep.points):,} predictions from {sweep.traces:,} traced programs."


def setting_text(sweep: Sweep) -> str:
    settings = sweep.settings
    count = sweep.setup.micro_batches
    batch = (
        f"batch {settings.batch:,}" if settings.batch else f"{count} micro-batch{'es' * (count > 1)} a step"
    )
    return (
        f"{sweep.devices:,} devices · {batch} · sequence {settings.seq:,} · "
        f"{name(settings.precision, '(dtype)')}"
    )
