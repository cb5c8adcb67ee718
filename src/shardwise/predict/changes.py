"""What becomes of a traced memory change in a setup: whether it is made at all, and how large it is.

shards     states, and what FSDP makes of them, are cut over all of its ranks, not the traced ones
compiled   what a compiler makes again in the backward isn't kept
loss       where a compiler fuses it, without its storages in float32: logits, and their gradient
"""

from shardwise.core.prediction import Precision, Setup
from shardwise.core.program import LOSS_MODULE, ONCE, MemoryChange, MemoryKind, Op, Phase, Program
from shardwise.predict.groups import further_shards, optimizer_shards
from shardwise.predict.stage_memory import STATES

MADE_AGAIN = ("aten::silu",)
"""What a compiler makes again in the backward instead of keeping it: of the ops between a SwiGLU's matmuls.
Source: the compiled step in benchmarks/data/h100-steps.json, whose active memory is met so."""

Place = tuple[int, int]
"""(block, item) of a Program."""


def scales_of(program: Program, setup: Setup) -> dict[MemoryKind, float]:
    """What becomes of a traced byte of each kind in this setup; of those that aren't named, itself."""
    scales = dict.fromkeys(STATES, 1 / further_shards(program, setup))
    scales[MemoryKind.OPTIMIZER] /= optimizer_shards(program, setup)
    return scales


def counts(change: MemoryChange, setup: Setup) -> bool:
    if setup.compiled and change.maker in MADE_AGAIN:
        return False
    return setup.precision is Precision.TRACED or change.phase not in ONCE


def fused_loss(program: Program) -> dict[Place, int]:
    """(block, item) -> bytes of the loss's storages where a compiler fuses it: the logits are kept as they
    are for the backward, which makes their gradient at once. Without the copies in float32, the probabilities
    and what lies between them, which no kernel writes out then.
    """
    logits_bytes = 0
    large: list[tuple[Place, MemoryChange]] = []
    for place, block in enumerate(program.blocks):
        for at, item in enumerate(block.items):
            match item:
                case Op(phase=Phase.FORWARD):
                    logits_bytes = item.write_bytes
                case MemoryChange() if item.module == LOSS_MODULE and abs(item.n_bytes) >= logits_bytes:
                    large.append(((place, at), item))
                case _:
                    pass
    gradients = [change for _, change in large if change.phase is Phase.BACKWARD and change.n_bytes > 0]
    last = gradients[-1] if gradients else None
    # where the gradient takes the place of what was kept (the native loss in float32), both are counted there
    kept = logits_bytes if last is not None else 2 * logits_bytes
    fused = {}
    for where, change in large:
        gradient = logits_bytes if _is_of(change, last) else 0
        n_bytes = kept if change.kind is MemoryKind.ACTIVATION else gradient
        fused[where] = n_bytes if change.n_bytes > 0 else -n_bytes
    return fused


def _is_of(change: MemoryChange, made: MemoryChange | None) -> bool:
    """Whether this is `made`, or its end."""
    return made is not None and (abs(change.n_bytes), change.phase, change.maker) == (
        made.n_bytes,
        made.phase,
        made.maker,
    )
