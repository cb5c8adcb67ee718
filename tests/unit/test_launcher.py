"""Launchers: scripts that bash and shellcheck take, a manifest that is what Kubernetes asks of one, words
that come out of a shell as they went in, and what is refused."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from shardwise.core.case import Case
from shardwise.core.errors import OptionError
from shardwise.core.launcher import Launcher, LauncherOptions
from shardwise.verbs.launcher import launcher
from tests.e2e.command import shardwise

HOSTILE = ("a b", "$(touch owned)", "`touch owned`", "'; touch owned; '", '"$HOME"', "*", "--rdzv-id=x", "ü#")
OUT = shlex.join(["--out", *HOSTILE])
IMAGE = "registry.example/team/shardwise:1"
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}


def fields(*needed: str, **known: Any) -> dict[str, Any]:
    """Of a JSON schema: an object with these fields and no others."""
    return {
        "type": "object",
        "properties": known,
        "required": list(needed or known),
        "additionalProperties": False,
    }


METADATA = fields(name=NAME)
MOUNT = fields("name", "mountPath", name=NAME, mountPath={"type": "string", "pattern": "^/"},
               readOnly={"type": "boolean"})  # fmt: skip
VOLUME = fields(
    "name",
    name=NAME,
    hostPath=fields(path={"type": "string", "pattern": "^/"}),
    persistentVolumeClaim=fields(claimName=NAME),
    emptyDir=fields(medium={"const": "Memory"}),
    configMap=fields(name=NAME),
) | {"minProperties": 2, "maxProperties": 2}
CONTAINER = fields(
    "name", "image", "command", "args",
    name=NAME, image={"type": "string", "minLength": 1}, command=TEXTS, args=TEXTS,
    volumeMounts={"type": "array", "items": MOUNT},
    resources=fields(limits={"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}}),
)  # fmt: skip
POD = fields(
    subdomain=NAME,
    restartPolicy={"enum": ["Never", "OnFailure"]},
    terminationGracePeriodSeconds={"type": "integer", "minimum": 0},
    containers={"type": "array", "items": CONTAINER, "minItems": 1},
    volumes={"type": "array", "items": VOLUME},
)
COUNT = {"type": "integer", "minimum": 1}
SCHEMAS = {
    "Job": fields(
        apiVersion={"const": "batch/v1"},
        kind={"const": "Job"},
        metadata=METADATA,
        spec=fields(
            completionMode={"const": "Indexed"},
            completions=COUNT,
            parallelism=COUNT,
            backoffLimit={"type": "integer", "minimum": 0},
            activeDeadlineSeconds=COUNT,
            template=fields(spec=POD),
        ),
    ),
    "Service": fields(
        apiVersion={"const": "v1"},
        kind={"const": "Service"},
        metadata=METADATA,
        spec=fields(
            clusterIP={"const": "None"},
            publishNotReadyAddresses={"const": True},
            selector={"type": "object", "additionalProperties": {"type": "string"}},
            ports={"type": "array", "items": fields(name=NAME, port=COUNT | {"maximum": 65535})},
        ),
    ),
    "ConfigMap": fields(
        apiVersion={"const": "v1"},
        kind={"const": "ConfigMap"},
        metadata=METADATA,
        data={
            "type": "object",
            "propertyNames": {"pattern": "^[-._a-zA-Z0-9]+$"},
            "additionalProperties": {"type": "string"},
        },
    ),
}
"""What of apps the API's own schemas ask, for the fields that a manifest of ours has.
Source: kubernetes.io/docs/reference/kubernetes-api."""


def made(target: str, given: dict[str, Any] | None = None, config: str | None = None, **own: Any) -> Launcher:
    keys = {"model": "llama3-8b", "mesh": "fsdp=8,tp=2", **(given or {})}
    if target == "kubernetes":
        own.setdefault("image", IMAGE)
    options = LauncherOptions(target=target, **{"add": "--out run", **own})
    return launcher(Case.of(**keys), options, given=set(keys), config=config)


def text_of(answer: Launcher) -> str:
    (file,) = answer.files
    return file.text


def manifest(answer: Launcher) -> dict[str, Any]:
    """Its documents by kind, each as its schema asks."""
    found = {each["kind"]: each for each in yaml.safe_load_all(text_of(answer))}
    for kind, document in found.items():
        jsonschema.Draft202012Validator(SCHEMAS[kind]).validate(document)
    return found


def container(answer: Launcher) -> dict[str, Any]:
    (one,) = manifest(answer)["Job"]["spec"]["template"]["spec"]["containers"]
    assert isinstance(one, dict)
    return one


def run_with_fakes(script: str, folder: Path) -> list[str]:
    """The script, with programs of the hosts that say what they are given; torchrun's words."""
    fake = '#!/usr/bin/env bash\nwhile [ "${1:-}" != torchrun ]; do shift; done\nexec "$@"\n'
    programs = {
        "srun": fake,
        "timeout": fake,
        "scontrol": "#!/usr/bin/env bash\necho node-1; echo node-2\n",
        "torchrun": "#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n",
    }
    for name, program in programs.items():
        (folder / name).write_text(program)
        (folder / name).chmod(0o755)
    (folder / "script").write_text(script)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n"}
    done = subprocess.run(
        ["bash", "script", "node-1"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert not (folder / "owned").exists()
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("target", ["torchrun", "slurm"])
def test_a_script_is_one_that_bash_and_shellcheck_take(target: str, tmp_path: Path) -> None:
    answer = made(target, add=OUT, image="a b.sqsh", mount=("/my data:/data",), partition="gpu", hours=1.5)
    path = tmp_path / "script.sh"
    path.write_text(text_of(answer))
    assert subprocess.run(["bash", "-n", str(path)], timeout=60, check=False).returncode == 0
    if (program := shutil.which("shellcheck")) is not None:
        done = subprocess.run([program, str(path)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", ["torchrun", "slurm"])
def test_hostile_words_reach_torchrun_as_they_were_given(target: str, tmp_path: Path) -> None:
    answer = made(target, {"model": "hf:my model; touch owned"}, add=OUT, name="mine")
    words = run_with_fakes(text_of(answer), tmp_path)
    begin = words.index("-m")
    assert words[begin:] == [
        "-m", "shardwise", "train", "--model", "hf:my model; touch owned", "--mesh", "fsdp=8,tp=2",
        "--out", *HOSTILE,
    ]  # fmt: skip
    run_id = {"torchrun": "mine", "slurm": "77"}[target]
    assert words[:begin] == [
        "--nnodes=2", "--nproc-per-node=8", "--max-restarts=3", "--rdzv-backend=c10d",
        "--rdzv-endpoint=node-1:29400", f"--rdzv-id={run_id}",
    ]  # fmt: skip


def test_a_manifest_is_what_kubernetes_asks_of_one_and_expands_no_word() -> None:
    answer = made("kubernetes", add=OUT, mount=("/data:/data", "runs:/runs"), name="mine")
    one = container(answer)
    assert one["command"] == ["torchrun"]
    # Kubernetes takes $$( for $(
    assert [word.replace("$$(", "$(") for word in one["args"][-len(HOSTILE) :]] == list(HOSTILE)
    assert "$$(touch owned)" in one["args"]
    assert "--rdzv-endpoint=mine-0.mine:29400" in one["args"]
    assert one["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    pod = manifest(answer)["Job"]["spec"]["template"]["spec"]
    assert {"name": "mount-0", "hostPath": {"path": "/data"}} in pod["volumes"]
    assert {"name": "mount-1", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]
    assert {each["name"] for each in one["volumeMounts"]} == {each["name"] for each in pod["volumes"]}


def test_a_pod_has_the_case_file_and_the_plans_that_lie_here(tmp_path: Path) -> None:
    plan, config = tmp_path / "plan-1.toml", tmp_path / "case-1.toml"
    plan.write_text('name = "ü: {# \u2028 no"\n')
    config.write_text('true\n\t\'"yes"\n')
    machine = tmp_path / "mine.toml"
    machine.write_text("name = 1\n")
    answer = made("kubernetes", {"plans": [str(plan)], "machine": str(machine)}, str(config))
    assert manifest(answer)["ConfigMap"]["data"] == {
        "plan-1.toml": plan.read_text(),
        "case-1.toml": config.read_text(),
        "mine.toml": machine.read_text(),
    }
    words = container(answer)["args"]
    assert words[words.index("train") + 1] == "/etc/shardwise/plan-1.toml"
    assert words[words.index("--config") + 1] == "/etc/shardwise/case-1.toml"
    assert words[words.index("--machine") + 1] == "/etc/shardwise/mine.toml"
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / "plan-1.toml"
    other.write_text("")
    with pytest.raises(OptionError, match="two files of one name"):
        made("kubernetes", {"plans": [str(plan), str(other)]})


@pytest.mark.parametrize("target", ["torchrun", "slurm", "kubernetes"])
def test_each_file_begins_with_the_command_that_makes_it_again(target: str, tmp_path: Path) -> None:
    asked = ["launcher", "--model", "llama3-8b?n_layers=2", "--mesh", "tp=4", "--device", "cpu", "--for"]
    asked += [target, "--command", "verify", "--hosts", "2", "--hours", "0.5", "--image", "it"]
    first = shardwise(*asked)
    assert first.returncode == 0, first.stderr
    said = re.search(r"^# Made by: shardwise (.*)$", first.stdout, re.MULTILINE)
    assert said is not None
    assert first.stdout.splitlines().index(said[0]) == (0 if target == "kubernetes" else 1)
    assert shardwise(*shlex.split(said[1])).stdout == first.stdout
    assert "gpu" not in first.stdout
    for _ in range(2):  # what is ours is written over
        written = shardwise(*asked, "--out", str(tmp_path))
        assert written.returncode == 0, written.stderr
        assert "2 hosts of 2 ranks" in written.stdout
    (file,) = tmp_path.iterdir()
    assert file.read_text().splitlines()[2:] == first.stdout.splitlines()[2:]
    file.write_text("mine")
    assert "hasn't made it" in shardwise(*asked, "--out", str(tmp_path)).stderr
    assert file.read_text() == "mine"


def test_what_a_case_file_asks_is_in_the_command_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'model = "llama3-8b"\nmesh = "tp=8"\nseq = 512\n[launcher]\nhours = 2.0\ntarget = "slurm"\n'
    )
    ended = shardwise("launcher", "--config", "mine.toml", "--seq", "1024", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "--time=2:00:00" in ended.stdout
    assert "--seq 1024" in ended.stdout
    assert "--config mine.toml" in ended.stdout


REFUSED = [
    ({"hosts": 3}, "--mesh fsdp=8,tp=2: has 16 ranks, and 3 hosts of 5 have 15. Use --hosts and --gpus"),
    ({"gpus": 5}, "and 4 hosts of 5 have 20"),
    ({"add": "'"}, '--add is "\'": No closing quotation. Quote it as in a shell.'),
    ({"add": "--out 'a\nb'"}, "has characters that don't print"),
    ({"image": "a\u2028b"}, "has characters that don't print"),
    ({"name": "A; rm"}, '--name is "A; rm". Use at most 50 small letters'),
    ({"partition": "a b"}, '--partition is "a b". Use letters'),
    ({"mount": ("a",)}, '--mount is "a". Write WHAT:PATH'),
    ({"mount": ("/a,b:/c",)}, "Write WHAT:PATH"),
    ({"mount": ("No:/c",)}, "neither an absolute path nor the name of a claim"),
    ({"port": 70000}, "--port is 70000. Use 1 to 65535."),
    ({"hours": float("inf")}, "--hours is inf"),
    ({"target": "slurn"}, '--for is "slurn". Did you mean "slurm"?'),
]


@pytest.mark.parametrize(("own", "said"), REFUSED)
def test_what_can_not_be_is_one_line(own: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)) as caught:
        made(**{"target": "slurm", **own})
    assert "\n" not in str(caught.value)


def test_kubernetes_needs_an_image_and_a_command_its_own_options() -> None:
    case = Case.of(model="llama3-8b", mesh="tp=8")
    with pytest.raises(OptionError, match="needs a container with Shardwise in it"):
        launcher(case, LauncherOptions(target="kubernetes", add="--out=x"), given={"mesh"})
    with pytest.raises(OptionError, match="no mesh is named"):
        launcher(case, LauncherOptions(command="verify"), given={"model"})
    with pytest.raises(OptionError, match="train needs a folder for its checkpoints, which all hosts see"):
        launcher(case, LauncherOptions(add="--steps 3"), given={"mesh"})
    ended = shardwise("launcher", "--mesh", "tp=8", "--command", "verify", "--learning-rate", "1")
    assert ended.returncode == 2
    assert "--learning-rate: verify has no such option." in ended.stderr
