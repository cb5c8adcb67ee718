"""What the parent tells a rank that it starts, by environment: readable before anything heavy is imported."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

# Importing torch in many ranks on a few slow cores takes a while, whatever the timeout of the work itself.
START_S = 120.0

_VARIABLE = "SHARDWISE_ASSIGNMENT"


@dataclass(frozen=True, slots=True)
class Assignment:
    """One rank's place in a run on this machine; the store is at 127.0.0.1."""

    parent_pid: int
    store_port: int
    rank: int
    world_size: int
    device_type: str
    timeout_s: float

    def environment(self) -> dict[str, str]:
        """Also what libraries look for, but no MASTER_ADDR: the process group is joined already."""
        return {
            _VARIABLE: json.dumps(asdict(self)),
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        return cls(**json.loads(environment[_VARIABLE]))
