"""Initial weights, the same for every plan and rank: a model's own, or random ones by name.

The model's own are drawn by building it whole, once, on the host. Where nobody draws any, or the model is too
large for that on every rank, each parameter has its own generator, seeded by its name, in any order of
filling. Matrices: normal, standard deviation 0.02 (GPT-2's and Llama's published initialiser range); biases:
zeros; other vectors (norm weights): ones.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from shardwise.models.model_source import ModelSource

INIT_STD = 0.02
MOST_OWN = 500_000_000
"""Parameters up to which every rank holds the whole model in host memory while it is built, 2 GB in
float32."""


def draws_its_own(source: ModelSource, parameters: int) -> bool:
    """Whether a model of so many parameters begins with the weights of its own initialisation."""
    return source.initialises and parameters <= MOST_OWN


def own_weights(
    source: ModelSource, *, seed: int, dtype: torch.dtype, device: torch.device
) -> Callable[[str, torch.Size], Tensor]:
    """(name, shape) -> the whole initial tensor of a parameter, a copy on `device`, as the model's own code
    draws it. Holds the whole model on the host as long as it is held itself. Raises ModelError."""
    torch.manual_seed(seed)
    model = source.build(dtype=dtype, device="cpu")
    values = dict(model.named_parameters(remove_duplicate=False))

    def whole(name: str, shape: torch.Size) -> Tensor:
        value = values[name].detach()
        assert value.shape == shape, (name, value.shape, shape)
        return value.to(device, copy=True)

    return whole


def weights_by_name(
    *, seed: int, dtype: torch.dtype, device: torch.device
) -> Callable[[str, torch.Size], Tensor]:
    """(name, shape) -> initial_parameter() of it."""
    return lambda name, shape: initial_parameter(name, shape, seed=seed, dtype=dtype, device=device)


def initial_parameter(
    name: str, shape: torch.Size, *, seed: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The whole initial tensor of one parameter, drawn in float32 on `device` and rounded to `dtype`."""
    if len(shape) == 1 and name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype, device=device)
    if len(shape) <= 1:
        return torch.ones(shape, dtype=dtype, device=device)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
    return (
        torch.empty(shape, dtype=torch.float32, device=device)
        .normal_(0, INIT_STD, generator=generator)
        .to(dtype)
    )
