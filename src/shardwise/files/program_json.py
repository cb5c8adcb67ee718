"""Program <-> one JSON document, so that what was traced once can be predicted anywhere, without torch. No code comes from the file.

Compact: one line. Items are objects tagged "op", "collective" or "memory"; placements are the text of plan files. Nothing is lost:
program_from_json(program_json(p)) == p. Reading is strict about types and versions, and bounded: sizes, counts, names, and what repeating
blocks unfold to. Shapes of matmuls and attention must be those that a cost can be worked out from.
"""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveCall, CollectiveKind
from shardwise.core.errors import InputError, MeshError
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Placement, format_placement, parse_placement
from shardwise.core.program import (
    Block,
    ByData,
    Collective,
    Holding,
    Item,
    MemoryChange,
    MemoryKind,
    Op,
    OpKind,
    Phase,
    Program,
    RuleUse,
    TensorSpec,
    layer_index,
)
from shardwise.core.shown import shown

SCHEMA_VERSION = 1
LARGEST_FILE = 256_000_000  # bytes; llama3.1-405b's is 6 MB
MOST_ITEMS = 5_000_000  # of the step, with what blocks repeat
MOST_LAYERS = 10_000
LARGEST = 2**62

_Size = Annotated[int, Meta(ge=0, le=LARGEST)]
_Dim = Annotated[int, Meta(ge=0, le=2**40)]
_Shape = Annotated[tuple[_Dim, ...], Meta(max_length=16)]
_Bytes = Annotated[float, Meta(ge=0, le=float(LARGEST))]
_Name = Annotated[str, Meta(max_length=1000)]
_Count = Annotated[int, Meta(ge=1, le=10_000_000)]


class _Spec(Struct, array_like=True):
    dtype: _Name
    shape: _Shape


class _Op(Struct, tag="op", tag_field="item"):
    name: _Name
    kind: OpKind
    phase: Phase
    module: _Name
    inputs: tuple[_Spec, ...]
    outputs: tuple[_Spec, ...]
    flops: _Size
    read_bytes: _Size
    write_bytes: _Size
    on_host: bool = False


class _ByData(Struct):
    mean_bytes: _Bytes
    max_bytes: _Bytes
    max_rank: Annotated[int, Meta(ge=0, le=10_000_000)]
    bound_bytes: _Bytes


class _Call(Struct):
    kind: CollectiveKind
    axis: _Name
    axis_size: _Count
    dtype: _Name
    payload_bytes: _Size
    wire_bytes: _Bytes
    phase: Phase


class _Collective(Struct, tag="collective", tag_field="item"):
    call: _Call
    module: _Name
    rule: str | None = None
    before: str | None = None
    after: str | None = None
    by_data: _ByData | None = None


class _Memory(Struct, tag="memory", tag_field="item"):
    n_bytes: Annotated[int, Meta(ge=-LARGEST, le=LARGEST)]
    kind: MemoryKind
    phase: Phase
    module: _Name
    maker: _Name


class _Block(Struct):
    items: tuple[_Op | _Collective | _Memory, ...]
    times: Annotated[int, Meta(ge=1, le=MOST_LAYERS)] = 1
    prefix: _Name | None = None
    stride: Annotated[int, Meta(ge=-1, le=1)] = 1


class _Holding(Struct):
    name: _Name
    module: _Name
    dtype: _Name
    shape: _Shape
    local_shape: _Shape
    placement: tuple[str, ...]
    parameter_bytes: _Size
    grad_shape: _Shape | None
    grad_placement: tuple[str, ...] | None
    gradient_bytes: _Size
    optimizer_bytes: _Size
    rule: str | None = None
    shared: tuple[_Name, ...] = ()


class _Rule(Struct):
    pattern: _Name
    style: _Name
    modules: tuple[_Name, ...]


class _Settings(Struct):
    batch: _Count
    seq: _Count
    dtype: _Name
    accumulation: _Count
    recompute: _Name
    compiled: bool
    learning_rate: float
    max_norm: float
    seed: int
    param_dtype: _Name | None = None
    reduce_dtype: _Name | None = None


