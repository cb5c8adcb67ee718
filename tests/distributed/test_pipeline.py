"""A pipeline's stages train what one process trains: loss, every gradient, two steps, in float64."""

from functools import cache

import msgspec
import psutil
import pytest

from shardwise.core.errors import RunError
from shardwise.launch import run_ranks
from tests.distributed.pipeline_workers import Found, Trial
from tests.matrix import FULL, thinned

LLAMA = "llama3-debug?vocab_size=96,hidden=32,n_layers=5,n_heads=4,n_kv_heads=2,ffn_hidden=48"
TIED = f"{LLAMA},tied=true"
GPT = "gpt-debug?vocab_size=96,hidden=32,n_layers=5,n_heads=4"
HF_LLAMA = (
    "hf:llama?vocab_size=96,hidden_size=32,num_hidden_layers=5,num_attention_heads=4,num_key_value_heads=2,"
    "intermediate_size=48"
)
HF_GPT2 = "hf:gpt2?vocab_size=96,n_embd=32,n_layer=5,n_head=4,n_positions=64"
MOE = "moe-debug?vocab_size=96,hidden=32,n_layers=5,n_heads=4,n_kv_heads=2,ffn_hidden=48"
# in `make test`: each kind of model, schedule and axis once; stages beside dp: test_train_axes.py, experts'
# and tp: test_meshes.py
ON_TWO = (
    Trial(LLAMA, "pp=2", stages="1,4", recompute="full", recompute_layers=2, micro_batches=3),
    Trial(TIED, "pp=2", chunks=2),
    Trial(TIED, "pp=2", schedule="gpipe"),
    Trial(GPT, "pp=2"),
    Trial(HF_LLAMA, "pp=2", chunks=2),
)
OTHERS_ON_TWO = (
    Trial(LLAMA, "pp=2"),
    Trial(LLAMA, "pp=2", schedule="gpipe"),
    Trial(GPT, "pp=2", chunks=2, recompute="full"),
    Trial(HF_GPT2, "pp=2"),
)
ON_FOUR = (
    Trial(TIED, "pp=4"),
    Trial(TIED, "pp=2,fsdp=2", chunks=2, reduce_once=True),
    Trial(HF_LLAMA, "pp=2,cp=2", chunks=2, recompute="full"),
)
OTHERS_ON_FOUR = (
    Trial(LLAMA, "pp=2,tp=2", "rowwise", chunks=2),
    Trial(LLAMA, "pp=2,fsdp=2", schedule="gpipe", recompute="full"),
    Trial(TIED, "pp=2,dp=2"),
    Trial(MOE, "pp=2,ep=2", "rowwise"),
    Trial(TIED, "pp=2,tp=2", "rowwise"),
    Trial(TIED, "pp=2,tp=2", "colwise", schedule="gpipe"),
    Trial(LLAMA, "pp=2,tp=2", "rowwise@dtensor"),
    Trial(GPT, "pp=2,tp=2", "rowwise"),
    Trial(TIED, "pp=2,fsdp=2", chunks=2),
    Trial(TIED, "pp=2,fsdp=2", reduce_once=True),
    Trial(LLAMA, "pp=2,cp=2"),
    Trial(MOE, "pp=2,tp=2", "rowwise", chunks=2),
)
LAUNCHES = ((ON_TWO, 2), (ON_FOUR, 4), (OTHERS_ON_TWO, 2), (OTHERS_ON_FOUR, 4))
TELLING = {*ON_TWO, *ON_FOUR}
FAULTY = (
    Trial(TIED, "pp=2", fault="tied not summed"),
    Trial(TIED, "pp=2", fault="tied counted twice"),
    Trial(LLAMA, "pp=2", fault="loss of each micro-batch"),
    Trial(LLAMA, "pp=2", fault="layer twice"),
)


@cache
def found(trials: tuple[Trial, ...], ranks: int) -> list[list[Found]]:
    """Of each trial, on all ranks."""
    answers = run_ranks(
        "tests.distributed.pipeline_workers:trials",
        msgspec.msgpack.encode(trials),
        world_size=ranks,
        device_type="cpu",
        timeout_s=200,
    )
    decoded = [msgspec.msgpack.decode(answer, type=list[Found]) for answer in answers]
    return [[of_rank[index] for of_rank in decoded] for index in range(len(trials))]


def named(trial: Trial) -> str:
    words = (trial.model.partition("?")[0], trial.mesh, trial.plan, trial.schedule, f"chunks={trial.chunks}")
    return " ".join((*words, "tied" if "tied" in trial.model else "", trial.fault))


@pytest.mark.parametrize(
    "trial",
    thinned([trial for trials, _ in LAUNCHES for trial in trials], lambda trial: trial in TELLING),
    ids=named,
)
def test_stages_train_what_one_process_trains(trial: Trial) -> None:
    trials, ranks = next(launch for launch in LAUNCHES if trial in launch[0])
    for each in found(trials, ranks)[trials.index(trial)]:
        assert max(each.loss, each.gradients, each.norms, each.after) < 1e-10


def test_every_parameter_is_on_one_stage_and_a_tied_one_on_both_ends() -> None:
    first, last = (each.held for each in found(ON_TWO, 2)[ON_TWO.index(Trial(GPT, "pp=2"))])
    assert set(first) & set(last) == {"tok_embeddings.weight"}
    assert {name.split(".")[1] for name in first if name.startswith("layers")} == {"0", "1", "2"}
    assert {name.split(".")[1] for name in last if name.startswith("layers")} == {"3", "4"}
    assert "pos_embeddings.weight" in first
    assert "norm.weight" in last


@pytest.mark.parametrize("trial", FAULTY, ids=named)
def test_a_planted_fault_is_seen(trial: Trial) -> None:
    worst = found(FAULTY, 2)[FAULTY.index(trial)]
    assert max(max(each.gradients, each.norms) for each in worst) > 1e-3


def test_a_tied_head_that_is_not_summed_shows_in_its_gradient_alone() -> None:
    first, last = found(FAULTY, 2)[0]
    assert first.loss < 1e-12
    assert min(first.gradients, last.gradients) > 1e-3


@pytest.mark.parametrize(
    ("rank", "phase"),
    [
        (1, "forward"),
        (2, "loss"),
        pytest.param(0, "backward", marks=FULL),
        pytest.param(1, "backward", marks=FULL),
        pytest.param(2, "reduce", marks=FULL),
    ],
)
def test_a_stage_that_dies_is_named_and_the_others_are_stopped(rank: int, phase: str) -> None:
    pids: list[bytes] = []
    with pytest.raises(RunError) as failed:
        run_ranks(
            "tests.distributed.pipeline_workers:dying",
            msgspec.msgpack.encode((rank, phase)),
            world_size=3,
            device_type="cpu",
            timeout_s=60,
            on_event=pids.append,
        )
    assert str(failed.value).startswith(f'rank {rank} was killed by SIGKILL (signal 9) during "step 1"')
    assert "The other ranks were stopped" in str(failed.value)
    assert len(pids) == 3
    assert [pid for pid in pids if psutil.pid_exists(int(pid))] == []
