"""A model without its weights: parameters on the meta device, and buffers, masks and tables as its code makes
them.

On the meta device alone a rotary table that __init__ computes would be lost. So the model is built where it
will run, and each parameter moves to meta as soon as a module has it: what is held is the largest one, and
its initialisation afterwards costs nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import ref

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from shardwise.models.model_source import ModelSource


def build_without_weights(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device | str, seed: int
) -> nn.Module:
    """The model of `source`; its parameters are meta tensors, all else is real, on `device`, and equal on all
    ranks. Raises ModelError."""
    torch.manual_seed(seed)
    with _parameters_on_meta():
        return source.build(dtype=dtype, device=device)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """A parameter that several modules take stays one."""
    # what stands for a parameter, as long as its own code holds that: an id alone may be of another one later
    known: dict[int, tuple[ref[nn.Parameter], nn.Parameter]] = {}

    def on_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        held, empty = known.get(id(parameter), (None, None))
        if held is None or held() is not parameter or empty is None:
            empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            vars(empty).update(vars(parameter))
            known[id(parameter)] = ref(parameter), empty
        return empty

    # PyTorch's annotation has no return value, of which its documentation speaks
    with register_module_parameter_registration_hook(on_meta):  # type: ignore[arg-type]
        yield
