"""Several documents packed into one sequence: each token attends to those before it in its own document."""

import torch
from torch import Tensor


def causal_within(documents_BS: Tensor) -> Tensor:
    """Which keys a query may see, [B, 1, S, S]: those of its document that don't come after it."""
    seq = documents_BS.shape[1]
    places_S = torch.arange(seq, device=documents_BS.device)
    is_before_SS = places_S[:, None] >= places_S
    is_own_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    return (is_own_BSS & is_before_SS)[:, None]
