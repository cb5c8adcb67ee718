"""What a process's own sockets have sent, to the byte."""

import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shardwise.measure.sockets import sent_bytes, sent_since

pytestmark = pytest.mark.skipif(sent_bytes() is None, reason="this system doesn't tell what a socket sent")


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        with ours, theirs:
            yield ours, theirs


def read(theirs: socket.socket, count: int) -> None:
    while count:
        count -= len(theirs.recv(min(count, 1 << 16)))


@pytest.mark.parametrize("count", [1, 100_000, 5_000_000])
def test_all_that_was_sent_counts_and_counts_once(count: int) -> None:
    with connection() as (ours, theirs):
        before = sent_bytes()
        reading = threading.Thread(target=read, args=(theirs, count))
        reading.start()
        ours.sendall(bytes(count))
        reading.join()
        assert sent_since(before) == count


def test_connecting_sends_nothing() -> None:
    before = sent_bytes()
    with connection():
        assert sent_since(before) == 0


def test_what_nobody_has_read_yet_counts() -> None:
    with connection() as (ours, _):
        before = sent_bytes()
        ours.sendall(bytes(1000))
        assert sent_since(before) == 1000


def test_where_no_descriptor_is_left_it_is_unknown_and_no_fewer_bytes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connection() as (ours, _):
        before = sent_bytes()
        ours.sendall(bytes(1000))
        lowest = os.dup(0)
        os.close(lowest)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
            assert sent_since(before) is None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
