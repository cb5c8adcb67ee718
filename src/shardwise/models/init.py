"""Random weights, the same for every plan, rank and order of filling: each parameter has its own generator,
seeded by its name.

Matrices: normal, standard deviation 0.02 (GPT-2's and Llama's published initialiser range); biases: zeros;
other vectors (norm weights): ones.
"""

import hashlib

import torch
from torch import Tensor

INIT_STD = 0.02


def initial_parameter(
    name: str, shape: torch.Size, *, seed: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The whole initial tensor of one parameter, drawn in float32 on `device` and rounded to `dtype`."""
    if len(shape) == 1 and name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype, device=device)
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
    return (
        torch.empty(shape, dtype=torch.float32, device=device)
        .normal_(0, INIT_STD, generator=generator)
        .to(dtype)
    )
