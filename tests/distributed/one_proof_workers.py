"""What the ranks of test_one_proof.py run: compare's program, with a fault planted in it."""

from shardwise.launch import RankContext
from shardwise.parallel import collectives
from shardwise.verbs import compare_ranks
from tests.distributed.style_faults import _backward, _summed_again


def summed_twice(context: RankContext, payload: bytes) -> bytes:
    """Backwards of all-reduces sum again: gradients of sharded weights are twice the unsharded ones."""
    with _backward(collectives._AllReduce, _summed_again)():
        return compare_ranks.run(context, payload)
