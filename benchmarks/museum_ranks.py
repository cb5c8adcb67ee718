"""What the ranks of `python -m benchmarks.museum` run of whole training steps: each is held against one
process, before and after, as shardwise.testing.assert_trains_like_one_rank does; all in one launch."""

import time
from collections.abc import Callable, Sequence
from importlib import import_module

import msgspec
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from museum.judge import SEQ, Exhibit, exhibits
from museum.parts import dealt
from shardwise.core.errors import RunError
from shardwise.core.finding import Finding, FindingKind
from shardwise.core.shown import told
from shardwise.core.verification import Verification
from shardwise.launch import RankContext, run_ranks
from shardwise.verify.loop.hold import Asked, hold

STEPS = 2
TIMEOUT_S = 120.0


class Held(msgspec.Struct, frozen=True):
    """findings: none where the step trains as one process does."""

    number: int
    variant: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def verification(self) -> Verification:
        return Verification(str(self.number), self.variant, 1, findings=self.findings, seconds=self.seconds)


def held(
    wanted: Sequence[Exhibit], on_answer: Callable[[Held], None] = lambda _: None
) -> dict[tuple[int, str], Held]:
    """By number and variant, "before" or "after". One that takes the launch down is said to crash, and the
    others start anew."""
    found: dict[tuple[int, str], Held] = {}
    todo = [(each, variant) for each in wanted for variant in ("before", "after")]

    def take(event: bytes) -> None:
        answer = msgspec.msgpack.decode(event, type=Held)
        found[answer.number, answer.variant] = answer
        on_answer(answer)

    while left := [(each, variant) for each, variant in todo if (each.number, variant) not in found]:
        now = [(each.number, variant) for each, variant in left if each.ranks == left[0][0].ranks]
        try:
            run_ranks(
                "benchmarks.museum_ranks:run",
                msgspec.json.encode(now),
                world_size=left[0][0].ranks,
                device_type="cpu",
                timeout_s=TIMEOUT_S,
                on_event=take,
            )
        except RunError as error:
            first = next(each for each in now if each not in found)
            crash = Finding(FindingKind.CRASHES, "step", told(error, 300))
            found[first] = Held(*first, (crash,), 0.0)
            on_answer(found[first])
    return found


def run(context: RankContext, payload: bytes) -> bytes:
    """Entry of every rank."""
    known = {each.number: each for each in exhibits()}
    meshes: dict[str, DeviceMesh] = {}
    for number, variant in msgspec.json.decode(payload, type=list[tuple[int, str]]):
        exhibit = known[number]
        context.note(f"{number} {variant}")
        mesh = exhibit.about["mesh"]
        if mesh not in meshes:
            names, sizes = zip(*exhibit.axes.items(), strict=True)
            meshes[mesh] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        began = time.perf_counter()
        findings = hold(_asked(exhibit, variant), meshes[mesh], torch.device("cpu"))
        if context.rank == 0:
            seconds = round(time.perf_counter() - began, 2)
            context.report(msgspec.msgpack.encode(Held(number, variant, findings, seconds)))
    return b""


def _asked(exhibit: Exhibit, variant: str) -> Asked:
    module = import_module(exhibit.module)
    step, build = (module.step, module.build) if variant == "before" else (module.step_after, module.after)
    return Asked(
        step=step, model=build, optimizer=None, batches=None, deal=dealt, plan=None, data=None, steps=STEPS,
        shape=(exhibit.batch, SEQ), dtype="float64",
    )  # fmt: skip
