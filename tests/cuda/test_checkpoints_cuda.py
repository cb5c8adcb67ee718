"""Checkpoints of what is on a GPU: copied to pinned memory while training goes on, random state of the device
too."""

from pathlib import Path

import pytest
import torch
from torch import nn

from shardwise.core.training import Saved
from shardwise.train.checkpoints import Checkpoints

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(512, 512, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """One, on random numbers of the device; its loss."""
    loss: torch.Tensor = model(torch.randn(8, 512, device="cuda")).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_a_run_on_a_gpu_goes_on_bit_for_bit_from_a_save_that_was_written_beside_it(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):  # the second reuses the first one's memory
        checkpoints.save(number, model, optimizer, Saved(number, 0, "", {}, {}, 1, 1))
        losses = [step(model, optimizer) for _ in range(3)]
    checkpoints.finish()
    other, other_optimizer = trained(1)
    checkpoints.restore(checkpoints.newest(), other, other_optimizer)
    assert [step(other, other_optimizer).item() for _ in range(3)] == [loss.item() for loss in losses]
    assert all(map(torch.equal, model.parameters(), other.parameters()))
