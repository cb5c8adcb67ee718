"""For a team's own tests: hold a plan, or a whole training step, to what it promises, in one line.

from shardwise.testing import assert_plan_trains_right, assert_trains_like_one_rank

def test_our_plan() -> None:
    assert_plan_trains_right("mypackage.models:build", "plans/ours.toml", tp=2)

def test_our_step() -> None:
    assert_trains_like_one_rank(train_step, build, optimizer=make_optimizer, mesh="fsdp=2,tp=2")
"""

from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.console import Console

from shardwise.core.case import Case
from shardwise.core.errors import RunError

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from shardwise.core.plan import Plan


def assert_plan_trains_right(
    model: str,
    *plans: str,
    tp: int = 2,
    batch: int = 2,
    seq: int = 0,
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


def assert_trains_like_one_rank(
    step: Callable[..., Any],
    model: "Callable[..., nn.Module] | str",
    *,
    optimizer: "Callable[[nn.Module], Any] | None" = None,
    mesh: "str | DeviceMesh" = "tp=2",
    plan: "Plan | str | None" = None,
    batches: Callable[[int], Any] | None = None,
    deal: "Callable[[Any, DeviceMesh], Any] | None" = None,
    data: str | Sequence[str] | None = None,
    steps: int = 3,
    batch: int = 4,
    seq: int = 16,
    dtype: str = "float64",
    device: str = "cpu",
    timeout_s: float = 60.0,
) -> None:
    """Holds a whole training step, with its loss, clipping, optimizer and sharding, against one process:
    raises AssertionError, what explains the rest first, unless both do the same for `steps` steps.

    step: one optimizer step, yours. It is called by the names of its arguments, of model, batch, optimizer,
    mesh (None on one process) and number (of the step, from 0). It may return the loss, or (loss, gradient
    norm): of the whole batch on every rank, or each rank's loss, of which that is the mean, or the sum over
    the parts.
    model: a factory that takes mesh=None, and shards its model over a mesh that it is given; or one that a
    command can name. plan: shards the model over tp instead (a Plan, or a built-in one's name). optimizer:
    from the model to what the step is given, a tuple with a schedule in it, too; by default AdamW.
    mesh: "fsdp=2,tp=2", of axes of any name, or a DeviceMesh. data: axes whose ranks see other sequences,
    where their names don't tell. batches: from a step's number to the global batch; by default random ids and
    labels [batch, seq], of which some are -100, more in later sequences. deal: from (global batch, mesh) to a
    rank's; by default each tensor is cut along its first dim.

    Called from a process by itself, as a test is, it starts the ranks, which import the functions by name:
    they must stand at the top of a module. Called on all ranks of a process group, as under torchrun, it uses
    that, and raises on all of them.

    Compared are losses and norms, gradients as the backward leaves them and as the optimizer finds them, its
    settings and states, all weights and buffers. Dropout is off; then ranks that see the same tokens are
    looked at with dropout on. A step that fails, a rank that dies or hangs for timeout_s raises
    AssertionError too. Raises InputErrors for names, meshes and batches that don't fit.
    """
    import torch.distributed as dist

    from shardwise.core.plan import Plan
    from shardwise.launch import joined
    from shardwise.parallel.builtin import builtin_plan
    from shardwise.verify.loop.hold import Asked, axes_of, hold_here, hold_on_ranks
    from shardwise.verify.loop.words import lines_of

    if isinstance(plan, str):
        plan = builtin_plan(plan)
    text = plan.to_toml() if isinstance(plan, Plan) else None
    axes = (data,) if isinstance(data, str) else tuple(data) if data is not None else None
    asked = Asked(step, model, optimizer, batches, deal, text, axes, steps, (batch, seq), dtype)
    try:
        if dist.is_initialized() or joined():
            found = hold_here(asked, mesh, device)
        else:
            found = hold_on_ranks(asked, axes_of(mesh), device_type=device, timeout_s=timeout_s)
    except RunError as error:
        raise AssertionError(f"the step doesn't train as one process does: {error}") from error
    if found:
        lines = "\n".join(lines_of(found))
        raise AssertionError(
            f"the step doesn't train as one process does (mesh {mesh}, {steps} steps):\n{lines}"
        )