class _Program(Struct):
    schema_version: int
    model: _Name
    plan: _Name
    engine: _Name
    device: _Name
    rank: Annotated[int, Meta(ge=0, le=10_000_000)]
    axes: tuple[tuple[_Name, _Count], ...]
    settings: _Settings
    parameters: _Size
    blocks: tuple[_Block, ...]
    holdings: tuple[_Holding, ...]
    rules: tuple[_Rule, ...]
    resident: tuple[tuple[MemoryKind, _Size], ...]
    layers: tuple[_Name, Annotated[int, Meta(ge=1, le=MOST_LAYERS)]] | None = None
    compressed: bool = False
    notes: tuple[str, ...] = ()


class _OfVersion(Struct):
    schema_version: object = None


class _Wrong(Exception):  # noqa: N818
    """What is wrong with a program, and where."""


def program_json(program: Program) -> bytes:
    """The whole program as one line of JSON."""
    document = _Program(
        SCHEMA_VERSION,
        program.model,
        program.plan,
        program.engine,
        program.device,
        program.rank,
        program.axes,
        _Settings(**{field: getattr(program.settings, field) for field in _Settings.__struct_fields__}),
        program.parameters,
        tuple(
            _Block(tuple(map(_written, block.items)), block.times, block.prefix, block.stride)
            for block in program.blocks
        ),
        tuple(map(_written_holding, program.holdings)),
        tuple(_Rule(rule.pattern, rule.style, rule.modules) for rule in program.rules),
        program.resident,
        program.layers,
        program.compressed,
        program.notes,
    )
    return msgspec.json.encode(document) + b"\n"


def program_from_json(document: bytes, source: str = "program") -> Program:
    """A saved program. Raises InputError, which names `source`, the field and what it should be."""
    advice = "Give the file that shardwise predict --save-program wrote."
    if len(document) > LARGEST_FILE:
        raise InputError(f"{source}: is larger than {LARGEST_FILE:,} bytes, and no program is. {advice}")
    try:
        version = msgspec.json.decode(document, type=_OfVersion).schema_version
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise InputError(
                f"{source}: schema_version is {shown(repr(version), 40)}; this Shardwise reads {SCHEMA_VERSION}. Trace the program again."
            )
        found = msgspec.json.decode(document, type=_Program)
        return _program(found)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: not a saved program: {shown(error, 200)}. {advice}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON: {shown(error, 200)}. {advice}") from None
    except _Wrong as error:
        raise InputError(f"{source}: not a saved program: {error}. {advice}") from None


def _written(item: Item) -> _Op | _Collective | _Memory:
    match item:
        case Op():
            return _Op(
                item.name, item.kind, item.phase, item.module, _written_specs(item.inputs), _written_specs(item.outputs),
                item.flops, item.read_bytes, item.write_bytes, item.on_host,
            )  # fmt: skip
        case Collective():
            call, by_data = item.call, item.by_data
            return _Collective(
                _Call(
                    call.kind,
                    call.axis,
                    call.axis_size,
                    call.dtype,
                    call.payload_bytes,
                    call.wire_bytes,
                    Phase(call.phase),
                ),
                item.module,
                item.rule,
                _written_placement(item.before),
                _written_placement(item.after),
                None
                if by_data is None
                else _ByData(by_data.mean_bytes, by_data.max_bytes, by_data.max_rank, by_data.bound_bytes),
            )
        case MemoryChange():
            return _Memory(item.n_bytes, item.kind, item.phase, item.module, item.maker)


def _written_specs(specs: tuple[TensorSpec, ...]) -> tuple[_Spec, ...]:
    return tuple(_Spec(spec.dtype, spec.shape) for spec in specs)


def _written_placement(placement: Placement | None) -> str | None:
    return None if placement is None else format_placement(placement)


def _written_holding(holding: Holding) -> _Holding:
    return _Holding(
        holding.name, holding.module, holding.dtype, holding.shape, holding.local_shape, tuple(map(format_placement, holding.placement)),
        holding.parameter_bytes, holding.grad_shape,
        None if holding.grad_placement is None else tuple(map(format_placement, holding.grad_placement)),
        holding.gradient_bytes, holding.optimizer_bytes, holding.rule, holding.shared,
    )  # fmt: skip


