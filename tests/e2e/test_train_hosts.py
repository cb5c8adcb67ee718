"""`shardwise train` on two hosts whose link goes down in mid-run and comes up again."""

import re
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from shardwise.files.step_log import read_steps
from tests.e2e.command import PATIENCE_S, shardwise, wait_until
from tests.e2e.two_hosts import Host, TwoHosts, two_hosts, why_not
from tests.matrix import FULL

MODEL = "llama3-debug?n_layers=2,hidden=32,n_heads=4,n_kv_heads=2,ffn_hidden=64,vocab_size=512"
STEPS, DOWN_AT, STARTS = 60, 25, 6
ASKED = (
    *("train", "--model", MODEL, "--mesh", "fsdp=2,tp=2", "--device", "cpu", "--random-ids", "--no-verify"),
    *("--learning-rate", "0.003", "--batch", "8", "--seq", "16", "--held-out", "8"),
    *("--steps", str(STEPS), "--save-every", "10", "--validate-every", "20", "--timeout", "10"),
)


def learnt(out: Path) -> list[tuple[object, ...]]:
    """All of a run's lines but for times and memory; and every tensor of its last checkpoint."""
    lines: list[tuple[object, ...]] = [
        (each.step, each.position, each.loss, each.gradient_norm, each.validation_loss)
        for each in read_steps(out)
    ]
    files = sorted((out / "checkpoints" / f"step-{STEPS}").glob("*.safetensors"))
    assert files
    return lines + [
        (file.name, name, value.tobytes())
        for file in files
        for name, value in sorted(load_file(file).items())
    ]


def steps_done(out: Path) -> int:
    records = read_steps(out)
    return records[-1].step if records else 0


def started_again_until_done(made: TwoHosts, out: Path) -> None:
    """As a supervisor does: a torchrun that gave up is started again, to go on."""
    deadline_s = time.monotonic() + 3 * PATIENCE_S
    while any(host.returncode != 0 for host in made.hosts):
        assert time.monotonic() < deadline_s, [host.said()[-3000:] for host in made.hosts]
        for host in made.hosts:
            if host.returncode:
                assert host.starts < STARTS, host.said()[-3000:]
                host.start((*ASKED, "--out", str(out), "--resume"), made.hosts[0].address, 2)
        time.sleep(0.2)


def last_words(host: Host) -> list[str]:
    """Of ranks that hung or lost a connection, and say so: rank, step, what they were in, and the host."""
    lines = re.findall(rf'rank \d (?:hung|failed): .*"step \d+: [^"]* on {host.name}"', host.said())
    return [line for line in lines if ", in " in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("train") / "undisturbed"
    assert shardwise(*ASKED, "--out", str(out)).returncode == 0
    return out


def begin(made: TwoHosts, out: Path) -> None:
    """Starts the run on both, and returns in its middle."""
    for host in made.hosts:
        host.start((*ASKED, "--out", str(out)), made.hosts[0].address, 2)
    wait_until(lambda: steps_done(out) >= DOWN_AT or any(host.returncode for host in made.hosts))
    assert not any(host.returncode for host in made.hosts), [host.said() for host in made.hosts]


@FULL
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs")
def test_hosts_that_lose_each_other_say_where_they_were_and_go_on_as_if_nothing_had_been(
    whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with two_hosts(tmp_path) as made:
        begin(made, out)
        ranks = [rank for host in made.hosts for rank in host.ranks()]
        assert len(ranks) == 4
        made.set_link("down")
        wait_until(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks))
        stopped_at = steps_done(out)
        for host in made.hosts:
            assert last_words(host), host.said()
        made.set_link("up")
        started_again_until_done(made, out)
    assert DOWN_AT <= stopped_at < STEPS
    assert learnt(out) == learnt(whole)


@FULL
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs")
def test_a_host_that_is_lost_and_replaced_costs_no_bit(whole: Path, tmp_path: Path) -> None:
    """torchrun on the other host goes on or, where it met the dead one once more, gives up after a while."""
    out = tmp_path / "run"
    with two_hosts(tmp_path) as made:
        begin(made, out)
        made.hosts[1].kill()
        started_again_until_done(made, out)
        assert made.hosts[1].starts >= 2
    assert learnt(out) == learnt(whole)
