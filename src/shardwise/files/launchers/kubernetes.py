"""A manifest for kubectl: an indexed Job with a pod a host, a headless Service by which the pods find the
first, and a ConfigMap with the files that the command reads.

Source: kubernetes.io/docs/concepts/workloads/controllers/job (completionMode Indexed: pod I of job NAME has
the hostname NAME-I, and with a Service NAME of its subdomain the name NAME-I.NAME)."""

import json
from collections.abc import Iterator, Mapping, Sequence

from shardwise.core.errors import OptionError
from shardwise.core.launcher import Job
from shardwise.files.launchers import MARK

SUFFIX = "yaml"
START = "kubectl apply -f {}"
CARRIED = "/etc/shardwise"
"""Where the files lie in a pod that are carried."""
Value = str | int | bool | Mapping[str, "Value"] | Sequence["Value"]


def text(job: Job) -> str:
    if job.image is None:
        raise OptionError("--for kubernetes: needs a container with Shardwise in it. Add --image.")
    for mount in job.mounts:
        if mount.path == CARRIED or mount.path == "/dev/shm":
            raise OptionError(f"--mount {mount.source}:{mount.path}: that path is taken. Use another.")
    documents = [_service(job), _job(job, job.image)]
    if job.carried:
        documents.insert(0, _config(job))
    head = [f"# {MARK}{job.made_by}", "# Start it anew after a change: kubectl replace --force -f THIS_FILE"]
    return "\n".join([*head, "\n---\n".join("\n".join(_yaml(each, 0)) for each in documents), ""])


def _config(job: Job) -> dict[str, Value]:
    data: dict[str, Value] = {file.name: file.text for file in job.carried}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": job.name}, "data": data}


def _service(job: Job) -> dict[str, Value]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name},
        "spec": {
            "clusterIP": "None",
            # the first pod's name is looked up before it is ready
            "publishNotReadyAddresses": True,
            "selector": {"job-name": job.name},
            "ports": [{"name": "rendezvous", "port": job.port}],
        },
    }


def _job(job: Job, image: str) -> dict[str, Value]:
    pod: dict[str, Value] = {
        "subdomain": job.name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,
        "containers": [_container(job, image)],
        "volumes": list(_volumes(job)),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.hosts,
            "parallelism": job.hosts,
            "backoffLimit": job.hosts * job.max_restarts,
            "activeDeadlineSeconds": 60 * job.minutes,
            "template": {"spec": pod},
        },
    }


def _container(job: Job, image: str) -> dict[str, Value]:
    words = [_unexpanded(word) for word in job.torchrun(f"{job.name}-0.{job.name}", job.name)]
    mounts: list[Value] = [
        {"name": f"mount-{index}", "mountPath": each.path} for index, each in enumerate(job.mounts)
    ]
    mounts.append({"name": "memory", "mountPath": "/dev/shm"})
    if job.carried:
        mounts.append({"name": "carried", "mountPath": CARRIED, "readOnly": True})
    made: dict[str, Value] = {
        "name": "shardwise",
        "image": image,
        "command": words[:1],
        "args": words[1:],
        "volumeMounts": mounts,
    }
    if job.has_gpus:
        made["resources"] = {"limits": {"nvidia.com/gpu": job.ranks_of_a_host}}
    return made


def _volumes(job: Job) -> Iterator[Value]:
    for index, each in enumerate(job.mounts):
        kind: dict[str, Value] = {"persistentVolumeClaim": {"claimName": each.source}}
        if each.is_folder:
            kind = {"hostPath": {"path": each.source}}
        yield {"name": f"mount-{index}", **kind}
    yield {"name": "memory", "emptyDir": {"medium": "Memory"}}
    if job.carried:
        yield {"name": "carried", "configMap": {"name": job.name}}


def _unexpanded(word: str) -> str:
    """Kubernetes puts variables in place of $(NAME), and takes $$( for $(."""
    return word.replace("$(", "$$(")


def _yaml(value: Value, depth: int) -> Iterator[str]:
    """Lines of a block; texts are quoted as JSON quotes them, which YAML reads alike."""
    pad = "  " * depth
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _entry(f"{pad}{_scalar(key)}:", each, depth)
        return
    assert isinstance(value, Sequence)
    for each in value:
        if isinstance(each, str | int | bool):
            yield f"{pad}- {_scalar(each)}"
            continue
        first, *rest = _yaml(each, depth + 1)
        yield f"{pad}- {first.lstrip()}"
        yield from rest


def _entry(key: str, value: Value, depth: int) -> Iterator[str]:
    if isinstance(value, str | int | bool):
        yield f"{key} {_scalar(value)}"
    else:
        yield key
        yield from _yaml(value, depth + 1)


def _scalar(value: str | int | bool) -> str:
    """Plain where that can't be taken for another type."""
    if not isinstance(value, str):
        return json.dumps(value)
    if value.isascii() and value.replace("/", "").replace(".", "").isalpha() and value.lower() not in _WORDS:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(each if each.isprintable() else _escaped(each) for each in quoted)


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "null", ".inf", ".nan"})