def _program(found: _Program) -> Program:
    try:
        axes = Mesh(found.axes).axes
    except MeshError as error:
        raise _Wrong(str(error).rstrip(".")) from None
    prefix, n_layers = found.layers if found.layers is not None else (None, 0)
    blocks = tuple(_block(block, prefix, n_layers, {name for name, _ in axes}) for block in found.blocks)
    n_items = sum(len(block.items) * block.times for block in blocks)
    if n_items > MOST_ITEMS:
        raise _Wrong(f"its blocks unfold to {n_items:,} items, and at most {MOST_ITEMS:,} are read")
    if not any(isinstance(item, Op) for block in blocks for item in block.items):
        raise _Wrong("it has no op")
    settings = found.settings
    return Program(
        found.model,
        found.plan,
        found.engine,
        found.device,
        found.rank,
        axes,
        StepSettings(**{field: getattr(settings, field) for field in _Settings.__struct_fields__}),
        found.parameters,
        blocks,
        tuple(map(_holding, found.holdings)),
        tuple(RuleUse(rule.pattern, rule.style, rule.modules) for rule in found.rules),
        found.resident,
        found.layers,
        found.compressed,
        found.notes,
    )


def _block(block: _Block, prefix: str | None, n_layers: int, axes: set[str]) -> Block:
    if block.times > 1 and (prefix is None or block.prefix != prefix or block.stride == 0):
        raise _Wrong(
            f"a block repeats layers of {shown(block.prefix)}, and the program's layers are {shown(prefix)}"
        )
    items = tuple(_item(item, axes) for item in block.items)
    for item in items:
        index = layer_index(item.module[:1000], prefix)
        if index is not None and not (
            0 <= index < n_layers and 0 <= index + block.stride * (block.times - 1) < n_layers
        ):
            raise _Wrong(
                f"{shown(item.module)} is no part of {n_layers} layers, repeated {block.times} times"
            )
    return Block(items, block.times, block.prefix, block.stride)


def _item(item: _Op | _Collective | _Memory, axes: set[str]) -> Item:
    match item:
        case _Op():
            made = Op(
                item.name, item.kind, item.phase, item.module, _specs(item.inputs), _specs(item.outputs),
                item.flops, item.read_bytes, item.write_bytes, item.on_host,
            )  # fmt: skip
            _check_shapes(made)
            return made
        case _Collective():
            call, by_data = item.call, item.by_data
            if call.axis not in axes:
                raise _Wrong(
                    f"a collective of {shown(item.module)} is over axis {shown(call.axis)}, which the mesh hasn't"
                )
            return Collective(
                CollectiveCall(
                    call.kind,
                    call.axis,
                    call.axis_size,
                    call.dtype,
                    call.payload_bytes,
                    call.wire_bytes,
                    call.phase,
                ),
                item.module,
                item.rule,
                _placement(item.before),
                _placement(item.after),
                None
                if by_data is None
                else ByData(by_data.mean_bytes, by_data.max_bytes, by_data.max_rank, by_data.bound_bytes),
            )
        case _Memory():
            return MemoryChange(item.n_bytes, item.kind, item.phase, item.module, item.maker)


def _specs(specs: tuple[_Spec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(spec.dtype, spec.shape) for spec in specs)


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
            f"{shown(op.name)} of {shown(op.module)} is {op.kind}, and its inputs are {shown(', '.join(map(str, op.inputs)) or 'none')}"
        )


def _placement(text: str | None) -> Placement | None:
    try:
        return None if text is None else parse_placement(text[:100])
    except ValueError as error:
        raise _Wrong(str(error).rstrip(".")) from None


def _placements(texts: tuple[str, ...]) -> tuple[Placement, ...]:
    found = tuple(map(_placement, texts))
    return tuple(placement for placement in found if placement is not None)


def _holding(holding: _Holding) -> Holding:
    return Holding(
        holding.name, holding.module, holding.dtype, holding.shape, holding.local_shape, _placements(holding.placement),
        holding.parameter_bytes, holding.grad_shape,
        None if holding.grad_placement is None else _placements(holding.grad_placement),
        holding.gradient_bytes, holding.optimizer_bytes, holding.rule, holding.shared,
    )  # fmt: skip
