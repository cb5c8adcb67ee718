"""Bytes that this process's own TCP sockets have sent: what gloo really puts on the wire, undisturbed by
other processes.

Linux tells it per socket: what the other side has acknowledged (struct tcp_info, tcpi_bytes_acked, 8 bytes
from offset 120, Linux 4.1 and later; include/uapi/linux/tcp.h), and what is on its way (TIOCOUTQ; tcp(7)). So
what a busy machine sends once more, on its loopback too, counts once. The rendezvous store's few bytes are
in it too.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Mapping

if sys.platform == "linux":
    from fcntl import ioctl
    from termios import TIOCOUTQ

_ACKED_OFFSET, _ACKED = 120, struct.Struct("=Q")
_ON_ITS_WAY = struct.Struct("=i")
_INFO_BYTES = 256
_DESCRIPTORS = "/proc/self/fd"
_GONE = (errno.ENOENT, errno.EBADF)


def sent_bytes() -> Mapping[str, int] | None:
    """Of each open TCP socket, by the name that the system gives it ("socket:[inode]"); None where the system
    doesn't tell, of all of them.
    """
    if sys.platform != "linux":
        return None
    try:
        return _sent_by_socket()
    except OSError:
        return None  # such as where no descriptor is left to look with


def _sent_by_socket() -> Mapping[str, int] | None:
    found: dict[str, int] = {}
    for descriptor in os.listdir(_DESCRIPTORS):
        try:
            name = os.readlink(f"{_DESCRIPTORS}/{descriptor}")
            if not name.startswith("socket:"):
                continue
            duplicate = socket.socket(fileno=os.dup(int(descriptor)))
        except OSError as error:
            if error.errno in _GONE:
                continue  # closed since it was listed
            raise
        with duplicate:
            sent = _sent(duplicate) if _is_connection(duplicate) else 0
        if sent is None:
            return None
        found[name] = sent
    return found


def _is_connection(each: socket.socket) -> bool:
    """Of TCP, and not one that listens."""
    is_tcp = each.family in (socket.AF_INET, socket.AF_INET6) and each.type == socket.SOCK_STREAM
    return is_tcp and not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def _sent(tcp: socket.socket) -> int | None:
    """None where the system doesn't tell."""
    acked = _acked(tcp)
    while acked is not None:
        (on_its_way,) = _ON_ITS_WAY.unpack(ioctl(tcp, TIOCOUTQ, bytes(_ON_ITS_WAY.size)))
        now = _acked(tcp)
        if now == acked:
            return acked + int(on_its_way)
        acked = now  # some of it arrived meanwhile
    return None


def _acked(tcp: socket.socket) -> int | None:
    info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    if len(info) < _ACKED_OFFSET + _ACKED.size:
        return None
    (acked,) = _ACKED.unpack_from(info, _ACKED_OFFSET)
    return int(acked)


def sent_since(before: Mapping[str, int] | None) -> int | None:
    """What the sockets that are open now have sent since `before`, bytes; None where the system doesn't tell.

    A socket that was closed meanwhile (a group that nobody holds any longer) counts for nothing: the system
    forgets what it sent.
    """
    now = sent_bytes()
    if now is None or before is None:
        return None
    return sum(sent - before.get(name, 0) for name, sent in now.items())
