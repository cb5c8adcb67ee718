"""What of a traced step one module's parameter is for, as a Program of its own: what its style issues forward
and backward, the sum of its gradient where ranks hold it whole, and its share of clipping and optimizer.

Ops of clipping and optimizer take all parameters at once: its share is that of its bytes among those that the
op takes. The sum of whole gradients is one collective for all parameters that ranks hold whole: it counts in
full, so this is for models whose other such parameters are small.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.program import (
    ONCE,
    REPLICATED_PARAMETERS,
    Block,
    Collective,
    Holding,
    Item,
    MemoryKind,
    Op,
    Phase,
    Program,
    TensorSpec,
)


def alone(program: Program, module: str, sending: str = "") -> Program:
    """The Program of one module that holds one parameter. sending: another module, whose collectives count
    too: a head that is the same matrix sends what its cut makes it send. Raises KeyError where there is
    none."""
    holding = next((each for each in program.holdings if each.module == module), None)
    if holding is None:
        raise KeyError(module)
    resident = (
        (MemoryKind.PARAMETER, holding.parameter_bytes),
        (MemoryKind.OPTIMIZER, holding.optimizer_bytes),
    )
    return replace(
        program,
        blocks=(Block(tuple(_items(program, module, sending, holding))),),
        holdings=(holding,),
        resident=resident,
        layers=None,
    )


def _items(program: Program, module: str, sending: str, holding: Holding) -> Iterator[Item]:
    for item in program.items():
        is_sent = isinstance(item, Collective) and item.module == sending
        if is_sent or item.module in (module, REPLICATED_PARAMETERS):
            yield item
        elif isinstance(item, Op) and item.phase in ONCE and (share := _share(program, holding, item)):
            read, written = (round(n_bytes * share) for n_bytes in (item.read_bytes, item.write_bytes))
            yield replace(item, read_bytes=read, write_bytes=written)


def _share(program: Program, holding: Holding, op: Op) -> float:
    """Of what an op after the backward takes: tensors of the gradient's shape in clipping, of the part's own
    in the optimizer. Others of that shape take as much."""
    shape = _met(holding, op)
    alike = sum(_met(each, op) == shape for each in program.holdings)
    its = sum(_bytes(spec) for spec in op.inputs if spec.shape == shape)
    return its / alike / sum(map(_bytes, op.inputs)) if its else 0.0


def _met(holding: Holding, op: Op) -> tuple[int, ...] | None:
    return holding.grad_shape if op.phase is Phase.CLIP else holding.local_shape


def _bytes(spec: TensorSpec) -> int:
    return DTYPE_BYTES.get(spec.dtype, 4) * prod(spec.shape)
