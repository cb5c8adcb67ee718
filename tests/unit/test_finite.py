"""Where a step that isn't finite is said to go wrong, over a pipeline's parts."""

import pytest
import torch
from torch import Tensor

from shardwise.core.errors import NotFiniteError
from shardwise.core.pipeline import Pipeline, Schedule
from shardwise.models.source import find_model
from shardwise.parallel.ends import ends_of
from shardwise.parallel.stages import cut_to_stage
from shardwise.step.build import build_model
from shardwise.step.train import StepResult
from shardwise.train.finite import check, guarded, not_finite

MODEL = "llama3-debug?n_layers=4,hidden=16,n_heads=2,n_kv_heads=2,ffn_hidden=16,vocab_size=32"


@pytest.mark.parametrize("chunks", [1, 2])
def test_in_the_backward_the_last_part_that_is_not_finite_is_where_it_began(chunks: int) -> None:
    schedule = Schedule.INTERLEAVED if chunks > 1 else Schedule.ONE_F_ONE_B
    source, pipeline = find_model(MODEL), Pipeline(2, chunks, schedule)
    ends, ranks = ends_of(source), []
    for rank in range(2):
        ranks.append(source.build(dtype=torch.float32).to_empty(device="cpu"))
        cut_to_stage(ranks[-1], ends, pipeline, rank, tp=1, dtype=torch.float32)
    names = [name for name, _ in source.build(dtype=torch.float32).named_parameters()]
    for at, where in enumerate(names):
        spread = names[: at + 1]  # the backward carries it to all that come before
        for model in ranks:
            for name, parameter in model.named_parameters():
                parameter.grad = torch.full_like(parameter, torch.nan if name in spread else 0.0)
        first = min(place for model in ranks for place in not_finite(model))
        assert first[2] == where.rpartition(".")[0]


def test_in_the_forward_an_earlier_part_is_where_it_began_though_a_later_one_ran_before() -> None:
    source = find_model(MODEL)
    model = build_model(source, None, None, dtype=torch.float32, device=torch.device("cpu"), seed=1)
    pipeline = Pipeline(2, 2, Schedule.INTERLEAVED)
    stage = cut_to_stage(model, ends_of(source), pipeline, 0, tp=1, dtype=torch.float32)
    bad = 7
    with torch.no_grad():
        model.get_parameter("tok_embeddings.weight")[bad] = torch.nan
        model.get_parameter("layers.2.ffn_norm.weight").fill_(torch.inf)

    def step() -> StepResult:
        result = StepResult(torch.tensor(torch.nan), torch.tensor(1.0))
        check(result)
        return result

    def again() -> Tensor:
        for part, token in ((0, 1), (2, 1), (0, bad)):
            ids = torch.full((1, 4), token)
            loss = stage.run(model, part, ids, torch.ones(1, 4, 16) if part else None)
        return loss

    with pytest.raises(NotFiniteError, match="In the forward tok_embeddings on rank 0 is the first"):
        guarded(step, again, model, 1)
