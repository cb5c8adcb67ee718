"""Holds a loop against one process, on ranks that this process starts or among which it is.

Every rank runs the loop on one process too: with a group of itself alone as the world, so that what the step
asks of torch.distributed is answered as it would be there. Only what is wrong goes between the ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import count
from typing import Any, cast

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from shardwise.core.drift import Drift, Held
from shardwise.core.errors import MeshError, RunError, ShardwiseError
from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.mesh import Role, role_of, sees_other_tokens
from shardwise.core.shown import told as shown_error
from shardwise.launch import RankContext, run_ranks
from shardwise.models.factory import factory_model
from shardwise.models.source import find_model
from shardwise.parallel.any_plan import plan_from
from shardwise.torch_private import default_group
from shardwise.verify.loop.causes import findings
from shardwise.verify.loop.differences import allowed, differences
from shardwise.verify.loop.loop import Loop, bare
from shardwise.verify.loop.named import Named
from shardwise.verify.loop.record import Record, record
from shardwise.verify.loop.runs import Runs
from shardwise.verify.noise import SplitMatmuls
from shardwise.watch.sentinel import watch

Axes = tuple[tuple[str, int], ...]
Function = Callable[..., Any]
WITH_DROPOUT = 2
"""Steps with dropout on: what ranks drew apart shows after one."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be held, with functions as they are. model: a factory, or a model that a command can name;
    plan: None, TOML or the name of a plan that isn't ours."""

    step: Function
    model: Function | str
    optimizer: Function | None
    batches: Function | None
    deal: Function | None
    plan: str | None
    data: tuple[str, ...] | None
    steps: int
    shape: tuple[int, int]
    dtype: str

    def loop(self) -> Loop:
        """Raises InputErrors of the model and the plan."""
        name = self.model if isinstance(self.model, str) else getattr(self.model, "__qualname__", "model")
        source = find_model(self.model) if isinstance(self.model, str) else factory_model(self.model, name)
        plan = plan_from(self.plan) if self.plan is not None else None
        dtype: torch.dtype = getattr(torch, self.dtype)
        return Loop(
            self.step, source, self.optimizer, self.batches, self.deal, plan, self.data, self.steps,
            self.shape, dtype,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sent:
    """The same for ranks that are started: functions by name. device: its type."""

    step: Named
    model: Named | None
    model_name: str
    optimizer: Named | None
    batches: Named | None
    deal: Named | None
    plan: str | None
    data: tuple[str, ...] | None
    steps: int
    shape: tuple[int, int]
    dtype: str
    mesh: Axes

    @classmethod
    def of(cls, asked: Asked, mesh: Axes) -> "Sent":
        """Raises OptionError for a function that has no name."""
        given = {each.name: getattr(asked, each.name) for each in fields(asked)}
        for name in ("step", "model", "optimizer", "batches", "deal"):
            if callable(given[name]):
                given[name] = Named.of(given[name], name)
        model = given.pop("model")
        is_name = isinstance(model, str)
        return cls(**given, model=None if is_name else model, model_name=model if is_name else "", mesh=mesh)

    def asked(self) -> Asked:
        given: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        for name, each in given.items():
            given[name] = each.load() if isinstance(each, Named) else each
        model_name = given.pop("model_name")
        del given["mesh"]
        return Asked(**{**given, "model": given["model"] or model_name})


def axes_of(mesh: str | DeviceMesh) -> Axes:
    """Of "NAME=SIZE,...", of any names. Raises MeshError."""
    if not isinstance(mesh, str):
        raise MeshError(
            'mesh: a DeviceMesh is for ranks that run already. Give its axes: mesh="fsdp=2,tp=2".'
        )
    axes = []
    for part in mesh.split(","):
        name, equals, size = part.strip().partition("=")
        if not equals or not name.isidentifier() or not size.isdecimal() or int(size) < 1:
            raise MeshError(
                f'mesh: can\'t read "{part.strip()}" in "{mesh}". Write NAME=SIZE, such as dp=2,tp=4.'
            )
        axes.append((name, int(size)))
    return tuple(axes)


def device_mesh_of(mesh: str | DeviceMesh, device: str) -> DeviceMesh:
    """On the ranks of the process group. Raises MeshError."""
    if not isinstance(mesh, str):
        return mesh
    names, sizes = zip(*axes_of(mesh), strict=True)
    world, asked = dist.get_world_size(), 1
    for size in sizes:
        asked *= size
    if world != asked:
        raise MeshError(f"mesh {mesh}: it has {asked} ranks, and the process group has {world}.")
    return init_device_mesh(device, sizes, mesh_dim_names=names)


def hold_on_ranks(asked: Asked, mesh: Axes, *, device_type: str, timeout_s: float) -> tuple[Finding, ...]:
    """Starts a rank for each place on the mesh. Raises InputErrors; RunError for a loop that fails on one
    process, and for ranks that died, failed or hang."""
    size = 1
    for _, n in mesh:
        size *= n
    results = run_ranks(
        "shardwise.verify.loop.hold:run",
        msgspec.json.encode(Sent.of(asked, mesh)),
        world_size=size,
        device_type=device_type,
        timeout_s=timeout_s,
    )
    return msgspec.msgpack.decode(results[0], type=tuple[Finding, ...])


def run(context: RankContext, payload: bytes) -> bytes:
    """Entry of every rank."""
    sent = msgspec.json.decode(payload, type=Sent)
    names, sizes = zip(*sent.mesh, strict=True)
    mesh = init_device_mesh(context.device.type, sizes, mesh_dim_names=names)
    return msgspec.msgpack.encode(hold(sent.asked(), mesh, context.device, context.note))


def hold_here(asked: Asked, mesh: str | DeviceMesh, device_type: str) -> tuple[Finding, ...]:
    """On ranks that run already: those of the process group, or of torchrun, which then have one for a while.
    What they draw afterwards is as if nothing had been. All ranks call it. Raises MeshError."""
    is_cuda = device_type == "cuda"
    owns_group = not dist.is_initialized()
    if owns_group:
        _join("nccl" if is_cuda else "gloo")
    device = torch.device(device_type, torch.cuda.current_device()) if is_cuda else torch.device(device_type)
    try:
        with torch.random.fork_rng([device.index] if is_cuda else []):
            return hold(asked, device_mesh_of(mesh, device_type), device)
    except ShardwiseError:
        raise
    except Exception as error:
        raise RunError(f"on rank {dist.get_rank()} it raises {shown_error(error, 300)}") from error
    finally:
        if owns_group:
            dist.destroy_process_group()


_times = count()


def _join(backend: str) -> None:
    """Makes a process group of torchrun's ranks, which may have had one before: what that one left in
    torchrun's store (where its ranks listened) isn't this one's."""
    store, rank, world_size = next(rendezvous("env://"))
    own = PrefixStore(f"shardwise/held/{next(_times)}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size)


def hold(
    asked: Asked, mesh: DeviceMesh, device: torch.device, note: Callable[[str], None] = lambda _: None
) -> tuple[Finding, ...]:
    """On all ranks of the mesh, which are those of the process group; all come to the same."""
    loop = asked.loop()
    data = loop.data_axes(mesh)
    parts = 1
    for name in data:
        parts *= mesh[name].size()
    dealt = [loop.part(loop.batch(number, device), mesh) for number in range(loop.steps)]
    whole, split, own = _alone(loop, device, dealt if parts > 1 else None, note)
    may_be = allowed(whole, split, loop.dtype)
    same = tuple(
        name
        for name in mesh.mesh_dim_names or ()
        if name not in data and not sees_other_tokens(name) and role_of(name) is not Role.CUTS_DEPTH
    )
    model = loop.sharded(mesh, device)
    drifts: list[Drift] = []
    watched = partial(_watched, model, mesh, same, drifts)
    told = partial(_tell, note, "on the ranks")
    sharded = record(loop, model, dealt.__getitem__, mesh, around=watched, told=told)
    off = differences(bare(model), sharded, whole, may_be, parts)
    runs = Runs(bare(model), mesh, data, parts, sharded, whole, own, may_be, off, drifts)
    found = findings(runs)
    if not found and same:
        found = _with_dropout(loop, mesh, device, same, dealt, note)
    return tuple(found)


def _alone(
    loop: Loop, device: torch.device, dealt: list[Any] | None, note: Callable[[str], None]
) -> tuple[Record, Record, Record | None]:
    """One process, with the whole batch; with its matmuls split; with this rank's part of the batch. Raises
    RunError where its step fails."""
    batches = [loop.batch(number, device) for number in range(loop.steps)]
    alone = _group_of_one()
    with default_group(alone):
        try:
            run = partial(record, loop, mesh=None, told=partial(_tell, note, "on one process"))
            whole = run(loop.whole(device), batches.__getitem__)
            split = run(loop.whole(device), batches.__getitem__, around=partial(SplitMatmuls, 2))
            own = None if dealt is None else run(loop.whole(device), dealt.__getitem__, steps=1)
        except ShardwiseError:
            raise
        except Exception as error:
            raise RunError(f"on one process it raises {shown_error(error, 300)}") from error
    return whole, split, own


def _tell(note: Callable[[str], None], where: str, number: int) -> None:
    note(f"step {number + 1} {where}")


@contextmanager
def _watched(model: Any, mesh: DeviceMesh, same: tuple[str, ...], drifts: list[Drift]) -> Iterator[None]:
    """The model's ranks are compared before each step, and at the end."""
    with watch(
        model, every=1, mesh=mesh, same_input=same, random=False, on_difference=drifts.append
    ) as sentinel:
        yield
        sentinel.check()


def _with_dropout(
    loop: Loop,
    mesh: DeviceMesh,
    device: torch.device,
    same: tuple[str, ...],
    dealt: list[Any],
    note: Callable[[str], None],
) -> list[Finding]:
    """Where nothing else is wrong: whether ranks that see the same tokens stay together with dropout on."""
    model = loop.sharded(mesh, device)
    made = loop.make_optimizer(model)
    drifts: list[Drift] = []
    with watch(
        model, every=1, mesh=mesh, same_input=same, random=False, on_difference=drifts.append
    ) as sentinel:
        for number in range(min(WITH_DROPOUT, loop.steps)):
            note(f"step {number + 1} on the ranks, with dropout")
            loop.run(model=model, batch=dealt[number], optimizer=made, mesh=mesh, number=number)
        sentinel.check()
    first = next((each for each in drifts if each.held is Held.WEIGHT), None)
    if first is None:
        return []
    along = " and ".join(first.axes)
    reason = (
        f"once dropout is on, weight {first.subject} is no longer the same along {along}: ranks drop other "
        "elements of what they hold alike"
    )
    advice = (
        f"Seed the ranks along {along} alike, by their place on the mesh's other axes, before the first step."
    )
    return [Finding(FindingKind.RANKS_DISAGREE, "dropout", reason, advice=advice, cause=Cause.RANKS_DRIFT)]


def _group_of_one() -> dist.ProcessGroup:
    """This rank's; all ranks call it."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return cast(dist.ProcessGroup, groups[dist.get_rank()])
