"""The store between ranks and the process that started them: in its memory, on this machine only."""

import socket
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_LOOPBACK = "127.0.0.1"


def host() -> tuple["Store", int]:
    """A new store and its port. Its socket listens already, so no other run can take the port."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listening = socket.create_server((_LOOPBACK, 0))
    port = listening.getsockname()[1]
    return TCPStore(
        _LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    ), port


def connect(port: int, *, timeout_s: float) -> "Store":
    """A connection of its own to the store at port: what waits on one holds up nothing on another."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(_LOOPBACK, port, is_master=False, timeout=timedelta(seconds=timeout_s))
