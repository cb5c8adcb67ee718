"""What torch's own clipping can't take: gradients of which some are plain tensors and some DTensors."""

from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.core.finding import Finding, FindingKind
from shardwise.parallel.apply import applied_to


def mixed_for_clipping(model: nn.Module) -> Finding | None:
    """Of a model that was sharded; None where torch.nn.utils.clip_grad_norm_ takes all of it, or the model
    brings a clipping of its own."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    plain = [name for name, each in trained.items() if not isinstance(each, DTensor)]
    if len(plain) in (0, len(trained)) or applied_to(model).clip is not None:
        return None
    return Finding(
        FindingKind.CLIPPING_RAISES,
        plain[0],
        f"{len(plain)} of {len(trained)} parameters are plain tensors, and the others DTensors: "
        "torch.nn.utils.clip_grad_norm_ raises on a mixture of both",
        advice="Clip each kind by itself and join the norms, in which what all ranks hold alike counts once; "
        "or give the plain ones a style too, so that they are DTensors (Replicate).",
    )
