"""What a run writes for TensorBoard, read as TensorBoard reads it."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shardwise.core.errors import OptionError
from shardwise.core.training import StepRecord
from shardwise.verbs.train import scalars
from shardwise.verbs.train.live import Live
from shardwise.verbs.train.scalars import Scalars, check_installed


def live(step: int, loss: float) -> Live:
    return Live(StepRecord(step, 8 * step, loss, 1.0, 0.1, 0.5, 0.01, 128, 2**20, 2 * loss), 9, 0.25, 0.4)


def test_steps_that_are_done_again_after_a_checkpoint_come_once(tmp_path: Path) -> None:
    for after, steps, loss in ((0, range(1, 6), 1.0), (3, range(4, 8), 2.0)):
        written = Scalars(tmp_path, after)
        for step in steps:
            written.write(live(step, loss))
        written.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    losses = [(each.step, each.value) for each in found.Scalars("loss/train")]
    assert losses == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]
    last = {tag: found.Scalars(tag)[-1].value for tag in found.Tags()["scalars"]}
    assert last == pytest.approx(
        {
            "loss/train": 2.0,
            "loss/held_out": 4.0,
            "optimizer/gradient_norm": 1.0,
            "optimizer/learning_rate": 0.1,
            "speed/tokens_per_s": 256.0,
            "speed/step_s": 0.5,
            "speed/data_wait_s": 0.01,
            "speed/mfu": 0.4,
            "speed/step_over_predicted": 2.0,
            "memory/held_bytes": 2**20,
        }
    )


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalars, "find_spec", lambda _: None)
    with pytest.raises(OptionError) as error:
        check_installed()
    assert str(error.value) == (
        "--tensorboard needs the tensorboard package. Install it: pip install 'shardwise[tensorboard]'"
    )
