"""For a team's own tests: hold a plan to what it promises, in one line.

from shardwise.testing import assert_plan_trains_right

def test_our_plan() -> None:
    assert_plan_trains_right("mypackage.models:build", "plans/ours.toml", tp=2)
"""

from io import StringIO

from rich.console import Console

from shardwise.core.case import Case


def assert_plan_trains_right(
    model: str,
    *plans: str,
    tp: int = 2,
    batch: int = 2,
    seq: int = 16,
    small: bool | None = None,
    allow_little_sharded: bool = False,
    device: str = "cpu",
    timeout_s: float = 120.0,
) -> None:
    """What `shardwise verify PLANS --model MODEL --mesh tp=N` does: raises AssertionError, with all that it
    found, unless every plan is right.

    model, plans: as the command takes them; no plan means the model's own. small: True takes the small twin,
    False the model itself, None the twin of a large one. allow_little_sharded: don't mind a plan that shards
    nearly nothing. A model that can't be run unsharded proves nothing, and fails too. Raises InputError for
    names that aren't known, and for a plan that doesn't fit the model. Starts tp processes on this machine.
    """
    from shardwise.core.verification import Verdict
    from shardwise.report.common.deliver import show
    from shardwise.verbs.verify import VerifyOptions, verify

    size = "auto" if small is None else "small" if small else "given"
    case = Case.of(model=model, mesh=f"tp={tp}", plans=plans, device=device)
    run = verify(case, VerifyOptions(batch=batch, seq=seq, size=size, timeout=timeout_s))
    fine = {Verdict.RIGHT, Verdict.NEARLY_NOTHING} if allow_little_sharded else {Verdict.RIGHT}
    if all(each.verdict in fine for each in run.verifications):
        return
    text = StringIO()
    show(run, "terminal", Console(file=text, width=120, no_color=True))
    raise AssertionError(f"a plan doesn't train the model:\n{text.getvalue()}")
