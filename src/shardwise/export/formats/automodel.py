"""automodel: a tp_shard_plan in PyTorch's own styles, as NeMo Automodel 0.7.0 imports it by its path, and the
`distributed:` section of its YAML.

Automodel applies it with parallelize_module, ties the head again, changes counts of heads itself, and sums
what tp ranks hold alike between backward and clipping; FSDP2, recompute and mixed precision are its own.
"""

from collections.abc import Iterator

from shardwise.core.errors import ModelError, OptionError
from shardwise.core.export import File, LeftOut
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.export.building import building, configuration, is_hugging_face
from shardwise.export.code import attribute, comment, file, statement, text
from shardwise.export.heads import MARK, doc, head
from shardwise.export.job import Job, Written, check_axes
from shardwise.export.torch_file import own_styles
from shardwise.export.torch_styles import TorchStyles, torch_styles

ABOUT = "NeMo Automodel's tp_shard_plan, and the distributed section of its YAML"
NAME, YAML = "sharded.py", "distributed.yaml"


def write(job: Job) -> Written:
    """Raises ModelError for a model that isn't transformers', and what torch_styles() raises."""
    if not is_hugging_face(job.source):
        raise ModelError(
            f"--as automodel: {job.source.name} is no Hugging Face model, which is what Automodel trains. "
            "Use --model hf:TYPE, or --as pytorch."
        )
    check_axes(job, "automodel")
    if job.plan is None:
        raise OptionError(
            f"--as automodel: a tp_shard_plan is for tp ranks, and mesh {job.mesh} has none. Use tp=2."
        )
    styles = torch_styles(job, "automodel", can_count=False)
    left_out = (*styles.left_out, *_settings_left_out(job))
    body = configuration(job.source) + _plan(styles) + _sharding(styles)
    body += building(job.source, call="shard(model, mesh)")
    made = file(head(job, left_out), doc(job, "by NeMo Automodel"), body)
    files = (File(NAME, made), File(YAML, _yaml(job)))
    said = styles.job.plan if styles.left_out else None
    note = "Its names are those of transformers' class: use force_hf: true where Automodel has its own."
    return Written(files, left_out, said, prove="build", notes=(note,))


def _plan(styles: TorchStyles) -> str:
    return (
        f"{own_styles(styles)}\n\ndef tp_shard_plan() -> dict[str, ParallelStyle]:\n"
        '    """What Automodel calls: distributed.tp_plan names it by its path."""\n'
        + statement("return ", styles.table, 1)
    )


def _sharding(styles: TorchStyles) -> str:
    lines = (
        "\n\ndef shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:\n"
        '    """What Automodel does with the plan; FSDP2 is put on top of it."""\n'
        f"    parallelize_module(model, mesh[{text(TENSOR_AXIS)}], tp_shard_plan())\n"
    )
    for name, other in styles.job.tied():
        (holder, _, own), (first, _, first_own) = other.rpartition("."), name.rpartition(".")
        lines += f"    {attribute('model', holder)}.{own} = {attribute('model', first)}.{first_own}\n"
    return f"{lines}    return model\n"


def _yaml(job: Job) -> str:
    step, mesh = job.step, job.mesh
    replicas = mesh.data_parallel // mesh.fsdp
    lines = [
        f"# {MARK}{comment(job.command)}",
        "# a part of a recipe's YAML; sharded.py must be importable where it runs",
        "distributed:",
        "  strategy: fsdp2",
        f"  tp_size: {mesh.tp}",
        f"  dp_size: {mesh.data_parallel}",
        *([f"  dp_replicate_size: {replicas}"] if replicas > 1 and mesh.fsdp > 1 else []),
        "  tp_plan: sharded.tp_shard_plan",
    ]
    if step.recompute != "none":
        lines.append(f"  activation_checkpointing: {'full' if step.recompute == 'full' else 'selective'}")
    if mesh.shard_axes:
        lines.append(f"  reshard_after_forward: {'true' if step.reshard_after_forward else 'false'}")
    lines += [
        "  mp_policy:  # Automodel's own default is bfloat16, reduced in float32",
        "    _target_: torch.distributed.fsdp.MixedPrecisionPolicy",
        f"    param_dtype: {step.computed_dtype}",
        f"    reduce_dtype: {step.reduced_dtype}",
    ]
    return "\n".join(lines) + "\n"


def _settings_left_out(job: Job) -> Iterator[LeftOut]:
    if job.step.recompute == "selective-ops":
        why = "Automodel has its own list of what is kept."
        yield LeftOut("recompute selective-ops", "Automodel's selective", why)
