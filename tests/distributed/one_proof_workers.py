"""What the ranks of test_one_proof.py run: compare's program, several times in one launch, and with a fault
planted in it."""

import msgspec

from shardwise.launch import RankContext
from shardwise.parallel import collectives
from shardwise.verbs import compare_ranks
from tests.distributed.style_faults import _backward, _summed_again


class Asked(msgspec.Struct, frozen=True):
    """job: as compare packs it. summed_twice: backwards of all-reduces sum again, so gradients of sharded
    weights are twice the unsharded ones."""

    job: bytes
    summed_twice: bool = False


def each(context: RankContext, payload: bytes) -> bytes:
    """What compare's ranks give for each that is asked, in order."""
    answers = []
    for asked in msgspec.msgpack.decode(payload, type=tuple[Asked, ...]):
        if asked.summed_twice:
            with _backward(collectives._AllReduce, _summed_again)():
                answers.append(compare_ranks.run(context, asked.job))
        else:
            answers.append(compare_ranks.run(context, asked.job))
    return msgspec.msgpack.encode(answers)
