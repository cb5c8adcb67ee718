"""What can't be: a setup that doesn't fit the Program, the mesh or the machine, said in one line before
anything is predicted."""

from collections.abc import Iterator

from shardwise.core.errors import OptionError
from shardwise.core.layer_name import layer_index
from shardwise.core.machine import Machine
from shardwise.core.mesh import AXES, Mesh, Role
from shardwise.core.pipeline import recomputed_spans
from shardwise.core.prediction import AttentionKernel, Precision, Setup
from shardwise.core.program import MemoryChange, Phase, Program
from shardwise.predict.groups import group_of, joining_context, mesh_of

RESCALED = (Role.REPLICATES, Role.SHARDS_PARAMETERS)
KEPT = (Role.CUTS_TENSORS, Role.CUTS_EXPERTS)
HALVES = ("bfloat16", "float16")


def check_setup(program: Program, machine: Machine, setup: Setup) -> None:
    """Raises OptionError."""
    if program.device != machine.device:
        raise OptionError(
            f"the program is of device {program.device}, and machine {machine.name} is of device "
            f"{machine.device}. Trace it for that device, or choose another machine."
        )
    mesh = mesh_of(program, setup)
    _check_axes(program, setup, mesh)
    _check_precision(program, setup)
    _check_stages(program, setup)
    _check_recomputed(program, setup)
    check_devices(machine, mesh)


def _check_axes(program: Program, setup: Setup, mesh: Mesh) -> None:
    traced = Mesh(program.axes)
    rescaled = [axis.name for axis in AXES if axis.role in RESCALED]
    for axis in AXES:
        name, size, before = axis.name, mesh.size(axis.name), traced.size(axis.name)
        if axis.role in KEPT and size != before:
            raise OptionError(
                f"the program was traced at {name}={before}, and the mesh has {name}={size}. "
                f"Only {' and '.join(rescaled)} can be rescaled."
            )
        if axis.role is Role.CUTS_SEQUENCE and before > 1 and size != before:
            raise OptionError(
                f"the program was traced at {name}={before}, and the mesh has {name}={size}. "
                f"Trace it with {name}={size}."
            )
        if axis.role in RESCALED and (group_of(name, program, setup).size > 1) != (before > 1):
            raise OptionError(
                f"the program was traced at {name}={before}, and the mesh has {name}={size}. "
                "An axis can be rescaled, not added or taken away: 1 stays 1."
            )
    reducing, context = traced.reducing_axis, joining_context(program, setup)
    if context > 1 and reducing is not None and traced.size(reducing) == 1:
        raise OptionError(
            f"mesh {mesh}: the program was traced at {reducing}=1, without reducing its gradients over other "
            f"ranks. Trace it with cp={context}."
        )


def _check_precision(program: Program, setup: Setup) -> None:
    if setup.precision is Precision.MASTER and program.settings.dtype not in HALVES:
        raise OptionError(
            "--precision master: keeps float32 beside parameters in half precision, and these are "
            f"{program.settings.dtype}. Use --dtype bfloat16, or leave it out."
        )
    if setup.recompute_attention and program.settings.recompute != "none":
        raise OptionError(
            "--recompute selective: the program's layers run again as a whole. "
            "Take a program without recompute."
        )
    if setup.recompute_attention and setup.attention is not AttentionKernel.UNFUSED:
        raise OptionError(
            "--recompute selective: is of unfused attention. Add --attention unfused; fused kernels make "
            "their scores again anyway."
        )


def _check_stages(program: Program, setup: Setup) -> None:
    stages, chunks = setup.stages, setup.chunks
    if stages == 1:
        if chunks > 1:
            raise OptionError(
                f"--chunks {chunks}: chunks of layers are of a pipeline's stages. "
                "Use a mesh with pp=2 or more."
            )
        return
    if program.layers is None:
        raise OptionError(
            f"pp={stages}: {program.model} has no row of equal layers that could be cut into stages. "
            "Use pp=1."
        )
    pipeline = setup.pipeline()
    pipeline.spans(program.layers[1], program.model)
    pipeline.check(setup.micro_batches)


def _check_recomputed(program: Program, setup: Setup) -> None:
    recomputed = program.settings.recompute_layers
    if recomputed is None or program.layers is None:
        return
    prefix, n_layers = program.layers
    spans = recomputed_spans(setup.pipeline().spans(n_layers, program.model), recomputed, program.model)
    if {number for span in spans for number in span.indices} != set(_running_again(program, prefix)):
        raise OptionError(
            f"--recompute-layers {recomputed}: the program was traced for stages that deal its layers "
            "otherwise, so that others run again. Trace it on this mesh."
        )


def _running_again(program: Program, prefix: str) -> Iterator[int]:
    for block in program.blocks:
        for item in block.items:
            if not isinstance(item, MemoryChange) and item.phase is Phase.RECOMPUTE:
                layer = layer_index(item.module, prefix)
                if layer is not None:
                    yield from (layer + block.stride * repeat for repeat in range(block.times))


def check_devices(machine: Machine, mesh: Mesh) -> None:
    """Raises OptionError where a machine of one node has fewer devices than the mesh needs."""
    if machine.between is None and mesh.world_size > machine.devices_per_node:
        raise OptionError(
            f"mesh {mesh} is {mesh.world_size} devices, and machine {machine.name} is one node of "
            f"{machine.devices_per_node}: it has no link between nodes. Use at most "
            f"{machine.devices_per_node}, or a machine with [links.between]."
        )
