"""pytorch: one Python file that shards, trains and builds the model in plain PyTorch, without Shardwise:
parallelize_module, loss_parallel, FSDP2, activation checkpointing."""

from shardwise.core.export import File
from shardwise.core.mesh import REPLICAS_AXIS
from shardwise.export.building import building, configuration, is_hugging_face
from shardwise.export.code import file
from shardwise.export.heads import doc, head
from shardwise.export.job import Job, Written, check_axes
from shardwise.export.torch_file import main, parallelize, train_step
from shardwise.export.torch_styles import torch_styles

ABOUT = "a Python file in plain PyTorch: parallelize_module, loss_parallel and FSDP2, the step, a short run"
NAME = "sharded.py"


def write(job: Job) -> Written:
    """Raises OptionError for axes, and PlanError for rules, near which PyTorch has nothing."""
    check_axes(job, "pytorch")
    styles = torch_styles(job, "pytorch") if job.plan is not None else None
    is_theirs = is_hugging_face(job.source)
    cut_logits = styles is not None and styles.cut_logits
    body = (
        configuration(job.source)
        + parallelize(job, styles)
        + train_step(job, cut_logits=cut_logits, takes_output=is_theirs)
        + building(job.source)
        + main(job)
    )
    said = styles.job.plan if styles is not None and styles.left_out else None
    left_out = styles.left_out if styles is not None else ()
    made = file(head(job, left_out), doc(job, "in plain PyTorch"), body)
    # plan own would sum gradients over dp once more, where FSDP2 has replicas of its shards
    has_replicas = bool(job.mesh.shard_axes) and job.mesh.size(REPLICAS_AXIS) > 1
    return Written((File(NAME, made),), left_out, said, prove=None if has_replicas else "build")
