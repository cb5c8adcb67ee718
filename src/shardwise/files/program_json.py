"""Program <-> one JSON document, so that what was traced once can be predicted anywhere, without torch. No
code comes from the file.

Compact: one line. Items are objects tagged "op", "collective" or "memory"; all else is as files/document.py
has it. Nothing is lost: program_from_json(program_json(p)) == p. Reading is bounded: sizes, counts, names,
and what repeating blocks unfold to. Shapes of matmuls and attention must be those that a cost can be worked
out from.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveCall, is_off_mesh
from shardwise.core.errors import InputError, MeshError
from shardwise.core.layer_name import layer_index
from shardwise.core.mesh import Mesh, axes_in
from shardwise.core.program import (
    Block,
    ByData,
    Collective,
    Item,
    MemoryChange,
    Op,
    OpKind,
    Phase,
    Program,
    TensorSpec,
)
from shardwise.core.shown import shown
from shardwise.files.document import Form, Mismatch, read, written

SCHEMA_VERSION = 1
LARGEST_FILE = 256_000_000  # bytes; llama3.1-405b's is 6 MB
MOST_ITEMS = 5_000_000  # of the step, with what blocks repeat
MOST_LAYERS = 10_000
LARGEST = 2**62
_ADVICE = "Give the file that shardwise predict --save-program wrote."

_Size = Annotated[int, Meta(ge=0, le=LARGEST)]
_Shape = Annotated[tuple[Annotated[int, Meta(ge=0, le=2**40)], ...], Meta(max_length=16)]
_Bytes = Annotated[float, Meta(ge=0, le=float(LARGEST))]
_Name = Annotated[str, Meta(max_length=1000)]
_Count = Annotated[int, Meta(ge=1, le=10_000_000)]
_Rank = Annotated[int, Meta(ge=0, le=10_000_000)]
_Layers = Annotated[int, Meta(ge=1, le=MOST_LAYERS)]
FORM = Form(
    tag_field="item",
    tags={Op: "op", Collective: "collective", MemoryChange: "memory"},
    arrays=frozenset({TensorSpec}),
    worked_out=False,
    limits={
        int: _Size,
        str: _Name,
        tuple[int, ...]: _Shape,
        (ByData, "mean_bytes"): _Bytes,
        (ByData, "max_bytes"): _Bytes,
        (ByData, "max_rank"): _Rank,
        (ByData, "bound_bytes"): _Bytes,
        (CollectiveCall, "axis_size"): _Count,
        (CollectiveCall, "wire_bytes"): _Bytes,
        (CollectiveCall, "phase"): Phase,
        (MemoryChange, "n_bytes"): Annotated[int, Meta(ge=-LARGEST, le=LARGEST)],
        (MemoryChange, "nth"): Annotated[int, Meta(ge=-MOST_ITEMS, le=MOST_ITEMS)],
        (Block, "times"): _Layers,
        (Block, "stride"): Annotated[int, Meta(ge=-1, le=1)],
        (StepSettings, "batch"): _Count,
        (StepSettings, "seq"): _Count,
        (StepSettings, "accumulation"): _Count,
        (StepSettings, "learning_rate"): float,
        (StepSettings, "max_norm"): float,
        (StepSettings, "seed"): int,
        (Program, "rank"): _Rank,
        (Program, "axes"): tuple[tuple[_Name, _Count], ...],
        (Program, "layers"): tuple[_Name, _Layers] | None,
        (Program, "notes"): tuple[str, ...],
    },
)


def program_json(program: Program) -> bytes:
    """The whole program as one line of JSON."""
    table = written(program, FORM)
    assert isinstance(table, dict)
    return msgspec.json.encode({"schema_version": SCHEMA_VERSION, **table}) + b"\n"


def program_from_json(document: bytes, source: str = "program") -> Program:
    """A saved program. Raises InputError, which names `source`, the field and what it should be."""
    if len(document) > LARGEST_FILE:
        raise InputError(f"{source}: is larger than {LARGEST_FILE:,} bytes, and no program is. {_ADVICE}")
    try:
        table = msgspec.json.decode(document)
    except RecursionError:
        raise InputError(f"{source}: not a saved program: it is nested too deeply. {_ADVICE}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: not valid JSON: {shown(error, 200)}. {_ADVICE}") from None
    if isinstance(table, dict):
        _check_version(table.get("schema_version"), source)
    try:
        program = read(table, Program, FORM)
        _check(program)
    except Mismatch as error:
        raise InputError(f"{source}: not a saved program: {shown(error, 200)}. {_ADVICE}") from None
    except (_Wrong, MeshError) as error:
        raise InputError(f"{source}: not a saved program: {str(error).rstrip('.')}. {_ADVICE}") from None
    return program


def _check_version(version: object, source: str) -> None:
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InputError(
            f"{source}: schema_version is {shown(repr(version), 40)}; this Shardwise reads {SCHEMA_VERSION}. "
            "Trace the program again."
        )


class _Wrong(Exception):  # noqa: N818
    """What is wrong with a program, and where."""


def _check(program: Program) -> None:
    """What a Program's types don't say."""
    axes = {name for name, _ in Mesh(program.axes).axes}
    prefix, n_layers = program.layers if program.layers is not None else (None, 0)
    for block in program.blocks:
        _check_block(block, prefix, n_layers)
        for item in block.items:
            _check_item(item, axes)
    n_items = sum(len(block.items) * block.times for block in program.blocks)
    if n_items > MOST_ITEMS:
        raise _Wrong(f"its blocks unfold to {n_items:,} items, and at most {MOST_ITEMS:,} are read")
    if not any(isinstance(item, Op) for block in program.blocks for item in block.items):
        raise _Wrong("it has no op")


def _check_block(block: Block, prefix: str | None, n_layers: int) -> None:
    if block.times > 1 and (prefix is None or block.prefix != prefix or block.stride == 0):
        raise _Wrong(
            f"a block repeats layers of {shown(block.prefix)}, and the program's layers are {shown(prefix)}"
        )
    for item in block.items:
        index = layer_index(item.module, prefix)
        if index is None:
            continue
        last = index + block.stride * (block.times - 1)
        if not (0 <= index < n_layers and 0 <= last < n_layers):
            raise _Wrong(
                f"{shown(item.module)} is no part of {n_layers} layers, repeated {block.times} times"
            )


def _check_item(item: Item, axes: set[str]) -> None:
    if isinstance(item, Op):
        _check_shapes(item)
    elif isinstance(item, Collective) and _is_foreign(item.call.axis, axes):
        raise _Wrong(
            f"a collective of {shown(item.module)} is over axis {shown(item.call.axis)}, which the mesh "
            "hasn't"
        )


def _is_foreign(axis: str, axes: set[str]) -> bool:
    return not is_off_mesh(axis) and not axes.issuperset(axes_in(axis))


def _check_shapes(op: Op) -> None:
    """What predict/costs.py takes for granted of ops that arithmetic bounds."""
    base = op.name.removeprefix("aten::")
    ranks = [len(spec.shape) for spec in op.inputs]
    if op.kind is OpKind.MATMUL:
        first = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(base)
        right = (
            bool(ranks)
            if first is None
            else len(ranks) >= first + 2 and all(2 <= rank <= 3 for rank in ranks[first : first + 2])
        )
    elif op.kind is OpKind.ATTENTION or (op.kind is OpKind.UNKNOWN and op.flops):
        first = 1 if "backward" in op.name else 0
        right = len(ranks) >= first + 2 and all(rank == 4 for rank in ranks[first : first + 2])
    else:
        return
    if not right:
        raise _Wrong(
            f"{shown(op.name)} of {shown(op.module)} is {op.kind}, and its inputs are "
            f"{shown(', '.join(map(str, op.inputs)) or 'none')}"
        )
