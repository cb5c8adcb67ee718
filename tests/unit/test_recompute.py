"""What runs again in the backward, and what is made again there, changes no gradient."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.models.gpt import GPTConfig
from shardwise.models.init import initial_parameter
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.loss import _weights
from shardwise.step.build import build_model
from shardwise.step.train import recompute_in

CONFIG = LlamaConfig(64, 32, 2, 4, 2, 48)


def gradients(config: LlamaConfig | GPTConfig, recompute: str = "none") -> dict[str, Tensor]:
    model = ModelSpec("tiny", config, "").build("cpu", torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                initial_parameter(
                    name, parameter.shape, seed=1, dtype=torch.float64, device=torch.device("cpu")
                )
            )
    if recompute != "none":
        recompute_in(model.layers, recompute)
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("config", [CONFIG, GPTConfig(64, 32, 2, 4, 48, 16)], ids=["llama", "gpt"])
@pytest.mark.parametrize("recompute", ["full", "selective-ops"])
def test_a_recompute_gives_the_same_gradients(recompute: str, config: LlamaConfig | GPTConfig) -> None:
    plain, again = gradients(config), gradients(config, recompute)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_fused_swiglu_gives_the_same_gradients() -> None:
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
    torch.testing.assert_close(
        (weights.log() + log_of_one.unsqueeze(1)).exp(), logits.double().exp().float(), rtol=2e-5, atol=0.0
    )


class _Matmuls(TorchDispatchMode):
    """Counts the matmuls that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def __torch_dispatch__(
        self,
        func: object,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("config", "op", "again"),
    [(CONFIG, "aten.mm.default", 3), (GPTConfig(64, 32, 2, 4, 48, 16), "aten.addmm.default", 1)],
)
def test_every_second_matmul_of_a_layer_runs_again_with_and_without_biases(
    config: LlamaConfig | GPTConfig, op: str, again: int
) -> None:
    # of qkv, wo, w1, w2 that would be wo and w2; but nobody needs the output of a layer's last matmul
    counts = []
    for recompute in ("none", "selective-ops"):
        with _Matmuls() as matmuls:
            gradients(config, recompute)
        counts.append(matmuls.count[op])
    assert counts[1] - counts[0] == again * config.n_layers


def test_only_as_many_layers_run_again_as_are_named() -> None:
    spec = ModelSpec("tiny", replace(CONFIG, n_layers=4), "")
    counts: list[int] = []
    found: list[list[Tensor]] = []
    for layers in (0, 1, 2, 4):
        model = build_model(
            spec,
            None,
            None,
            dtype=torch.float64,
            device=torch.device("cpu"),
            seed=1,
            recompute="full" if layers else "none",
            recompute_layers=layers or None,
        )
        ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
        with _Matmuls() as matmuls:
            torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        counts.append(matmuls.count["aten.mm.default"])
        found.append([each.grad for each in model.parameters() if each.grad is not None])
    none, one, two, four = counts
    assert (two - none, four - none) == (2 * (one - none), 4 * (one - none))
    assert one > none
    assert len(found[0]) == len(list(model.parameters()))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
