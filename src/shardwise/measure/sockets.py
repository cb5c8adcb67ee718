"""Bytes that this process's own TCP sockets have sent: what gloo really puts on the wire, undisturbed by
other processes.

Linux tells it per socket: what the other side has acknowledged (struct tcp_info, tcpi_bytes_acked, 8 bytes
from offset 120; include/uapi/linux/tcp.h), and what is on its way (TIOCOUTQ; tcp(7)). So what a busy machine
sends once more, on its loopback too, counts once. tcpi_bytes_sent and tcpi_bytes_retrans (from offset 200,
Linux 4.19 and later) tell whether a SYN is among it. The rendezvous store's few bytes are in it too.
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
_SENT_OFFSET, _SENT_AND_AGAIN = 200, struct.Struct("=QQ")
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
    books = _books(tcp)
    while books is not None:
        (on_its_way,) = _ON_ITS_WAY.unpack(ioctl(tcp, TIOCOUTQ, bytes(_ON_ITS_WAY.size)))
        now = _books(tcp)
        if now == books:
            acked, sent = books
            found = acked + int(on_its_way)
            return found - (found == sent + 1)  # who connects is acknowledged its SYN as a byte
        books = now  # some of it arrived meanwhile
    return None


def _books(tcp: socket.socket) -> tuple[int, int] | None:
    """(acknowledged, sent but for what was sent once more)."""
    info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    if len(info) < _SENT_OFFSET + _SENT_AND_AGAIN.size:
        return None
    (acked,), (sent, again) = (
        _ACKED.unpack_from(info, _ACKED_OFFSET),
        _SENT_AND_AGAIN.unpack_from(info, _SENT_OFFSET),
    )
    return acked, sent - again


def sent_since(before: Mapping[str, int] | None) -> int | None:
    """What the sockets that are open now have sent since `before`, bytes; None where the system doesn't tell.

    A socket that was closed meanwhile (a group that nobody holds any longer) counts for nothing: the system
    forgets what it sent.
    """
    now = sent_bytes()
    if now is None or before is None:
        return None
    return sum(sent - before.get(name, 0) for name, sent in now.items())
