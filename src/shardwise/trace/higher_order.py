"""Higher-order ops at the dispatcher: they take functions beside tensors, and have no schema that says what
they write.

Flex attention is one kernel where PyTorch compiles it, and is booked as one: the work of a flash kernel
(catalogue.py), which keeps no scores. Its mask is a function of positions, and what a batch's tensors make of
it a trace doesn't know: where there is one, half of all pairs are taken to be left, as a causal mask leaves.
What any other runs inside isn't seen: it keeps its tensors, and is `unknown`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from shardwise.parallel.recorder import tensors_in
from shardwise.torch_private import masks_nothing
from shardwise.trace.ops import Signature, Work

NAMESPACE = "higher_order"
FLEX = f"{NAMESPACE}::flex_attention"
FLEX_BACKWARD = f"{FLEX}_backward"
MASKED = (
    "What flex attention's mask leaves is data: half of all pairs are taken to be left, as a causal mask "
    "leaves. One that leaves less, as between documents, takes less time."
)
"""What a reader of a Program, or of what is made of it, must know."""
# where the table of blocks stands among an op's arguments; the function that masks is its last item
_MASK_AT = {FLEX: 4, FLEX_BACKWARD: 9}
_GRADIENT_AT = 5


@lru_cache(maxsize=256)
def signature_of_higher_order(func: Any) -> Signature:
    return Signature(f"{NAMESPACE}::{func.name()}", (), (), False, frozenset())


def is_masked(name: str, args: Sequence[Any]) -> bool:
    """Whether a call of flex attention takes a mask."""
    at = _MASK_AT.get(name)
    return at is not None and not masks_nothing(args[at][-1])


def higher_order_work(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> Work:
    """A backward of attention takes the output's gradient first, as the dispatcher's own have it."""
    inputs = tensors_in(args)
    if name == FLEX_BACKWARD and isinstance(args[_GRADIENT_AT], Tensor):
        gradient = args[_GRADIENT_AT]
        inputs = [gradient, *(each for each in inputs if each is not gradient)]
    return Work(inputs, outputs)
