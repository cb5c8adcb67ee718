"""What the ranks of test_one_proof.py run: compare's program, several times in one launch, and with a fault
planted in it."""

import msgspec

from shardwise.launch import RankContext
from shardwise.parallel import collectives
from shardwise.verbs import compare_ranks
from shardwise.verify import examine
from tests.distributed.style_faults import _backward, _summed_again


class Asked(msgspec.Struct, frozen=True):
    """job: as compare packs it. summed_twice: backwards of all-reduces sum again, so gradients of sharded
    weights are twice the unsharded ones."""

    job: bytes
    summed_twice: bool = False


class Everything(msgspec.Struct, frozen=True):
    """What one launch is asked. verify: as verify packs it, or nothing; its answers are events."""

    compare: tuple[Asked, ...]
    verify: bytes = b""


def each(context: RankContext, payload: bytes) -> bytes:
    """What compare's ranks give for each that is asked, in order; verify's answers are reported."""
    answers = []
    everything = msgspec.msgpack.decode(payload, type=Everything)
    if everything.verify:
        examine.run(context, everything.verify)
    for asked in everything.compare:
        if asked.summed_twice:
            with _backward(collectives._AllReduce, _summed_again)():
                answers.append(compare_ranks.run(context, asked.job))
        else:
            answers.append(compare_ranks.run(context, asked.job))
    return msgspec.msgpack.encode(answers)
