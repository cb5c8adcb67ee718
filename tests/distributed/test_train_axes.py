"""Training on four ranks is training on one process, whatever axes the ranks are arranged in: the losses, the
gradients' norms and the losses on held-out text of whole runs."""

from functools import cache
from tempfile import TemporaryDirectory

import msgspec
import pytest
import torch
import torch.nn.functional as F

from shardwise.core.errors import ShardwiseError
from shardwise.core.training import StepRecord
from shardwise.launch import run_ranks
from shardwise.models.source import find_model
from shardwise.step.balance import Balances
from shardwise.step.build import build_model
from shardwise.text.batches import Batch
from tests.distributed.train_axes_workers import (
    BATCH,
    HELD_OUT,
    OPTIONS,
    RANKS,
    STEPS,
    VOCAB,
    AxesCase,
    cases,
    samples,
    settings_of,
)
from tests.matrix import thinned

CLOSE = 1e-10
CASES = cases()
Line = tuple[float, float, float | None]


@cache
def on_ranks(model: str, *, telling: bool) -> dict[str, list[StepRecord]] | str:
    """What rank 0 reported of each case; or why the launch failed. The telling cases share one launch."""
    names = [each.name for each in CASES if each.is_telling is telling and (telling or each.model == model)]
    with TemporaryDirectory() as folder:
        try:
            results = run_ranks(
                "tests.distributed.train_axes_workers:run",
                msgspec.json.encode((folder, names)),
                world_size=RANKS,
                device_type="cpu",
                timeout_s=120,
            )
        except ShardwiseError as error:
            return str(error)
    return msgspec.json.decode(results[0], type=dict[str, list[StepRecord]])


@cache
def on_one_process(model: str) -> list[Line]:
    """The same run written out: whole batches, PyTorch's own loss, clipping and AdamW."""
    settings = settings_of()
    module = build_model(
        find_model(model), None, None, dtype=torch.float64, device=torch.device("cpu"), seed=settings.seed
    )
    balances = Balances(module, None, None)
    matrices = [each for each in module.parameters() if each.dim() > 1]
    others = [each for each in module.parameters() if each.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIONS.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(OPTIONS.beta1, OPTIONS.beta2),
        eps=OPTIONS.eps,
    )
    text, lines = samples(), []

    def summed(batch: Batch) -> torch.Tensor:
        return F.cross_entropy(
            module(batch.ids_BS).reshape(-1, VOCAB), batch.labels_BS.reshape(-1), reduction="sum"
        )

    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * OPTIONS.share_at(step)
        batch = text.at(step * BATCH, BATCH)
        optimizer.zero_grad()
        balances.begin(1)
        loss = summed(batch) / (batch.labels_BS >= 0).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), settings.max_norm)
        optimizer.step()
        held_out = None
        if (step + 1) % OPTIONS.validate_every == 0:
            everything = text.held_out_at(0, HELD_OUT)
            module.eval()
            with torch.no_grad():
                held_out = float(summed(everything) / (everything.labels_BS >= 0).sum())
            module.train()
        lines.append((float(balances.add_to(loss.detach())), float(norm), held_out))
    return lines


@pytest.mark.parametrize("case", thinned(CASES, lambda case: case.is_telling), ids=lambda case: case.name)
def test_a_run_on_any_axes_is_one_process_s(case: AxesCase) -> None:
    found = on_ranks(case.model if not case.is_telling else "", telling=case.is_telling)
    if isinstance(found, str):
        pytest.fail(f"the launch of {RANKS} ranks failed: {found}")
    lines = found[case.name]
    assert [each.step for each in lines] == list(range(1, STEPS + 1))
    for step, (line, expected) in enumerate(zip(lines, on_one_process(case.built), strict=True), 1):
        loss, norm, held_out = expected
        assert line.loss == pytest.approx(loss, rel=CLOSE), step
        assert line.gradient_norm == pytest.approx(norm, rel=CLOSE), step
        assert line.validation_loss == (held_out and pytest.approx(held_out, rel=CLOSE)), step


def test_the_runs_learn_clip_and_begin_a_second_epoch() -> None:
    """Else they would show little."""
    lines = on_one_process(CASES[0].built)
    assert lines[-1][0] < lines[0][0] - 0.3
    assert all(norm > settings_of().max_norm for _, norm, _ in lines[:5])
    assert samples().windows < STEPS * BATCH


def test_no_axis_is_left_out() -> None:
    assert len({case.mesh for case in CASES}) == 21
