"""Where a rank is when nothing moves: the module and the collective that its threads' Python frames are in,
and the oldest collective that isn't done.

It costs a step nothing: frames are only looked at once a phase lasts long, and when an error passes.
"""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, TracebackType

import torch.distributed.distributed_c10d as c10d
from torch import nn

from shardwise.torch_private import name_of_unit
from shardwise.train.flight import unfinished

STILL_S = 2.0
"""How long a phase lasts before it is said where in it the rank is."""
_LOOK_S = 0.5
_BEAT_S = 2.0
_LONGEST_S = 1800.0
"""How long work on disks, in which nothing else is told, is taken for alive: as long as a save may take."""
_COLLECTIVES = c10d.__file__


class Whereabouts:
    """Tells `note` each phase that begins, and, while one lasts, where in the model the rank is.

    note: takes a line. To be used in a `with`, which ends its thread."""

    def __init__(self, model: nn.Module, note: Callable[[str], None], *, names_host: bool) -> None:
        self._names: dict[int, str] = {id(module): name for name, module in model.named_modules() if name}
        self._note, self._host = note, f" on {socket.gethostname()}" if names_host else ""
        self._phase, self._since_s, self._told = "", time.monotonic(), ""
        self._is_long = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="whereabouts", daemon=True)

    def phase(self, text: str, *, is_long: bool = False) -> None:
        """A phase begins. is_long: work on disks, which may take long: that it goes on is told by itself."""
        self._phase, self._since_s, self._is_long = text, time.monotonic(), is_long
        self._tell(text)

    def failed(self, trace: TracebackType | None) -> None:
        """An error has passed through these frames: says where it came from."""
        frames = []
        while trace is not None:
            frames.append(trace.tb_frame)
            trace = trace.tb_next
        self._tell(self._phase + self._place([frames[::-1]]))

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_S):
            still_s = time.monotonic() - self._since_s
            if still_s < STILL_S:
                continue
            if self._is_long and still_s < _LONGEST_S:
                self._tell(f"{self._phase}, for {still_s // _BEAT_S * _BEAT_S:.0f} s")
                continue
            own = threading.get_ident()
            threads = [
                list(_outwards(frame)) for ident, frame in sys._current_frames().items() if ident != own
            ]
            undone = unfinished()
            text = self._phase + self._place(threads) + (f", not done: {undone}" if undone else "")
            if text != self._told:
                self._tell(text)

    def _tell(self, text: str) -> None:
        self._told = text
        self._note(text + self._host)

    def _place(self, threads: list[list[FrameType]]) -> str:
        """In words. threads: the frames of each, the innermost first."""
        found = [(_collective(frames), self._module(frames)) for frames in threads]
        collective, module = max(found, key=lambda each: (bool(each[0]), bool(each[1])), default=("", ""))
        return (f", in {collective}" if collective else "") + (f", module {module}" if module else "")

    def _module(self, frames: list[FrameType]) -> str:
        """The innermost module of the model that a frame works for."""
        for frame in frames:
            owner = frame.f_locals.get("self")
            name = self._names.get(id(owner)) or name_of_unit(owner)
            if name:
                return name
        return ""

    def __enter__(self) -> "Whereabouts":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if error is not None:
            self.failed(trace)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _collective(frames: list[FrameType]) -> str:
    """The function of torch.distributed that the rank waits in, as its caller named it."""
    codes = [frame.f_code for frame in frames]
    called = [code for code in codes if _is_collective(code)]
    return called[-1].co_name if called else ""


def _is_collective(code: CodeType) -> bool:
    return code.co_filename == _COLLECTIVES and not code.co_name.startswith("_") and code.co_name != "wrapper"
