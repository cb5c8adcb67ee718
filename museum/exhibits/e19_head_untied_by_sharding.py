"""A tied table and head are sharded one after the other, and each gets a parameter of its own."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from museum.parts import Mlp, Small, shard

ABOUT = {
    "number": 19,
    "title": "A tied head is untied by sharding it",
    "sources": ["verl-project/verl#7835", "pytorch/torchtitan#2495", "deepspeedai/DeepSpeed#8290"],
    "symptom": "The table gets the input half of its gradient; the two weights drift apart.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "table.weight",
    "reason": "untied",
    "before": "a style for the table and one for the head make a new parameter each",
    "after": "the head is given the table's new parameter",
}


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    model = Small(Mlp(), tied=True)
    if mesh is not None:
        shard(model, mesh)
        styles = {
            "table": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(model, mesh["tp"], styles)
        if not fault:
            model.head.weight = model.table.weight
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
