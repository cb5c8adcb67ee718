"""The local-shape run: a model's own forward with one rank's weights and attributes, as its made plan says
them, on meta tensors; each op's shape against what the unsharded model's record says a rank has there.

No collective runs, so it is of plans without a cut sequence. Look-up tables stay whole (a look-up's shape
doesn't depend on how many rows there are), and so does a head whose logits its plan gathers.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from shardwise.core.argument_cut import ArgumentCut
from shardwise.core.errors import ModelError
from shardwise.core.held import Held, count_of, size_on_a_rank, why_not_shared
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Replicate, Shard
from shardwise.core.plan import Plan, Rule, StyleName
from shardwise.dims.factors import ConflictError, Factor, Piece, layout, leaves, local_size
from shardwise.dims.record import Apart, Op, Record
from shardwise.dims.trace import record_of
from shardwise.models.source import ModelSource, vocab_size_of
from shardwise.planner.few import few_with_inner
from shardwise.planner.make import Wish, make_plan

REARRANGING = frozenset({"view", "_unsafe_view", "unsqueeze", "expand", "clone"})


@dataclass(frozen=True)
class LocalRun:
    """complaints: what a rank has otherwise than the record says. n_ops: how many ops were held against it.
    n_cut: of these, how many have a part of something."""

    complaints: tuple[str, ...]
    n_ops: int
    n_cut: int


def made_whole(source: ModelSource, tp: int) -> Plan:
    """The made plan, the sequence whole."""
    return make_plan(source, Wish(Mesh.parse(f"tp={tp}"), sequence=False)).plan


def local_run(source: ModelSource, plan: Plan, tp: int) -> LocalRun:
    whole, local = source.build(dtype=torch.bfloat16), source.build(dtype=torch.bfloat16)
    vocab_size = vocab_size_of(whole)
    rules = {name: rule for name, _ in whole.named_modules() if (rule := plan.rule_for(name))}
    apart = [Apart(name, each, how.dim) for name, rule in rules.items() for each, how in rule.style.cut]
    record = record_of(whole, vocab_size, apart=apart)
    held, named = held_by(rules, whole, tp), first_names(whole)
    shares = any(1 < count < tp for how in held.values() for count in how.parts)
    inner = few_with_inner(record, tp) if shares else {}
    try:
        cut = frozenset(leaf for name, how in held.items() for leaf in cut_leaves(record, named[name], how))
    except ConflictError as error:
        return LocalRun((str(error),), 0, 0)
    cut |= frozenset(inner[leaf] for leaf in cut if leaf in inner)
    make_local(local, rules, held, tp)
    gathered = {name for name, rule in rules.items() if rule.style.name is StyleName.WHOLE}
    try:
        expected, given = (_ops(each, gathered) for each in (record, record_of(local, vocab_size)))
    except ModelError as error:
        return LocalRun((str(error),), 0, 0)
    complaints = tuple(_differences(expected, given, cut, tp))
    n_cut = sum(not cut.isdisjoint(value.leaves()) for op in expected for value in op.outputs)
    return LocalRun(complaints, len(expected), n_cut)


def held_by(rules: Mapping[str, Rule], model: nn.Module, tp: int) -> dict[str, Held]:
    """How each parameter and buffer is held of which a rank has a part."""
    found: dict[str, Held] = {}
    for name, rule in rules.items():
        style, module = rule.style, model.get_submodule(name)
        told = dict(style.parameters)
        gathers = style.name is StyleName.COLWISE and style.output == Replicate()
        if gathers or isinstance(module, nn.Embedding):
            continue
        if not told and style.name in (StyleName.COLWISE, StyleName.ROWWISE):
            dim = 0 if style.name is StyleName.COLWISE else 1
            told = {"weight": Held(Shard(dim), style.pieces, parts=style.parts)}
            if dim == 0 and getattr(module, "bias", None) is not None:
                told["bias"] = Held(Shard(0), style.pieces, parts=style.parts)
        found |= {f"{name}.{own}".lstrip("."): how for own, how in told.items()}
    return {name: how for name, how in found.items() if _is_even(_tensor(model, name), how, tp)}


def _tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer."""
    owner, _, own = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), own)
    return found


def _is_even(tensor: Tensor, how: Held, tp: int) -> bool:
    """An odd vocabulary is cut into unequal parts: the head is left whole then, too."""
    if not isinstance(how.placement, Shard):
        return False
    pieces = how.pieces or (tensor.shape[how.placement.dim],)
    return why_not_shared(pieces, how.parts, tp) is None


