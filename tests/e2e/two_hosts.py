"""Two hosts with a link between them, made of network namespaces: torchrun on each, and the link that goes
down and comes up. Needs root and `ip`."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

LINK = "link0"
# after which torchrun gives up a store that doesn't answer; its own is 60 s
SILENT_S = 30


def why_not() -> str:
    """Why hosts can't be made here; nothing where they can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "needs `ip` (iproute2) and `unshare` (util-linux)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    name = f"probe{os.getpid()}"
    tried = _ip("netns", "add", name, check=False)
    if tried.returncode != 0:
        return f"no network namespace can be made: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


@dataclass(slots=True)
class Host:
    """name: of the network namespace, and what its processes take for the host's name. log: what torchrun and
    its ranks have written, of every start."""

    name: str
    address: str
    log: Path
    torchrun: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def start(self, args: Sequence[str], store: str, per_host: int) -> None:
        """torchrun over two hosts, of which the one at `store` holds the store."""
        enter = ("ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c")
        named = f'hostname {self.name} && exec "$@"'
        run = (
            *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(per_host)),
            *("--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "one"),
            *("--rdzv-endpoint", f"{store}:29400"),
            *("--rdzv-conf", f"is_host={store == self.address},read_timeout={SILENT_S}"),
            *("--local-addr", self.address, "-m", "shardwise"),
        )
        with self.log.open("ab") as log:
            self.torchrun = subprocess.Popen(
                [*enter, named, "sh", sys.executable, *run, *args],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"GLOO_SOCKET_IFNAME": LINK, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self.starts += 1

    @property
    def returncode(self) -> int | None:
        """torchrun's, once it has ended."""
        assert self.torchrun is not None
        return self.torchrun.poll()

    def ranks(self) -> list[psutil.Process]:
        """torchrun's ranks that are alive."""
        assert self.torchrun is not None
        try:
            found = psutil.Process(self.torchrun.pid).children()
            return [each for each in found if each.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return []

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """All that runs on it."""
        for pid in _ip("netns", "pids", self.name, check=False).stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.torchrun is not None:
            self.torchrun.kill()
            self.torchrun.wait()

    def end(self) -> None:
        """All that runs on it, and the host itself."""
        self.kill()
        _ip("netns", "del", self.name, check=False)


@dataclass(slots=True)
class TwoHosts:
    """The first one holds torchrun's store."""

    hosts: list[Host] = field(default_factory=list)

    def set_link(self, state: str) -> None:
        """up or down."""
        _ip("-n", self.hosts[0].name, "link", "set", LINK, state)


@contextmanager
def two_hosts(logs: Path) -> Iterator[TwoHosts]:
    """Joined by a link that is up. torchrun gives the first one rank 0, whose address is sorted first.
    Nothing of them is left afterwards."""
    names = [f"sw{os.getpid()}{letter}" for letter in "ab"]
    made = TwoHosts()
    try:
        for number, name in enumerate(names, 1):
            _ip("netns", "add", name)
            made.hosts.append(Host(name, f"10.77.0.{number}", logs / f"{name}.log"))
        one, other = names
        _ip("link", "add", LINK, "netns", one, "type", "veth", "peer", "name", LINK, "netns", other)
        for host in made.hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", LINK)
            _ip("-n", host.name, "link", "set", "lo", "up")
            _ip("-n", host.name, "link", "set", LINK, "up")
        yield made
    finally:
        for host in made.hosts:
            host.end()


def _ip(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *args], capture_output=True, text=True, check=check, timeout=20)
