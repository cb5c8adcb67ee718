"""Layers of a model that is built to be compiled reach the compiler that was asked for."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch._dynamo import register_backend

from shardwise.models.source import find_model
from shardwise.step.build import build_model

TINY = "llama3-debug?n_layers=2,hidden=32,n_heads=4,n_kv_heads=2,ffn_hidden=64,vocab_size=512"
compiled: list[fx.GraphModule] = []


@register_backend(name="counted")
def counted(graph: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., object]:
    compiled.append(graph)
    return graph.forward


def test_each_layer_is_compiled_by_the_backend_that_was_asked_for() -> None:
    source = find_model(TINY)
    model = build_model(
        source,
        None,
        None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        seed=0,
        compiled=True,
        compiler="counted",
    )
    with torch.no_grad():  # torch's compiler warns of itself otherwise
        model(torch.zeros(1, 8, dtype=torch.long))
    assert compiled
