"""A layer is cut by its outputs, and the one after it takes whole inputs."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from museum.parts import INNER, WIDTH, Mlp, Small

ABOUT = {
    "number": 22,
    "title": "A column-parallel layer without its row-parallel one",
    "sources": ["vllm-project/vllm#42630", "pytorch/pytorch#99432"],
    "symptom": "mat1 and mat2 shapes cannot be multiplied; which rule is missing isn't said.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.down",
    "reason": "crashes",
    "before": "up gives each rank half of the features, down wants all of them",
    "after": "down is row-parallel",
}


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Mlp()
    block.up, block.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)  # type: ignore[assignment]
    model = Small(block)
    if mesh is not None:
        styles: dict[str, ParallelStyle] = {"blocks.0.up": ColwiseParallel()}
        if not fault:
            styles["blocks.0.down"] = RowwiseParallel()
        parallelize_module(model, mesh["tp"], styles)
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
