"""The page of a run of training, and what it is held against before it begins."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from shardwise.core.case import Case
from shardwise.core.pace import RECENT, Pace
from shardwise.core.training import Ended, StepRecord, Training, TrainOptions
from shardwise.files.document import write_document
from shardwise.models.source import find_model
from shardwise.parallel.builtin import builtin_plan
from shardwise.predict.machines import machine_text
from shardwise.report.train.html import train_html
from shardwise.report.train.tables import told_lines
from shardwise.text.stream import TokenStream
from shardwise.verbs.predict import PredictOptions, predict
from shardwise.verbs.train.checked import Run

RUN = Training(
    model="a model",
    parameters=1,
    mesh="tp=2",
    plan="rowwise",
    device="cpu",
    steps=9,
    first_step=0,
    ended=Ended.DONE,
    last=None,
    validated=(),
    curve=(),
    step_s=None,
    tokens_per_s=None,
    predicted_s=None,
    machine=None,
    restarts=(),
    told=(),
    checkpoints="",
    seconds=1.0,
)


def test_lines_that_differ_in_numbers_alone_are_counted_and_the_last_few_shown() -> None:
    seconds = ([0.1] * 40 + [0.2] * RECENT * 2) * 60
    pace, told = Pace(0.3), ["The plan was not proved."]
    for step, each in enumerate(seconds):
        record = StepRecord(step, 0, 1.0, 1.0, 0.1, each, 0.0, 1)
        told += [line] if (line := pace.take(record)) is not None else []
    assert len(told) > 100
    shown = [line.text for line in told_lines(told)]
    assert shown[0] == told[0]
    assert len(shown) == 9
    assert shown[-1] == told[-1]
    assert "The next was told 60 times; here are the last 3, and train.json has all." in shown
    run = replace(RUN, told=tuple(told))
    assert train_html(run).count("<li>") == 9
    assert json.loads(write_document(run))["told"] == told


def test_a_run_is_foreseen_as_its_ranks_fill_their_parameters(tmp_path: Path) -> None:
    model = "llama3-debug?n_layers=2,hidden=64,n_heads=4,n_kv_heads=2,ffn_hidden=64,vocab_size=65536"
    case = Case.of(model=model, mesh="fsdp=4", batch=4, seq=16, plans=("rowwise",))
    takes = {}
    for filled in ("shards", "whole"):
        (found,) = predict(case, PredictOptions(filled=filled)).answer.predictions
        takes[filled] = found.memory.device_bytes
    assert takes["shards"] != takes["whole"]
    machine = tmp_path / "between.toml"
    between = f"capacity = {{ value = {sum(takes.values()) / 2e9}, "
    machine.write_text(machine_text("h100-sxm-80gb").replace("capacity = { value = 80, ", between))
    case = replace(case, machine=str(machine))
    tokens = TokenStream.of(np.zeros(9, np.int32), vocab_size=2, source="none", tokenizer="none")
    plan = builtin_plan("rowwise")
    run = Run(case, TrainOptions(), find_model(model), plan, "rowwise", 1, "cpu", tokens, "")
    forecast = run.predicted(lambda *_: None).forecast
    assert forecast is not None
    assert forecast.fits is (takes["whole"] < takes["shards"])
