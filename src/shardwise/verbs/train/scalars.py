"""The steps of a run for TensorBoard, each once: what is done again after a checkpoint hides what was written
of those steps before."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.core.errors import OptionError

if TYPE_CHECKING:
    from shardwise.verbs.train.live import Live

TENSORBOARD = "tensorboard"


def check_installed() -> None:
    """Raises OptionError without the package."""
    if find_spec("tensorboard") is None:
        raise OptionError(
            "--tensorboard needs the tensorboard package. Install it: pip install 'shardwise[tensorboard]'"
        )


class Scalars:
    """folder: of the run's event files. after: the step that the run goes on from; 0 from the start."""

    def __init__(self, folder: Path, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1, flush_secs=10)

    def write(self, live: "Live") -> None:
        """All that is known of a step."""
        for tag, value in scalars_of(live).items():
            self._writer.add_scalar(tag, value, live.record.step, walltime=live.record.ended_at)

    def close(self) -> None:
        self._writer.close()


def scalars_of(live: "Live") -> dict[str, float]:
    """By tag; what isn't known is left out."""
    record = live.record
    known = {
        "loss/train": record.loss,
        "loss/held_out": record.validation_loss,
        "optimizer/gradient_norm": record.gradient_norm,
        "optimizer/learning_rate": record.learning_rate,
        "speed/tokens_per_s": record.tokens / record.seconds,
        "speed/step_s": record.seconds,
        "speed/data_wait_s": record.data_s,
        "speed/mfu": live.mfu,
        "speed/step_over_predicted": record.seconds / live.predicted_s if live.predicted_s else None,
        "memory/held_bytes": record.held_bytes,
    }
    return {tag: value for tag, value in known.items() if value is not None}
