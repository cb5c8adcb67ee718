"""What routers choose: counted over ranks, each choice once; the hottest expert and rank; in compare's
report."""

from dataclasses import replace

import torch

from shardwise.core.expert_load import ExpertLoad
from shardwise.measure.expert_loads import ExpertLoads
from shardwise.models.moe import MoE, MoEConfig
from shardwise.report.compare.tables import loads_table
from tests.unit.comparison_example import example

LOAD = ExpertLoad("layers.0.experts", (6, 2, 0, 4), 4, 2, 16)


def test_the_hottest_expert_and_rank_are_told_by_the_mean() -> None:
    assert (LOAD.mean, LOAD.hottest, LOAD.hottest_ratio, LOAD.idle) == (3, 0, 2, 1)
    assert (LOAD.by_rank, LOAD.hottest_rank) == ((8, 4), 0)
    assert LOAD.rank_ratio == 8 / 6


def test_ranks_with_other_tokens_are_added_up_and_those_with_the_same_count_once() -> None:
    halves = (replace(LOAD, choices=(6, 0, 0, 0), dropped=2), replace(LOAD, choices=(0, 2, 0, 4), dropped=2))
    assert ExpertLoad.over_ranks(halves) == (LOAD,)
    assert ExpertLoad.over_ranks((LOAD, LOAD)) == (LOAD,)


def test_choices_are_counted_once_though_a_layer_is_recomputed() -> None:
    config = MoEConfig(61, 32, 2, 4, 4, 16, n_experts=4, top_k=2, capacity=0.5)
    model, meter = MoE(config), ExpertLoads(tokens=24)
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    for layer in model.layers:
        inner = layer.forward
        layer.forward = lambda *args, inner=inner: torch.utils.checkpoint.checkpoint(
            inner, *args, use_reentrant=False
        )
    with meter.watching(model):
        model(ids).sum().backward()
    loads = meter.loads()
    assert [load.module for load in loads] == [f"layers.{at}.feed_forward.experts" for at in (0, 1)]
    for load in loads:
        assert sum(load.choices) + load.dropped == load.whole == 48
        assert load.dropped > 0
        assert load.ranks == 1
    with meter.watching(model):
        pass
    model(ids)
    assert meter.loads() == loads


def test_a_report_says_which_expert_and_rank_are_hottest() -> None:
    found = example()
    first = replace(found.measurements[0], loads=(LOAD,))
    table = loads_table(replace(found, measurements=(first, *found.measurements[1:])))
    (only,) = table.rows
    assert "layers.0.experts" in str(only)
    assert "0 of 2" in str(only)
