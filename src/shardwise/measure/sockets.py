"""Bytes that this process's own TCP sockets have sent: what gloo really puts on the wire, undisturbed by
other processes.

Linux tells it per socket: struct tcp_info, fields tcpi_bytes_sent and tcpi_bytes_retrans (8 bytes each from
offset 200, Linux 4.19 and later; include/uapi/linux/tcp.h). What was sent once more, which a busy machine
does on its loopback too, isn't counted. The rendezvous store's few bytes are in it too.
"""

import os
import socket
import struct
from pathlib import Path

_BYTES_SENT_OFFSET = 200
_SENT_AND_AGAIN = struct.Struct("=QQ")
_INFO_BYTES = 256


def sent_bytes() -> int | None:
    """Sum over all open TCP sockets; None where the system doesn't tell."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir() or not hasattr(socket, "TCP_INFO"):
        return None
    total = 0
    for entry in list(descriptors.iterdir()):
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            duplicate = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:
            continue  # closed since it was listed
        with duplicate:
            try:
                info = duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
            except OSError:
                continue  # no TCP socket
            if len(info) < _BYTES_SENT_OFFSET + _SENT_AND_AGAIN.size:
                return None
            sent, again = _SENT_AND_AGAIN.unpack_from(info, _BYTES_SENT_OFFSET)
            total += sent - again
    return total
