"""Bytes that this process's own TCP sockets have sent: what gloo really puts on the wire, undisturbed by
other processes.

Linux tells it per socket: struct tcp_info, fields tcpi_bytes_sent and tcpi_bytes_retrans (8 bytes each from
offset 200, Linux 4.19 and later; include/uapi/linux/tcp.h). What was sent once more, which a busy machine
does on its loopback too, isn't counted. The rendezvous store's few bytes are in it too.
"""

import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

_BYTES_SENT_OFFSET = 200
_SENT_AND_AGAIN = struct.Struct("=QQ")
_INFO_BYTES = 256


def sent_bytes() -> Mapping[str, int] | None:
    """Of each open TCP socket, by the name that the system gives it ("socket:[inode]"); None where the system
    doesn't tell.
    """
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir() or not hasattr(socket, "TCP_INFO"):
        return None
    sent_by_socket: dict[str, int] = {}
    for entry in list(descriptors.iterdir()):
        try:
            name = os.readlink(entry)
            if not name.startswith("socket:"):
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
            sent_by_socket[name] = sent - again
    return sent_by_socket


def sent_since(before: Mapping[str, int] | None) -> int | None:
    """What the sockets that are open now have sent since `before`, bytes; None where the system doesn't tell.

    A socket that was closed meanwhile (a group that nobody holds any longer) counts for nothing: the system
    forgets what it sent.
    """
    now = sent_bytes()
    if now is None or before is None:
        return None
    return sum(sent - before.get(name, 0) for name, sent in now.items())
