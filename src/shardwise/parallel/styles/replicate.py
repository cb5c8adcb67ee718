"""replicate: nothing is cut and nothing is sent; each rank has the module's own parameters whole and computes
what it would alone. `gradient` partial: on what only a part of the work is for (queries of the own heads), so
that its gradient is a part, which is summed."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor.parallel import ParallelStyle

from shardwise.parallel.leaves import WholeLeaf
from shardwise.parallel.sharder import Sharder


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


class Replicated(WholeLeaf):
    """Of a class for which PyTorch's engine has this twin."""

    twin_style = _Replicated


SHARDERS: dict[type[nn.Module], Sharder] = {
    **dict.fromkeys((nn.Module, nn.Embedding), WholeLeaf()),
    **dict.fromkeys((nn.Linear, nn.RMSNorm, nn.LayerNorm), Replicated()),
}
