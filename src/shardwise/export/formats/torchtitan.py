"""torchtitan: ShardingConfigs of torchtitan 0.3.0 for a model of its own (titan:FAMILY/FLAVOR), set on its
configuration after the family's own; and a config function, as its trainer takes one.

What no rule of a plan names (rotary caches, the kernel of attention) keeps what the family says. Its tables
are cut by rows, and its last norm gathers the sequence for the head.
"""

import importlib
import inspect
from collections.abc import Iterator

from torch import nn

from shardwise.core.errors import ModelError, OptionError
from shardwise.core.export import File
from shardwise.core.mesh import REPLICAS_AXIS
from shardwise.core.placement import Partial, Shard
from shardwise.core.plan import Style, StyleName
from shardwise.export.code import Code, Raw, Table, attribute, call, checked_name, dotted, file, statement
from shardwise.export.heads import doc, head
from shardwise.export.job import Job, Written, check_axes, refuse
from shardwise.export.nearest import Unsaid, nearest
from shardwise.models.frameworks.framework import FrameworkModel
from shardwise.parallel.resolve import head_of
from shardwise.parallel.sharder import Assignment

ABOUT = "torchtitan's ShardingConfigs for a model of its own, and a config function"
NAME = "sharded.py"
_PREFIX = "titan"
_IMPORTS = {
    "torchtitan.models.common.decoder_sharding": (
        "colwise_config",
        "dense_activation_placement",
        "dense_param_placement",
        "dense_sequence_parallel_placement",
        "norm_config",
        "pre_lm_head_norm_config",
        "rowwise_config",
    ),
    "torchtitan.protocols.sharding": ("LocalMapConfig", "ShardingConfig"),
}


def write(job: Job) -> Written:
    """Raises ModelError for a model that isn't torchtitan's, and PlanError for what it can't say."""
    source = job.source
    if not isinstance(source, FrameworkModel) or source.framework.prefix != _PREFIX:
        raise ModelError(
            f"--as torchtitan: {source.name} is none of torchtitan's own models, whose configurations it "
            "shards. Use --model titan:FAMILY/FLAVOR, with a plan in its modules' names, or --as pytorch."
        )
    check_axes(job, "torchtitan")
    if job.plan is None:
        raise OptionError("--as torchtitan: FSDP alone is an option of its own. Name a plan, and tp=2.")
    job, left_out = nearest(job, "torchtitan", _unsaid)
    body = _setting(job) + _SHARDED + _function(job, source.asked)
    made = file(head(job, left_out), doc(job, "by torchtitan"), body, _IMPORTS)
    made = made.replace('"""\n\nfrom', '"""\n\nfrom copy import copy\n\nimport spmd_types as spmd\nfrom', 1)
    return Written((File(NAME, made),), left_out, job.plan if left_out else None)


def _unsaid(assignment: Assignment) -> Unsaid | None:
    style, is_table = assignment.style, isinstance(assignment.module, nn.Embedding)
    if is_table and style.name is not StyleName.ROWWISE:
        as_before = Style(StyleName.ROWWISE, output=assignment.sharder.output_of(style))
        return Unsaid("torchtitan cuts its table by rows", as_before)
    own = Style(style.name, input=style.input, output=style.output, gradient=style.gradient)
    if style != own:
        return Unsaid("a ShardingConfig cuts weights whole, and changes no counts")
    match style.name:
        case StyleName.COLWISE | StyleName.ROWWISE if isinstance(assignment.module, nn.Linear | nn.Embedding):
            return None
        case StyleName.GATHER_INPUT if style.output is None:
            return None
        case StyleName.SEQUENCE_PARALLEL | StyleName.REPLICATE:
            return None
    return Unsaid(f"{style.name} is Shardwise's own")


def _setting(job: Job) -> str:
    """set_sharding(config): a ShardingConfig for each rule, layers by a loop."""
    layers, said = job.layers, dict[str, Code]()
    for each in job.assignments:
        code = _said(each, job)
        if code is not None:
            said[checked_name(each.name)] = code
    lines = (
        "\n\ndef set_sharding(config) -> None:\n"
        '    """The plan, on a model\'s configuration; what it doesn\'t name keeps the family\'s."""\n'
    )
    prefix = f"{layers.prefix}.*." if layers is not None else None
    inside: list[tuple[str, Code]] = []
    for pattern, code in job.patterns(said).items():
        if prefix is not None and pattern.startswith(prefix):
            inside.append((pattern.removeprefix(prefix), code))
        elif (
            "*" in pattern
            or pattern.split(".")[-1].isdecimal()
            or any(map(str.isdecimal, pattern.split(".")))
        ):
            raise refuse(job, "torchtitan", pattern, "its rules aren't the same for all layers")
        else:
            lines += statement(f"{attribute('config', pattern)}.sharding_config = ", code, 1)
    if inside and layers is not None:
        lines += f"    for layer in {attribute('config', layers.prefix)}:\n"
        for own, code in inside:
            lines += statement(f"{attribute('layer', own)}.sharding_config = ", code, 2)
    return lines


