"""What can't be: a setup that doesn't fit the Program, the mesh or the machine, said in one line before anything is predicted."""

from collections.abc import Mapping
from math import prod

from shardwise.core.errors import OptionError
from shardwise.core.machine import Machine
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import AttentionKernel, Precision, Setup
from shardwise.core.program import Program
from shardwise.predict.work import reducing_sizes

DATA_AXES = ("dp", "fsdp")
HALVES = ("bfloat16", "float16")


def check_setup(program: Program, machine: Machine, setup: Setup, sizes: Mapping[str, int]) -> None:
    """sizes: of the mesh's axes. Raises OptionError."""
    if program.device != machine.device:
        raise OptionError(
            f"the program is of device {program.device}, and machine {machine.name} is of device {machine.device}. "
            "Trace it for that device, or choose another machine."
        )
    traced = dict(program.axes)
    if sizes.get("tp", 1) != traced.get("tp", 1):
        raise OptionError(
            f"the program was traced at tp={traced.get('tp', 1)}, and the mesh has tp={sizes.get('tp', 1)}. Only dp and fsdp can be rescaled."
        )
    wide = reducing_sizes(program, setup, dict(sizes))
    for name in DATA_AXES:
        if (wide.get(name, 1) > 1) != (traced.get(name, 1) > 1):
            raise OptionError(
                f"the program was traced at {name}={traced.get(name, 1)}, and the mesh has {name}={sizes.get(name, 1)}. "
                "An axis can be rescaled, not added or taken away: 1 stays 1."
            )
    axis = Mesh(program.axes).reducing_axis
    if setup.context > 1 and axis is not None and traced[axis] == 1:
        raise OptionError(
            f"--context {setup.context}: the program was traced at {axis}=1, without reducing its gradients over other ranks. Trace it with --context."
        )
    _check_precision(program, setup)
    _check_stages(program, setup)
    check_devices(machine, setup, sizes)


def _check_precision(program: Program, setup: Setup) -> None:
    if setup.precision is Precision.MASTER and program.settings.dtype not in HALVES:
        raise OptionError(
            f"--precision master: keeps float32 beside parameters in half precision, and these are {program.settings.dtype}. "
            "Use --dtype bfloat16, or leave it out."
        )
    if setup.recompute_attention and program.settings.recompute != "none":
        raise OptionError(
            "--recompute selective: the program's layers run again as a whole. Take a program without recompute."
        )
    if setup.recompute_attention and setup.attention is not AttentionKernel.UNFUSED:
        raise OptionError(
            "--recompute selective: is of unfused attention. Add --attention unfused; fused kernels make their scores again anyway."
        )


def _check_stages(program: Program, setup: Setup) -> None:
    if setup.stages == 1:
        if setup.chunks > 1:
            raise OptionError(
                f"--chunks {setup.chunks}: chunks of layers are of a pipeline's stages. Use --stages of at least 2."
            )
        return
    if program.layers is None:
        raise OptionError(
            f"--stages {setup.stages}: {program.model} has no row of equal layers that could be cut. Use --stages 1."
        )
    n_layers = program.layers[1]
    if setup.stages * setup.chunks > n_layers:
        cut = f"{setup.stages} stages" + (f" of {setup.chunks} chunks" if setup.chunks > 1 else "")
        raise OptionError(
            f"--stages: {program.model} has {n_layers} layers, and can't be cut into {cut}. Use at most {n_layers // setup.chunks}."
        )
    if setup.chunks > 1 and setup.micro_batches % setup.stages:
        raise OptionError(
            f"--chunks {setup.chunks}: the interleaved schedule takes micro-batches in rounds of {setup.stages} stages, and "
            f"{setup.micro_batches} is no multiple. Use --accumulation {-(-setup.micro_batches // setup.stages) * setup.stages}."
        )


def check_devices(machine: Machine, setup: Setup, sizes: Mapping[str, int]) -> None:
    """Raises OptionError where a machine of one node has fewer devices than the mesh needs."""
    devices = prod(sizes.values()) * setup.stages * setup.context
    if machine.between is None and devices > machine.devices_per_node:
        mesh = ",".join(f"{name}={size}" for name, size in sizes.items())
        more = "".join(
            f" x {count} {what}"
            for count, what in ((setup.stages, "stages"), (setup.context, "context ranks"))
            if count > 1
        )
        raise OptionError(
            f"mesh {mesh}{more} is {devices} devices, and machine {machine.name} is one node of {machine.devices_per_node}: it has no link "
            f"between nodes. Use at most {machine.devices_per_node}, or a machine with [links.between]."
        )
