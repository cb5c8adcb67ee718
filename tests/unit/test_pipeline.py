"""What a pipeline's parts hold, and the order in which stages run them: torch's own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import InputError, ModelError, OptionError
from shardwise.core.mesh import Mesh
from shardwise.core.pipeline import (
    Pipeline,
    Schedule,
    Turn,
    even_counts,
    most_in_flight,
    recomputed_of_fewer,
    recomputed_spans,
)
from shardwise.models.source import find_model
from shardwise.parallel.ends import ends_of
from shardwise.trace.fakes import fake_world

SIZES = [(2, 1, 2), (2, 1, 5), (4, 1, 4), (4, 1, 9), (2, 2, 4), (2, 3, 6), (4, 2, 8), (3, 2, 2), (4, 2, 10)]
CLASSES: dict[Schedule, Any] = {
    Schedule.GPIPE: ScheduleGPipe,
    Schedule.ONE_F_ONE_B: Schedule1F1B,
    Schedule.INTERLEAVED: ScheduleInterleaved1F1B,
}


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), SIZES)
def test_turns_come_in_the_order_of_torch_s_schedules(stages: int, chunks: int, micro_batches: int) -> None:
    kinds = [Schedule.INTERLEAVED] if chunks > 1 else [Schedule.GPIPE, Schedule.ONE_F_ONE_B]
    for kind in kinds:
        pipeline = Pipeline(stages, chunks, kind)
        pipeline.check(micro_batches)
        for rank, order in torch_orders(pipeline, micro_batches).items():
            turns = pipeline.turns(rank, micro_batches)
            if kind is Schedule.ONE_F_ONE_B and rank == stages - 1:
                # its list numbers the last stage's forwards from 1 on; its loop runs them from 0
                assert [turn.backward for turn in turns] == [turn.backward for turn in order]
            else:
                assert turns == order


def torch_orders(pipeline: Pipeline, micro_batches: int) -> dict[int, tuple[Turn, ...]]:
    """As its schedules list them."""
    with fake_world(Mesh.parse(f"pp={pipeline.stages}"), rank=0, device="cpu"):
        device = torch.device("cpu")
        parts = [PipelineStage(nn.Identity(), part, pipeline.parts, device) for part in pipeline.parts_of(0)]
        several = pipeline.schedule is Schedule.INTERLEAVED
        schedule = CLASSES[pipeline.schedule](parts if several else parts[0], micro_batches, loss_fn=max)
        orders: dict[int, list[Any]] = schedule.pipeline_order
    return {
        rank: tuple(
            Turn(action.stage_index, action.microbatch_index, "B" in str(action.computation_type))
            for action in actions
            if action is not None and action.microbatch_index is not None
        )
        for rank, actions in orders.items()
    }


def test_what_is_left_over_goes_to_the_middle() -> None:
    assert even_counts(80, 4) == (20, 20, 20, 20)
    assert even_counts(30, 4) == (7, 8, 8, 7)
    assert [span.first for span in Pipeline(4).spans(30)] == [0, 7, 15, 23]


def test_the_first_layers_of_each_part_run_again_the_same_share_rounded_up() -> None:
    spans = Pipeline(2, layers=(1, 4, 3, 4), chunks=2).spans(12)
    assert recomputed_spans(spans, None) == spans
    assert [(each.first, each.count) for each in recomputed_spans(spans, 5)] == [
        (0, 1),
        (1, 2),
        (5, 2),
        (8, 2),
    ]
    assert [(each.first, each.count) for each in recomputed_spans(Pipeline(1).spans(12), 5)] == [(0, 5)]


@pytest.mark.parametrize(
    ("recomputed", "n_layers", "fewer", "expected"),
    [(None, 80, 4, None), (20, 80, 80, 20), (20, 80, 4, 1), (1, 80, 4, 1), (79, 80, 4, 3), (80, 80, 4, 4)],
)
def test_a_small_model_has_both_kinds_of_layers_where_the_large_one_has(
    recomputed: int | None, n_layers: int, fewer: int, expected: int | None
) -> None:
    assert recomputed_of_fewer(recomputed, n_layers, fewer) == expected


def test_a_stage_holds_every_so_many_parts() -> None:
    assert Pipeline(4, 2, Schedule.INTERLEAVED).parts_of(1) == (1, 5)


def test_1f1b_holds_as_many_micro_batches_as_stages_are_left_and_gpipe_all() -> None:
    assert [most_in_flight(Pipeline(4).turns(stage, 9)) for stage in range(4)] == [4, 3, 2, 1]
    assert most_in_flight(Pipeline(4, 1, Schedule.GPIPE).turns(3, 9)) == 9


@pytest.mark.parametrize(
    ("pipeline", "layers", "message"),
    [
        (Pipeline(4), 3, "can't be cut into 4 stages. Use at most pp=3."),
        (Pipeline(4, 2, Schedule.INTERLEAVED), 6, "4 stages of 2 chunks. Use at most pp=3."),
        (
            Pipeline(2, layers=(3, 3)),
            5,
            "--stages 3,3: 2 stages of 5 layers are 2 counts of at least 1 that add up to 5. Use even, or "
            "such as 3,2.",
        ),
    ],
)
def test_layers_that_cannot_be_dealt_are_refused(pipeline: Pipeline, layers: int, message: str) -> None:
    with pytest.raises(OptionError) as refused:
        pipeline.spans(layers)
    assert str(refused.value).endswith(message)


@pytest.mark.parametrize(
    ("pipeline", "micro_batches", "message"),
    [
        (Pipeline(4), 2, "Use --accumulation 4 or more, or --schedule gpipe."),
        (Pipeline(2, 2, Schedule.INTERLEAVED), 5, "Use --accumulation 4 or 6."),
        (
            Pipeline(1, 2, Schedule.INTERLEAVED),
            4,
            "--chunks 2: chunks of layers are of a pipeline's stages. Use a mesh with pp=2 or more.",
        ),
    ],
)
def test_micro_batches_that_a_schedule_cannot_run_are_refused(
    pipeline: Pipeline, micro_batches: int, message: str
) -> None:
    with pytest.raises(OptionError) as refused:
        pipeline.check(micro_batches)
    assert str(refused.value).endswith(message)


def test_a_pipeline_has_as_many_micro_batches_as_stages_where_nobody_says() -> None:
    assert Case.of(model="llama3-debug", mesh="pp=4", batch=8).step.accumulation == 4
    assert Case.of(model="llama3-debug", mesh="pp=4", batch=8, accumulation=8).step.accumulation == 8


@pytest.mark.parametrize(
    "values", [{"schedule": "gpipe", "chunks": 2}, {"schedule": "interleaved"}, {"stages": "3,x"}]
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"Change one of them|a count of layers for each stage"):
        StepSettings(**values)


def test_what_runs_before_and_after_the_layers_is_read_off_the_forward() -> None:
    ends = ends_of(find_model("gpt-debug"))
    assert ends.before == ("tok_embeddings", "pos_embeddings")
    assert ends.after == ("norm", "output")
    assert (ends.width, ends.gives) == (384, 0)


def test_a_model_of_few_positions_is_read_within_them() -> None:
    few, many = (ends_of(find_model(name)) for name in ("gpt-debug?max_seq=7", "gpt-debug"))
    assert replace(few, model=many.model) == many


def test_a_hugging_face_model_is_read_alike() -> None:
    ends = ends_of(find_model("hf:qwen3?num_hidden_layers=4,hidden_size=64"))
    assert (ends.before, ends.after) == (("model.embed_tokens",), ("model.norm", "lm_head"))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("tests.unit.pipeline_models:without_layers", "it has no nn.ModuleList of layers"),
        ("tests.unit.pipeline_models:shared_layer", "are one parameter, and on several stages"),
        ("tests.unit.pipeline_models:two_streams", "2 tensors that need gradients go into layers.1"),
        ("tests.unit.pipeline_models:parameter_beside_layers", "owns parameters beside the layers"),
        ("tests.unit.pipeline_models:table_in_layers", "is read between the layers"),
        ("tests.unit.pipeline_models:changed_between", "is changed before layers.1 takes it"),
    ],
)
def test_a_model_that_no_pipeline_can_run_is_refused_in_one_line(model: str, why: str) -> None:
    from shardwise.parallel.ends import check_spans

    source = find_model(model)
    with pytest.raises(ModelError) as refused:
        check_spans(source.build(dtype=torch.float32), ends_of(source), Pipeline(2).spans(4))
    assert why in str(refused.value)
    assert str(refused.value).endswith("so no pipeline can run it. Use a mesh with pp=1.")