def _said(assignment: Assignment, job: Job) -> Code | None:
    style, sharder = assignment.style, assignment.sharder
    match style.name:
        case StyleName.ROWWISE if isinstance(assignment.module, nn.Embedding):
            return _table(cuts_sequence=sharder.output_of(style) == Shard(1))
        case StyleName.COLWISE if assignment.module is head_of(job.model):
            return _head()
        case StyleName.COLWISE:
            return call("colwise_config")
        case StyleName.ROWWISE:
            return call("rowwise_config", output_sp=Raw(str(sharder.output_of(style) == Shard(1))))
        case StyleName.GATHER_INPUT:
            name = next(iter(inspect.signature(assignment.module.forward).parameters))
            between = _between(cuts_sequence=sharder.input_of(style) == Shard(1))
            wanted = call("dense_activation_placement", tp=Raw("spmd.R"))
            return call(
                "ShardingConfig",
                in_src_shardings=Table(((checked_name(name), between),)),
                in_dst_shardings=Table(((checked_name(name), wanted),)),
            )
        case StyleName.REPLICATE if style.gradient == Partial():
            return None  # norms of heads: the family has one configuration for both
    is_cut = style.name is StyleName.SEQUENCE_PARALLEL
    is_last = job.layers is None or not assignment.name.startswith(f"{job.layers.prefix}.")
    return call("pre_lm_head_norm_config" if is_last else "norm_config", enable_sp=Raw(str(is_cut)))


def _between(*, cuts_sequence: bool) -> Code:
    if cuts_sequence:
        return call("dense_sequence_parallel_placement")
    return call("dense_activation_placement", tp=Raw("spmd.I"))


def _table(*, cuts_sequence: bool) -> Code:
    ids = Table((("input", call("dense_activation_placement", tp=Raw("spmd.R"))),))
    return call(
        "ShardingConfig",
        state_shardings=Table((("weight", call("dense_param_placement", tp=Raw("spmd.S(0)"))),)),
        in_src_shardings=ids,
        in_dst_shardings=ids,
        out_src_shardings=call("dense_activation_placement", tp=Raw("spmd.P")),
        out_dst_shardings=_between(cuts_sequence=cuts_sequence),
        local_map=call("LocalMapConfig", in_grad_placements=Raw("None")),
    )


def _head() -> Code:
    whole = Table((("input", call("dense_activation_placement", tp=Raw("spmd.R"))),))
    cut = call("dense_activation_placement", tp=Raw("spmd.S(-1)"))
    return call(
        "ShardingConfig",
        state_shardings=Table((("weight", call("dense_param_placement", tp=Raw("spmd.S(0)"))),)),
        in_src_shardings=whole,
        in_dst_shardings=whole,
        out_src_shardings=cut,
        out_dst_shardings=cut,
    )


_SHARDED = '''

def sharded(config):
    """A copy of a model's configuration: whenever the trainer updates it, the family
    sets its own shardings, and then this plan's are set."""

    class Sharded(type(config)):
        __slots__ = ()

        def update_from_config(self, *, config, **kwargs) -> None:
            super().update_from_config(config=config, **kwargs)
            set_sharding(self)

    made = copy(config)
    made.__class__ = Sharded
    return made
'''


def _function(job: Job, asked: str) -> str:
    """A config function on top of torchtitan's own for the flavor, where it has one."""
    family, _, flavor = asked.partition("?")[0].partition("/")
    registry = f"torchtitan.models.{dotted(family)}.config_registry"
    name = f"{family}_{flavor}".lower()
    if not name.isidentifier() or not hasattr(importlib.import_module(registry), name):
        return ""
    mesh, step = job.mesh, job.step
    settings = [
        ("tensor_parallel_degree", str(mesh.tp)),
        ("data_parallel_shard_degree", str(mesh.fsdp)),
        ("data_parallel_replicate_degree", str(mesh.size(REPLICAS_AXIS))),
        ("enable_sequence_parallel", str(_cuts_sequence(job))),
    ]
    if mesh.shard_axes:
        policy = "always" if step.reshard_after_forward else "never"
        settings.append(("fsdp_reshard_after_forward", f'"{policy}"'))
    lines = (
        "\n\ndef config():\n"
        '    """As a config function of the family\'s config_registry."""\n'
        f"    from {registry} import {name}\n\n"
        f"    made = {name}()\n"
        "    made.model_spec.model = sharded(made.model_spec.model)\n"
    )
    for key, value in settings:
        lines += f"    made.parallelism.{key} = {value}\n"
    for key, value in _training(job):
        lines += f"    made.training.{key} = {value}\n"
    return f"{lines}    return made\n"


def _training(job: Job) -> Iterator[tuple[str, str]]:
    if job.step.param_dtype:
        yield "mixed_precision_param", f'"{job.step.param_dtype}"'
    if job.step.reduce_dtype:
        yield "mixed_precision_reduce", f'"{job.step.reduce_dtype}"'


def _cuts_sequence(job: Job) -> bool:
    return any(each.style.name is StyleName.SEQUENCE_PARALLEL for each in job.assignments)
