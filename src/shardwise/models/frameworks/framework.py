"""What is known of a framework whose models shard themselves, and its models as sources."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from torch import nn

from shardwise.core.errors import ModelError
from shardwise.core.plan import Family, TheirPlan
from shardwise.core.shown import shown, told
from shardwise.models.dtype import default_dtype
from shardwise.models.self_sharded import SelfSharded, ShardsItself, module_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Make = Callable[["DeviceMesh | None"], nn.Module | SelfSharded]
"""Makes the model in the default dtype and on the default device: whole, or this rank's part of it."""


@dataclass(frozen=True, slots=True)
class Framework:
    """prefix: its models are named PREFIX:... name: as people call it. distribution: what pip calls it.
    extra: of this package, that installs it. tried: versions, oldest first. namings: how a model is named,
    and what it then is, a line each. find: (framework, what stands behind the prefix) -> the model; raises
    ModelError, and is called once it is known to be installed."""

    prefix: str
    name: str
    distribution: str
    extra: str
    tried: tuple[str, ...]
    namings: tuple[tuple[str, str], ...]
    find: Callable[["Framework", str], ShardsItself]

    @property
    def installed(self) -> str | None:
        """Its version here."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    @property
    def doubt(self) -> str:
        """A sentence where the version that is installed wasn't tried, else nothing."""
        found = self.installed
        if found is None or found in self.tried:
            return ""
        return f"{self.name} {found} wasn't tried; {', '.join(self.tried)} {_was(self.tried)}."

    def named(self, asked: str) -> str:
        """A model as the user named it."""
        return f"{self.prefix}:{shown(asked)}"

    def model(self, asked: str) -> ShardsItself:
        """Raises ModelError."""
        if self.installed is None:
            raise ModelError(
                f'model "{self.named(asked)}": {self.name} isn\'t installed. Try: pip install '
                f"'shardwise[{self.extra}]'."
            )
        return self.find(self, asked)

    def failed(self, asked: str, doing: str, error: BaseException) -> ModelError:
        """What its own code raised, in a line. doing: "can't be imported"."""
        doubt = f" {self.doubt}" if self.doubt else ""
        found = f"{self.name} {self.installed}"
        return ModelError(f'model "{self.named(asked)}": {found} {doing}: {told(error)}{doubt}')


@contextmanager
def _quietly() -> Iterator[None]:
    """What a framework prints and warns of while it builds, on each rank, is about training runs: an answer
    on stdout must stay one."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _was(tried: tuple[str, ...]) -> str:
    return "was" if len(tried) == 1 else "were"


@dataclass(frozen=True, slots=True)
class FrameworkModel:
    """A model of a framework. about: what it is, in a line. make_small: of a small twin."""

    framework: Framework
    asked: str
    about: str
    make: Make
    vocab_size: int | None = None
    max_seq: int | None = None
    make_small: Callable[[int], Make] | None = None

    @property
    def name(self) -> str:
        return self.framework.named(self.asked)

    @property
    def family(self) -> Family:
        return Family.LLAMA

    @property
    def notes(self) -> tuple[str, ...]:
        doubt = self.framework.doubt
        return (doubt,) if doubt else ()

    @property
    def default_plan(self) -> str:
        return TheirPlan.OWN

    @property
    def initialises(self) -> bool:
        return True

    @property
    def takes_mesh(self) -> bool:
        return True

    def small(self, tp: int) -> "FrameworkModel | None":
        """Its twin that runs anywhere, where the framework's file knows one."""
        if self.make_small is None:
            return None
        return FrameworkModel(self.framework, self.asked, self.about, self.make_small(tp))

    def build(
        self, *, dtype: torch.dtype, device: torch.device | str = "meta", mesh: "DeviceMesh | None" = None
    ) -> nn.Module:
        """As ShardsItself has it. Raises ModelError for what the framework raises."""
        try:
            with torch.device(device), default_dtype(dtype), _quietly():
                made = self.make(mesh)
        except ModelError:
            raise
        except (Exception, SystemExit) as error:
            raise self.framework.failed(self.asked, "can't build it", error) from error
        return module_of(made, self.name)
