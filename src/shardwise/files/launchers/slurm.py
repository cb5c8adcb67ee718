"""A script for sbatch: one torchrun a node, which meet at the first node of the job. A container is pyxis'.

Sources: slurm.schedmd.com/sbatch.html; github.com/NVIDIA/pyxis (--container-image, --container-mounts)."""

import shlex
from collections.abc import Iterator

from shardwise.core.launcher import Job
from shardwise.files.launchers.shell import head, lines, quoted, torchrun

SUFFIX = "sbatch"
START = "sbatch {}"
_ENDPOINT, _RUN = '"$first"', '"$SLURM_JOB_ID"'


def text(job: Job) -> str:
    return "\n".join(
        [
            *head(job),
            *(f"#SBATCH {each}" for each in _settings(job)),
            "set -euo pipefail",
            'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            # not by `| head -n 1`: scontrol could die of the closed pipe, and pipefail would end all
            "first=${hosts%%$'\\n'*}",
            *quoted(job),
            f"{lines(['srun', *_container(job), *torchrun(job, _ENDPOINT, _RUN)])}\n",
        ]
    )


def _settings(job: Job) -> Iterator[str]:
    yield f"--job-name={job.name}"
    yield f"--nodes={job.hosts}"
    yield "--ntasks-per-node=1"
    if job.has_gpus:
        yield f"--gpus-per-node={job.ranks_of_a_host}"
    yield "--exclusive"
    hours, minutes = divmod(job.minutes, 60)
    yield f"--time={hours}:{minutes:02}:00"
    if job.partition is not None:
        yield f"--partition={job.partition}"
    yield "--output=%x-%j.log"
    # two minutes before the time limit, so that ranks can save
    yield "--signal=TERM@120"


def _container(job: Job) -> Iterator[str]:
    yield "--kill-on-bad-exit=1"
    if job.image is not None:
        yield shlex.quote(f"--container-image={job.image}")
    if job.mounts:
        mounts = ",".join(f"{each.source}:{each.path}" for each in job.mounts)
        yield shlex.quote(f"--container-mounts={mounts}")
