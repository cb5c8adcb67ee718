"""The space of a search, from what was asked: --fix and --forbid, the degrees of the axes, the sizes of
micro-batches; and its candidates."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd

from shardwise.core.case import RECOMPUTE
from shardwise.core.errors import OptionError
from shardwise.core.mesh import CONTEXT_AXIS, EXPERTS_AXIS, NAMES, STAGES_AXIS, TENSOR_AXIS, Mesh, Role
from shardwise.core.plan import suggest
from shardwise.core.search import SEQUENCE, Candidate, Group
from shardwise.core.shown import shown
from shardwise.predict.sweep import all_meshes, why_no_tensor_ranks

CHUNKS = (1, 2, 4)
RESHARD = {"yes": True, "no": False}
DECISIONS = ("micro-batch", "recompute", "chunks", "reshard", SEQUENCE)
"""What can be fixed beside axes and groups of modules."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for of each decision, by its name: values that alone are allowed, and values that
    aren't."""

    fixed: Mapping[str, tuple[str, ...]]
    forbidden: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, fixes: Sequence[str], forbids: Sequence[str]) -> "Wanted":
        """From `tp=8`, `tok_embeddings=rowwise,colwise`. Raises OptionError for what can't be read, and
        for two that contradict each other."""
        fixed: dict[str, tuple[str, ...]] = {}
        for given in fixes:
            name, values = _read("--fix", given)
            if name in fixed and set(fixed[name]).isdisjoint(values):
                raise OptionError(
                    f"--fix {name}={','.join(fixed[name])} and --fix {shown(given)} contradict each other. "
                    "Leave one out."
                )
            fixed[name] = tuple(value for value in values if value in fixed.get(name, values))
        forbidden: dict[str, tuple[str, ...]] = {}
        for given in forbids:
            name, values = _read("--forbid", given)
            forbidden[name] = (*forbidden.get(name, ()), *values)
            if name in fixed and set(fixed[name]) <= set(forbidden[name]):
                raise OptionError(
                    f"--fix {name}={','.join(fixed[name])} and --forbid {shown(given)} contradict each "
                    "other. Leave one out."
                )
        return cls(fixed, forbidden)

    def check_names(self, groups: Iterable[str]) -> None:
        """Raises OptionError for a decision that there isn't."""
        known = (*NAMES, *DECISIONS, *groups)
        for option, given in (("--fix", self.fixed), ("--forbid", self.forbidden)):
            for name in given:
                if name not in known:
                    raise OptionError(
                        f"{option} {name}=...: there is no such decision.{suggest(name, known)} "
                        f"Allowed: {', '.join(dict.fromkeys(known))}."
                    )

    def check_ranks(self, devices: int) -> None:
        """Raises OptionError where the least degrees that axes are fixed to make more ranks than there are
        devices, or another number that can't be shared out."""
        least = {
            axis: min(map(int, self.fixed[axis]))
            for axis in NAMES
            if axis in self.fixed and all(value.isdecimal() and int(value) for value in self.fixed[axis])
        }
        ranks = math.prod(least.values())
        are_alone = all(len(self.fixed[axis]) == 1 for axis in least)
        if ranks > devices or (are_alone and devices % ranks):
            given = " and ".join(f"--fix {axis}={','.join(self.fixed[axis])}" for axis in least)
            raise OptionError(
                f"{given} make {ranks} ranks, and {devices} devices can't be shared out so. Change one of "
                "them, or --devices."
            )

    def allowed(self, name: str, values: Sequence[str], *, why: str = "") -> tuple[str, ...]:
        """Of a decision's values. Raises OptionError where a fixed one isn't there, or none is left."""
        for value in self.fixed.get(name, ()):
            if value not in values:
                raise OptionError(
                    f"--fix {name}={value}: allowed is {', '.join(values)}.{why or suggest(value, values)}"
                )
        wanted = self.fixed.get(name, values)
        left = tuple(each for each in values if each in wanted and each not in self.forbidden.get(name, ()))
        if not left:
            raise OptionError(
                f"--forbid {name}=...: nothing is left of {', '.join(values)}. Allow one of them."
            )
        return left

    def degrees(self, axis: str, values: Sequence[int], devices: int) -> tuple[int, ...]:
        """Of an axis; values: those that are tried if nothing is asked."""
        given = self.fixed.get(axis, ())
        for value in (*given, *self.forbidden.get(axis, ())):
            if not value.isdecimal() or not int(value):
                raise OptionError(f"{axis}={shown(value)}: is no number of ranks. Use 1 or more.")
        for value in given:
            if devices % int(value):
                raise OptionError(
                    f"--fix {axis}={value}: {devices} devices can't be shared out evenly. Use a divisor of "
                    f"{devices}."
                )
        tried = [int(value) for value in given] or list(values)
        banned = set(map(int, self.forbidden.get(axis, ())))
        left = tuple(each for each in tried if each not in banned and devices % each == 0)
        if not left:
            raise OptionError(f"--forbid {axis}=...: no degree of {axis} is left. Allow one.")
        return left


def _read(option: str, given: str) -> tuple[str, tuple[str, ...]]:
    name, equals, values = given.partition("=")
    found = tuple(value.strip() for value in values.split(",") if value.strip())
    if not equals or not name.strip() or not found:
        raise OptionError(
            f'{option} is "{shown(given)}". Write DECISION=VALUE, such as tp=8 or tok_embeddings=rowwise.'
        )
    return name.strip(), found


