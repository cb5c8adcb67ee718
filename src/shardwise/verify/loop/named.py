"""Functions that go to the ranks by name: they are imported there, and nothing is pickled."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.core.errors import OptionError
from shardwise.core.shown import shown, told


@dataclass(frozen=True, slots=True)
class Named:
    """A function of a module. file: where the module came from, for one that ranks can't import by its name:
    a script, or a test that pytest has loaded from its file."""

    module: str
    path: str
    file: str = ""

    @classmethod
    def of(cls, function: Callable[..., Any], what: str) -> "Named":
        """what: its argument's name, for errors. Raises OptionError for what has no name of its own."""
        module = getattr(function, "__module__", None)
        path = getattr(function, "__qualname__", "")
        if not isinstance(module, str) or not path or "<" in path:
            raise OptionError(
                f"{what}: {shown(path or repr(function))} has no name by which ranks could import it. Define "
                "it with def, at the top of a module."
            )
        file = getattr(sys.modules.get(module), "__file__", None) or ""
        return cls(module, path, str(Path(file).absolute()) if file else "")

    def load(self) -> Callable[..., Any]:
        """Raises OptionError for a module that can't be imported here."""
        found: Any = _imported(self.module, self.file)
        for part in self.path.split("."):
            found = getattr(found, part)
        return found  # type: ignore[no-any-return]


def _imported(module: str, file: str) -> Any:
    # a script is __main__ where it runs only: its `if __name__ == "__main__"` must not run again
    name = "__shardwise_script__" if module == "__main__" else module
    if name in sys.modules:
        return sys.modules[name]
    try:
        if module != "__main__":
            return importlib.import_module(name)
    except ModuleNotFoundError:
        if not file:
            raise
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise OptionError(f"{name}: a rank can't import it, and it is in no file. Put it into a module.")
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    try:
        spec.loader.exec_module(found)
    except Exception as error:
        del sys.modules[name]
        raise OptionError(f"{name}: on a rank, importing {file} raised {told(error)}") from error
    return found
