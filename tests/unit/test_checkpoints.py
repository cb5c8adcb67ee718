"""Checkpoints of one process: what is found, passed over and refused, with a line that says why; and what a
save that fails, or a death in the middle of one, leaves."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shardwise.core.errors import CheckpointError
from shardwise.core.training import Saved
from shardwise.train.checkpoints import Checkpoints, Found, find
from shardwise.train.checkpoints.places import fits, positions_in, runs_of


def model_of(width: int = 8, seed: int = 0, **more: nn.Module) -> nn.Module:
    torch.manual_seed(seed)
    layers = {"up": nn.Linear(width, 2 * width), "norm": nn.BatchNorm1d(2 * width), **more}
    return nn.ModuleDict(layers)


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def saved(step: int) -> Saved:
    return Saved(step, 4 * step, "tokens", {"model": "tiny"}, {"torch": "2"}, 100, 1)


def save(folder: Path, *steps: int, keep: int = 9) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The last step's state."""
    checkpoints, model = Checkpoints(folder, keep=keep), model_of()
    for step in steps:
        optimizer = trained(model)
        checkpoints.save(step, model, optimizer, saved(step), wait=True)
    assert checkpoints.lines() == ()
    return model, optimizer


def content_changed(step: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that says something else, with the digest that goes with it."""
    content = json.loads((step / "manifest.json").read_text())["content"]
    change(content)
    text = json.dumps(content, separators=(",", ":"))
    digest = sha256(text.encode()).hexdigest()
    (step / "manifest.json").write_text(f'{{"sha256":"{digest}","content":{text}}}')


def index_changed(step: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """An index that says something else, with the size and digest that go with it."""
    index = json.loads((step / "index.json").read_text())
    change(index)
    text = json.dumps(index)
    (step / "index.json").write_text(text)

    def told(content: dict[str, Any]) -> None:
        content["files"][0] |= {"size": len(text), "sha256": sha256(text.encode()).hexdigest()}

    content_changed(step, told)


def restored(folder: Path, model: nn.Module | None = None) -> Found:
    """The newest, restored into a model."""
    checkpoints, model = Checkpoints(folder), model or model_of(seed=5)
    found = checkpoints.newest()
    checkpoints.restore(found, model, torch.optim.AdamW(model.parameters()))
    return found


def test_what_was_saved_comes_back_bit_for_bit_with_the_optimizer_and_random_state(tmp_path: Path) -> None:
    model, optimizer = save(tmp_path, 3)
    after = torch.rand(4)
    other = model_of(seed=1)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(checkpoints.newest(), other, other_optimizer) == saved(3)
    assert torch.equal(torch.rand(4), after)
    for (name, value), there in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, there), name
    for parameter, there in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, other_optimizer.state[there][key]), key
    for each in (*model.parameters(), *other.parameters()):
        each.grad = torch.ones_like(each)
    optimizer.step()
    other_optimizer.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_an_optimizer_that_has_made_no_step_has_no_state_afterwards(tmp_path: Path) -> None:
    model = model_of()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, model, torch.optim.AdamW(model.parameters()), saved(0), wait=True)
    optimizer = trained(model)
    checkpoints.restore(checkpoints.newest(), model, optimizer)
    assert not optimizer.state


def test_training_goes_on_while_a_save_is_written_and_the_copy_stays_as_it_was(tmp_path: Path) -> None:
    model = model_of(width=256)
    before = [each.detach().clone() for each in model.parameters()]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, torch.optim.AdamW(model.parameters()), saved(1))
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
    outcome = checkpoints.finish()
    assert outcome is not None
    assert outcome.published
    checkpoints.restore(checkpoints.newest(), model, torch.optim.AdamW(model.parameters()))
    assert all(map(torch.equal, model.parameters(), before))


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 10, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-3"]


def test_the_last_whole_one_is_kept_whatever_is_newer(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step-2" / "rank-0.safetensors").write_bytes(b"short")
    (tmp_path / "step-9").mkdir()
    checkpoints, model = Checkpoints(tmp_path, keep=1), model_of()
    checkpoints.save(1, model, trained(model), saved(1), wait=True)
    assert find(tmp_path).path == tmp_path / "step-1"


def test_a_step_that_is_saved_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    save(tmp_path, 2)
    model, _ = save(tmp_path, 1, 2)
    other = model_of(seed=4)
    restored(tmp_path, other)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def _half_written(step: Path) -> None:
    step.rename(step.with_name("step-2.partial"))


def _without_manifest(step: Path) -> None:
    (step / "manifest.json").unlink()


def _of_dcp(step: Path) -> None:
    for path in step.iterdir():
        path.unlink()
    (step / ".metadata").write_bytes(b"\x80\x04cposix\nsystem\n.")


def _truncated(step: Path) -> None:
    data = (step / "rank-0.safetensors").read_bytes()
    (step / "rank-0.safetensors").write_bytes(data[:1000])


def _longer(step: Path) -> None:
    with (step / "index.json").open("a") as file:
        file.write(" ")


def _without_file(step: Path) -> None:
    (step / "rank-0.safetensors").unlink()


def _changed(step: Path) -> None:
    data = bytearray((step / "rank-0.safetensors").read_bytes())
    data[-3] ^= 1
    (step / "rank-0.safetensors").write_bytes(data)


def _linked(step: Path) -> None:
    (step / "rank-0.safetensors").rename(step.parent / "elsewhere")
    (step / "rank-0.safetensors").symlink_to(step.parent / "elsewhere")


def _renamed(step: Path) -> None:
    step.rename(step.with_name("step-7"))


def _other_version(step: Path) -> None:
    content_changed(step, lambda content: content.update(version=2))


def _escapes(step: Path) -> None:
    content_changed(step, lambda content: content["files"][1].update(name="../../etc/passwd"))


def _negative(step: Path) -> None:
    content_changed(step, lambda content: content["saved"].update(position=-1))


def _stale_digest(step: Path) -> None:
    text = (step / "manifest.json").read_text()
    (step / "manifest.json").write_text(text.replace('"position":8', '"position":9'))


def _never_ends(step: Path) -> None:
    (step / "manifest.json").unlink()
    os.mkfifo(step / "manifest.json")


def _no_json(step: Path) -> None:
    (step / "manifest.json").write_text("[" * 100_000)


FAULTS: dict[Callable[[Path], None], str] = {
    _half_written: "step-2.partial: half-written: it was never published.",
    _without_manifest: "step-2: has no manifest.json: nothing that Shardwise published.",
    _of_dcp: "step-2: has no manifest.json: nothing that Shardwise published.",
    _truncated: "step-2: rank-0.safetensors was truncated: 1,000 bytes, SIZE were written.",
    _longer: "step-2: index.json was changed: MORE bytes, LESS were written.",
    _without_file: "step-2: rank-0.safetensors is missing.",
    _changed: "step-2: rank-0.safetensors was changed: its bytes aren't those that were written.",
    _linked: "step-2: rank-0.safetensors is no plain file.",
    _renamed: "step-7: says that it is of step 2.",
    _other_version: 'step-2: is of format "shardwise checkpoint" version 2; this Shardwise reads '
    '"shardwise checkpoint" version 1.',
    _escapes: 'step-2: manifest.json lists the name "../../etc/passwd".',
    _negative: "step-2: manifest.json can't be read: checkpoint: position is -1. It can't be below 0.",
    _stale_digest: "step-2: manifest.json isn't what was written: its digest is another one.",
    _never_ends: "step-2: manifest.json is no plain file.",
    _no_json: "step-2: manifest.json can't be read: ",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_what_isn_t_whole_is_named_and_passed_over(fault: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    size = (tmp_path / "step-2" / "rank-0.safetensors").stat().st_size
    less = (tmp_path / "step-2" / "index.json").stat().st_size
    fault(tmp_path / "step-2")
    expected = (
        FAULTS[fault]
        .replace("SIZE", f"{size:,}")
        .replace("MORE", f"{less + 1:,}")
        .replace("LESS", f"{less:,}")
    )
    for found in (find(tmp_path), Checkpoints(tmp_path).newest()):
        assert found.path == tmp_path / "step-1"
        (line,) = found.passed_over
        assert line.startswith(expected) if expected.endswith(" ") else line == expected
        assert "\n" not in line
        assert len(line) < 250


def test_a_file_that_ends_or_differs_at_any_byte_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    generator = random.Random(0)
    files = sorted((tmp_path / "step-2").iterdir())
    for trial in range(100):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        at = generator.randrange(len(whole))
        path.write_bytes(whole[:at] if trial % 2 else whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        found = find(tmp_path)
        assert found.path == tmp_path / "step-1", (path, at)
        assert len(found.passed_over) == 1
        path.write_bytes(whole)
    assert find(tmp_path).path == tmp_path / "step-2"


def _one_part(shape: list[int]) -> dict[str, Any]:
    return {"shape": shape, "parts": [{"file": 0, "place": [[[0, size, 1]] for size in shape]}]}


def _other_shape(index: dict[str, Any]) -> None:
    index["model/up.weight"] |= _one_part([8, 16])


def _other_dtype(index: dict[str, Any]) -> None:
    index["model/up.weight"]["dtype"] = "I64"


def _no_such_dtype(index: dict[str, Any]) -> None:
    index["model/up.weight"]["dtype"] = "__import__"


def _too_little(index: dict[str, Any]) -> None:
    index["model/up.weight"]["parts"][0]["place"][0] = [[0, 15, 1]]


def _outside(index: dict[str, Any]) -> None:
    index["model/up.weight"]["parts"][0]["place"][0] = [[1, 16, 1]]


def _huge(index: dict[str, Any]) -> None:
    index["model/up.weight"]["shape"] = [2**70, 8]


def _twice(index: dict[str, Any]) -> None:
    index["model/up.weight"]["parts"][0]["place"][0] = [[0, 8, 1], [0, 8, 1]]


def _other_file(index: dict[str, Any]) -> None:
    index["model/up.weight"]["parts"][0]["file"] = 4


def _exchanged(index: dict[str, Any]) -> None:
    index["model/up.bias"], index["model/norm.weight"] = (
        index["model/norm.weight"] | _one_part([4, 4]),
        index["model/up.bias"],
    )


def _gone(index: dict[str, Any]) -> None:
    del index["model/norm.running_mean"]


def _more(index: dict[str, Any]) -> None:
    index["model/down.weight"] = index["model/up.weight"]


def _moment(index: dict[str, Any]) -> None:
    name = "optimizer/up.weight/exp_avg"
    index[name] |= _one_part([128])


LIES: dict[Callable[[dict[str, Any]], None], str] = {
    _other_shape: "is of another model: model/up.weight is [8, 16] in it, here [16, 8]. Use",
    _other_dtype: "is of another model: model/up.weight is torch.int64 in it, here torch.float32. Use",
    _no_such_dtype: 'index.json: model/up.weight has the dtype "__import__", which is none.',
    _too_little: "index.json: the parts of model/up.weight don't make up a tensor [16, 8].",
    _outside: "index.json: the parts of model/up.weight don't make up a tensor [16, 8].",
    _huge: "index.json: the parts of model/up.weight don't make up a tensor [1180591620717411303424, 8].",
    _twice: "model/up.weight",
    _other_file: "index.json: the parts of model/up.weight don't make up a tensor [16, 8].",
    _exchanged: "is of another model: model/up.bias is [4, 4] in it, here [16]. Use",
    _gone: "is of another model: it has no model/norm.running_mean. Use",
    _more: "is of another model: the model has no model/down.weight. Use",
    _moment: "step-2: optimizer/up.weight/exp_avg is [128] and up.weight is [16, 8]. Use the optimizer",
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__.strip("_"))
def test_an_index_that_lies_is_refused_in_a_line(
    lie: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    save(tmp_path, 2)
    index_changed(tmp_path / "step-2", lie)
    with pytest.raises(CheckpointError) as refused:
        restored(tmp_path)
    assert LIES[lie] in str(refused.value)
    assert str(refused.value).startswith(f"checkpoint {tmp_path / 'step-2'}: ")
    assert "\n" not in str(refused.value)


def test_a_checkpoint_of_another_model_is_refused_with_the_names_that_differ(tmp_path: Path) -> None:
    save(tmp_path, 2)
    other = model_of(down=nn.Linear(4, 4))
    before = [each.detach().clone() for each in other.parameters()]
    with pytest.raises(CheckpointError) as refused:
        restored(tmp_path, other)
    assert str(refused.value) == (
        f"checkpoint {tmp_path / 'step-2'}: is of another model: it has no model/down.weight; it has no "
        "model/down.bias. Use the model that it was made with."
    )
    assert all(map(torch.equal, other.parameters(), before))


def test_a_checkpoint_that_nobody_looked_at_is_looked_at_before_it_is_read(tmp_path: Path) -> None:
    save(tmp_path, 2)
    found, model = find(tmp_path, full=False), model_of()
    _changed(tmp_path / "step-2")
    with pytest.raises(CheckpointError, match="was changed"):
        Checkpoints(tmp_path).restore(found, model, torch.optim.AdamW(model.parameters()))


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    model = model_of()
    optimizer = trained(model)
    optimizer.state[model.get_parameter("up.bias")]["closure"] = print
    with pytest.raises(CheckpointError, match=r"keeps a builtin_function_or_method as closure of up\.bias"):
        Checkpoints(tmp_path).save(1, model, optimizer, saved(1))
    assert not list(tmp_path.iterdir())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_can_t_be_written_leaves_the_earlier_one_and_the_next_one_works(tmp_path: Path) -> None:
    checkpoints, model = Checkpoints(tmp_path), model_of(width=64)
    optimizer = trained(model)
    checkpoints.save(1, model, optimizer, saved(1), wait=True)
    with files_of_at_most(100_000):
        checkpoints.save(2, model, optimizer, saved(2))
        outcome = checkpoints.finish()
    assert outcome is not None
    assert not outcome.published
    assert checkpoints.lines() == (
        f"The checkpoint of step 2 wasn't saved: rank 0 can't write "
        f"{tmp_path / 'step-2.partial'}: File too large. Earlier ones stay.",
    )
    assert checkpoints.newest().path == tmp_path / "step-1"
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    checkpoints.save(3, model, optimizer, saved(3), wait=True)
    assert checkpoints.lines() == ()
    assert checkpoints.newest().path == tmp_path / "step-3"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_the_next_save_works(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    checkpoints, model = Checkpoints(folder), model_of(width=64)
    optimizer = trained(model)
    checkpoints.save(1, model, optimizer, saved(1), wait=True)
    (small_disk / "other").write_bytes(bytes(850_000))
    checkpoints.save(2, model, optimizer, saved(2), wait=True)
    assert checkpoints.lines() == (
        f"The checkpoint of step 2 wasn't saved: rank 0 can't write {folder / 'step-2.partial'}: No space "
        "left on device. Earlier ones stay.",
    )
    assert checkpoints.newest().path == folder / "step-1"
    (small_disk / "other").unlink()
    checkpoints.save(3, model, optimizer, saved(3), wait=True)
    assert checkpoints.newest().path == folder / "step-3"


def test_a_folder_that_can_t_be_made_is_told_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints, model = Checkpoints(tmp_path / "file" / "checkpoints"), model_of()
    checkpoints.save(1, model, trained(model), saved(1), wait=True)
    (line,) = checkpoints.lines()
    assert line == (
        f"The checkpoint of step 1 wasn't saved: can't write {tmp_path / 'file' / 'checkpoints'}: "
        "Not a directory. Earlier ones stay."
    )


# each child saves without end, and is killed at a moment of its own
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
sys.path[:0] = [{root!r}]
from shardwise.train.checkpoints import find
from tests.unit.test_checkpoints import Checkpoints, model_of, saved, trained
folder, generator = Path(sys.argv[1]), random.Random(3)
for _ in range(20):
    child = os.fork()
    if not child:
        model = model_of(width=64)
        optimizer, checkpoints = trained(model), Checkpoints(folder, keep=2)
        found = checkpoints.newest()
        step = 0 if found.saved is None else found.saved.step
        if found.path is not None:
            checkpoints.restore(found, model, optimizer)
        while True:
            step += 1
            checkpoints.save(step, model, optimizer, saved(step), wait=True)
            assert not checkpoints.lines()
    before, until = set(map(str, folder.glob("step-*[0-9]"))), time.monotonic() + 60
    while set(map(str, folder.glob("step-*[0-9]"))) <= before and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.03 * generator.random())
    ended, _ = os.waitpid(child, os.WNOHANG)
    assert not ended, "the child ended by itself"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = find(folder)
    print(found.saved.step if found.saved else 0, *found.passed_over, sep="|")
"""


def test_a_process_that_dies_in_a_save_leaves_the_newest_whole_one(tmp_path: Path) -> None:
    script = KILLED.format(root=str(Path(__file__).parents[2]))
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line.split("|") for line in ran.stdout.splitlines()]
    steps = [int(step) for step, *_ in lines]
    assert len(steps) == 20
    # each went on from what the one before left, and had published one more when it died
    assert all(before < after for before, after in zip([0, *steps], steps, strict=False))
    told = [each for _, *passed_over in lines for each in passed_over]
    assert all("half-written" in each or "half-removed" in each for each in told), told


@given(st.lists(st.integers(0, 30), unique=True).map(sorted))
def test_positions_are_the_same_as_runs(positions: list[int]) -> None:
    runs = runs_of(np.array(positions, dtype=np.int64))
    assert list(positions_in(runs)) == positions
    assert fits((runs,), (31,)) == bool(all(count > 0 for _, count, _ in runs))


def test_a_row_dealt_to_every_fourth_rank_is_one_run() -> None:
    assert runs_of(np.arange(1, 61, 4)) == ((1, 15, 4),)
    assert runs_of(np.array([0, 1, 2, 8, 9, 10])) == ((0, 3, 1), (8, 3, 1))