def free_degrees(devices: int, layers: int, experts: int, seq: int) -> dict[str, tuple[int, ...]]:
    """Of the axes whose degrees decide what is traced: divisors of the devices; stages at most as many as
    layers, context ranks that can have two equal parts of the sequence each, experts that can be shared
    out."""
    divisors = [each for each in range(1, min(devices, 4096) + 1) if devices % each == 0]
    return {
        STAGES_AXIS: tuple(each for each in divisors if each <= max(1, layers)),
        TENSOR_AXIS: tuple(divisors),
        CONTEXT_AXIS: tuple(each for each in divisors if each <= 8 and seq % (2 * each) == 0),
        EXPERTS_AXIS: tuple(each for each in divisors if experts and experts % each == 0) or (1,),
    }


def within_node(tensor_ranks: Sequence[int], devices: int, per_node: int) -> tuple[int, ...]:
    """Those whose groups lie within a node each. Raises OptionError where there are none."""
    why = {tp: why_no_tensor_ranks(tp, devices, per_node) for tp in tensor_ranks}
    found = tuple(tp for tp in tensor_ranks if why[tp] is None)
    if not found:
        raise OptionError(
            f"tp={','.join(map(str, tensor_ranks))} on {devices} devices: {why[tensor_ranks[0]]}. Use a "
            f"divisor of {per_node}."
        )
    return found


@dataclass(frozen=True, slots=True)
class Choices:
    """What is open, beside styles. degrees: tp's may lie over nodes: those that do are refused. batch:
    sequences of a step."""

    devices: int
    per_node: int
    degrees: Mapping[str, tuple[int, ...]]
    micro_batches: tuple[int, ...]
    chunks: tuple[int, ...]
    reshard: tuple[bool, ...]
    batch: int
    layers: int
    is_mixed: bool


def candidates(
    choices: Choices, groups: Mapping[int, tuple[Group, ...]], refused: Counter[str]
) -> Iterator[Candidate]:
    """With each choice of the sequence and the default style of everything else. groups: by tp, without
    what isn't allowed. refused: counts why others can't be."""
    for mesh in _meshes(choices, refused):
        if mesh.tp > 1 and not groups[mesh.tp]:
            refused[f"nothing of the model can be cut over tp={mesh.tp}"] += 1
            continue
        if choices.is_mixed and not mesh.shard_axes:
            refused["mixed precision is FSDP's, and the mesh has no fsdp ranks"] += 1
            continue
        for size, chunks in product(choices.micro_batches, choices.chunks if mesh.stages > 1 else (1,)):
            why = _why_not(choices, mesh, size, chunks)
            if why is not None:
                refused[why] += 1
                continue
            count = choices.batch // (mesh.data_parallel * size)
            for styles in _defaults(groups[mesh.tp]):
                for reshard in choices.reshard if mesh.shard_axes else (True,):
                    yield Candidate(mesh.axes, styles, size, count, chunks=chunks, reshard=reshard)


def _meshes(choices: Choices, refused: Counter[str]) -> Iterator[Mesh]:
    seen = set()
    degrees = choices.degrees
    for context, experts in product(degrees[CONTEXT_AXIS], degrees[EXPERTS_AXIS]):
        if choices.devices % (context * experts):
            continue
        kept = {Role.CUTS_SEQUENCE: context, Role.CUTS_EXPERTS: experts}
        given = Mesh.of({role: size for role, size in kept.items() if size > 1})
        for mesh in all_meshes(choices.devices, given):
            if mesh in seen or any(mesh.size(name) not in allowed for name, allowed in degrees.items()):
                continue
            seen.add(mesh)
            why = why_no_tensor_ranks(mesh.tp, choices.devices, choices.per_node)
            if why is None:
                yield mesh
            else:
                refused[why] += 1


def _why_not(choices: Choices, mesh: Mesh, size: int, chunks: int) -> str | None:
    at_once, shared = mesh.data_parallel * size, gcd(mesh.context, size)
    if shared > 1 and mesh.context // shared in choices.degrees[CONTEXT_AXIS]:
        # as data-parallel ranks they do the same work, and exchange no keys
        return "context ranks share sequences of which each could have its own"
    if choices.batch % at_once:
        return f"a batch of {choices.batch} can't be cut into equal micro-batches of each data-parallel rank"
    count, stages = choices.batch // at_once, mesh.stages
    if stages == 1:
        return None
    if count < stages:
        return "fewer micro-batches than stages"
    if chunks > 1 and count % stages:
        return "micro-batches can't be dealt to interleaved stages"
    if stages * chunks > choices.layers:
        return "more stages and chunks than layers"
    return None


def _defaults(groups: Sequence[Group]) -> Iterator[tuple[tuple[str, str], ...]]:
    if not groups:
        yield ()
        return
    for sequence in groups[0].options:
        yield tuple(
            (group.name, sequence if group.name == SEQUENCE else group.options[0]) for group in groups
        )


def restricted(groups: Sequence[Group], wanted: Wanted) -> tuple[Group, ...]:
    """Groups with what is allowed of their options."""
    found = []
    for group in groups:
        reasons = dict(group.why)
        asked = [value for value in wanted.fixed.get(group.name, ()) if value in reasons]
        why = f" {asked[0]} can't be: {reasons[asked[0]]}." if asked else ""
        options = wanted.allowed(group.name, group.options, why=why)
        found.append(Group(group.name, group.modules, options, group.why))
    return tuple(found)


def of_recompute(wanted: Wanted) -> tuple[str, ...]:
    return wanted.allowed("recompute", RECOMPUTE)