def first_names(model: nn.Module) -> dict[str, str]:
    """Each parameter's and buffer's name -> the one that the record has: another, where a module shares
    it."""
    first: dict[int, str] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def cut_leaves(record: Record, name: str, how: Held) -> frozenset[Factor]:
    """The leaves of a parameter's dim that its pieces are the units of. Raises ConflictError where they are
    those of none."""
    assert isinstance(how.placement, Shard)
    value = record.parameters.get(name) or record.buffers[name]
    dim = value.dims[how.placement.dim]
    pieces = how.pieces or (dim.size,)
    counts = how.parts or (0,) * len(pieces)
    wanted = _spans([Piece(size, count != 1) for size, count in zip(pieces, counts, strict=True)])
    found = frozenset(leaf for leaf in leaves(dim) if _spans(_laid_out(dim, leaf)) <= wanted)
    if _spans(layout(dim, found)) != wanted:
        raise ConflictError(f"{name} isn't cut at its own units: {dim} by {how}")
    return found


def _laid_out(dim: Factor, leaf: Factor) -> list[Piece]:
    try:
        return layout(dim, frozenset({leaf}))
    except ConflictError:
        return []


def _spans(pieces: list[Piece]) -> set[tuple[int, int]]:
    found, start = set(), 0
    for piece in pieces:
        if piece.is_cut:
            found.add((start, start + piece.size))
        start += piece.size
    return found


def make_local(model: nn.Module, rules: Mapping[str, Rule], held: Mapping[str, Held], tp: int) -> None:
    """Gives a model on the meta device a rank's weights and counts."""
    for name, how in held.items():
        owner, _, own = name.rpartition(".")
        assert isinstance(how.placement, Shard)
        module = model.get_submodule(owner)
        whole = _tensor(model, name)
        shape = list(whole.shape)
        pieces = how.pieces or (shape[how.placement.dim],)
        shape[how.placement.dim] = size_on_a_rank(pieces, how.parts, tp)
        local = torch.empty(shape, dtype=whole.dtype, device="meta")
        setattr(module, own, nn.Parameter(local) if isinstance(whole, nn.Parameter) else local)
    for name, rule in rules.items():
        for entry in rule.style.divide:
            divide(model.get_submodule(name), *count_of(entry), tp)
        for argument, part in rule.style.cut:
            cut_argument(model.get_submodule(name), argument, part, tp)
        if rule.style.name is StyleName.WHOLE:
            module = model.get_submodule(name)
            module.forward = _pass


def cut_argument(module: nn.Module, name: str, how: ArgumentCut, tp: int) -> None:
    """Has a module's forward get the first rank's part of a constant."""
    inner, signature = module.forward, inspect.signature(module.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        whole = given.arguments[name]
        every = how.every or whole.shape[how.dim]
        with _disable_current_modes():  # no op of the model's
            runs = whole.unflatten(how.dim, (-1, every)).narrow(how.dim + 1, 0, every // tp)
            given.arguments[name] = runs.flatten(how.dim, how.dim + 1)
        return inner(*given.args, **given.kwargs)

    module.forward = forward


def _pass(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands for a module that gathers what it takes, runs whole and gives its part."""
    return x.clone()


def divide(holder: Any, attribute: str, pieces: tuple[int, ...], parts: tuple[int, ...], tp: int) -> None:
    """A rank's count: of an object that others have, too, on a copy that this module has for itself."""
    first, _, rest = attribute.partition(".")
    if rest:
        own = copy.copy(getattr(holder, first))
        divide(own, rest, pieces, parts, tp)
        setattr(holder, first, own)
        return
    name, _, place = first.rstrip("]").partition("[")
    held = getattr(holder, name)
    count = held[int(place)] if place else held
    local = size_on_a_rank(pieces or (count,), parts, tp)
    if place:
        local = type(held)((*held[: int(place)], local, *held[int(place) + 1 :]))
    setattr(holder, name, local)


def _ops(record: Record, gathered: set[str]) -> list[Op]:
    return [op for op in record.ops if not any(f"{op.module}.".startswith(f"{each}.") for each in gathered)]


def _differences(expected: list[Op], given: list[Op], cut: frozenset[Factor], tp: int) -> Iterator[str]:
    """Between what the record says and what a rank has. Where it has one of something that others have more
    of, PyTorch and models leave out what only rearranges."""
    names, own_names = ([(op.name, op.module) for op in ops] for ops in (expected, given))
    for tag, a, b, c, d in SequenceMatcher(None, names, own_names, autojunk=False).get_opcodes():
        if tag == "equal":
            for op, own in zip(expected[a:b], given[c:d], strict=True):
                yield from _shapes(op, own, cut, tp)
        else:
            for op in (*expected[a:b], *given[c:d]):
                if op.name not in REARRANGING:
                    yield f"{op.name} in {op.module} is on one side only"


def _shapes(op: Op, own: Op, cut: frozenset[Factor], tp: int) -> Iterator[str]:
    for value, local in zip(op.outputs, own.outputs, strict=True):
        try:
            shape = tuple(local_size(dim, cut, tp) for dim in value.dims)
        except ConflictError as error:
            yield f"{op.name} in {op.module}: {error}"
        else:
            if local.shape != shape:
                yield f"{op.name} in {op.module} gives {local.shape} on a rank, not {shape} of {value.shape}"
