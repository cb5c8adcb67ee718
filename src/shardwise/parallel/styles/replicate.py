"""replicate: nothing is cut and nothing is sent; each rank has the module whole and computes what it would
alone."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor.parallel import ParallelStyle

from shardwise.core.placement import Replicate
from shardwise.parallel.layers import apply_to_norm, local_or_none
from shardwise.parallel.parameters import local_weight
from shardwise.parallel.sharder import Assignment, Sharder, Work


class _Replicated(ParallelStyle):
    """Parameters as Replicate DTensors, plain tensors in and out: what a module outside sequence parallelism
    needs."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def to_dtensor(_: nn.Module, inputs: tuple[object, ...], mesh: DeviceMesh) -> tuple[object, ...]:
            return tuple(
                DTensor.from_local(x, mesh, [TorchReplicate()], run_check=False)
                if isinstance(x, Tensor) and not isinstance(x, DTensor)
                else x
                for x in inputs
            )

        def to_local(_: nn.Module, output: DTensor, __: DeviceMesh) -> Tensor:
            return output.to_local()

        # its hooks may return values, whatever its types say
        return distribute_module(module, device_mesh, None, to_dtensor, to_local)  # type: ignore[arg-type]


class WholeLinear(Sharder):
    twin_style = _Replicated
    below_gather_input = "Allowed there: colwise, rowwise."

    def apply(self, assignment: Assignment, work: Work) -> None:
        module = assignment.module
        work.keep_whole(module, Replicate())
        module.forward = lambda x: F.linear(
            x, local_weight(module.weight, Replicate()), local_or_none(module.bias, Replicate())
        )


class WholeNorm(Sharder):
    twin_style = _Replicated
    below_gather_input = "Use sequence_parallel, which sums the parts."

    def apply(self, assignment: Assignment, work: Work) -> None:
        apply_to_norm(assignment, work, Replicate())


SHARDERS = {nn.Linear: WholeLinear(), **dict.fromkeys((nn.RMSNorm, nn.LayerNorm), WholeNorm())}
