"""What an entry function is given: its rank, its device, and how to tell what it is at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shardwise.core.errors import OptionError
from shardwise.launch.mail import Kind

if TYPE_CHECKING:
    import torch

Backend = Literal["gloo", "nccl"]


def backend_of(device_type: str) -> Backend:
    match device_type:
        case "cpu":
            return "gloo"
        case "cuda":
            return "nccl"
        case _:
            raise OptionError(f'device: "{device_type}" is not offered. Use cpu or cuda.')


@dataclass(frozen=True, slots=True)
class RankContext:
    """One rank's view. The default process group is joined and, on cuda, the device is the current one.

    under_torchrun tells torchrun's ranks from those that Shardwise started itself.
    """

    rank: int
    world_size: int
    local_rank: int
    device: "torch.device"
    backend: Backend
    under_torchrun: bool
    send: Callable[[Kind, bytes], None]

    def report(self, event: bytes) -> None:
        """Hands event to run_ranks' on_event, in order."""
        self.send(Kind.EVENT, event)

    def note(self, text: str) -> None:
        """Says what this rank is at, for an error to name; it also shows that the rank isn't stalled."""
        self.send(Kind.NOTE, text.encode())
