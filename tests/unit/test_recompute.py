"""What runs again in the backward, and what is made again there, changes no gradient."""

import pytest
import torch
from torch import Tensor

from shardwise.models.init import initial_parameter
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.loss import _weights
from shardwise.step.train import recompute_layers

CONFIG = LlamaConfig(64, 32, 2, 4, 2, 48)


def gradients(config: LlamaConfig, recompute: str = "none") -> dict[str, Tensor]:
    model = ModelSpec("tiny", config, "").build("cpu", torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_parameter(name, parameter.shape, seed=1, dtype=torch.float64, device=torch.device("cpu")))
    if recompute != "none":
        recompute_layers(model.layers, recompute)
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("recompute", ["full", "selective-ops"])
def test_a_recompute_gives_the_same_gradients(recompute: str) -> None:
    plain, again = gradients(CONFIG), gradients(CONFIG, recompute)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_fused_swiglu_gives_the_same_gradients() -> None:
    from dataclasses import replace

    plain, fused = gradients(CONFIG), gradients(replace(CONFIG, fused_swiglu=True))
    for name in plain:
        torch.testing.assert_close(plain[name], fused[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_the_loss_s_weights_and_their_logarithm_are_the_exponentials(given: torch.dtype) -> None:
    logits = (torch.randn(5, 17, generator=torch.Generator().manual_seed(0)) * 4).to(given)
    before = logits.clone()
    weights, log_of_one, lse = _weights(logits, torch.float32)
    assert torch.equal(logits, before)
    torch.testing.assert_close(lse, torch.logsumexp(logits.double(), 1).float())
    torch.testing.assert_close((weights.log() + log_of_one.unsqueeze(1)).exp(), logits.double().exp().float(), rtol=2e-5, atol=0.0)
