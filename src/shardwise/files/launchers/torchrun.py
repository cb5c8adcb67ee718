"""A script that is run on every host: torchrun with its c10d rendezvous on the first.

Source of the options: docs.pytorch.org/docs/stable/elastic/run.html."""

from shardwise.core.launcher import Job
from shardwise.files.launchers.shell import head, lines, quoted, torchrun

SUFFIX = "sh"
START = "on every host: bash {} FIRST_HOST"
_ENDPOINT = '"$first"'


def text(job: Job) -> str:
    run = f"timeout --kill-after=120 {job.minutes}m"
    words = " ".join(["exec", run, lines(torchrun(job, _ENDPOINT, job.name))])
    return "\n".join(
        [
            *head(job),
            f"# Run it on each of the {job.hosts} hosts, with the name or the address of the first one.",
            "set -euo pipefail",
            "first=${1:?name or address of the first host, the same on all}",
            "# at the time limit ranks get SIGTERM, and two minutes to save",
            *quoted(job),
            f"{words}\n",
        ]
    )
