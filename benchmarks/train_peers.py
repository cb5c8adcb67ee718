"""Tokens a second at tp=2: `shardwise train` beside torchtitan and transformers' Trainer.

    python -m benchmarks.train_peers --titan VENV/bin/python --trainer VENV/bin/python
                                              writes benchmarks/results/DATE-train-peers.json
    python -m benchmarks.train_peers ... --dry     prints, writes nothing

A round is a run of each side as its users start it, one after the other, the starting place rotating; a run's
time is that of a step, from one step's end to the last one's: the loop, its text and its log are in it. All
sides: a Llama of the same sizes on the same tokens, two ranks on gloo, a thread each, fp32, fused AdamW with
the same constants, clipping at the same norm. torchtitan runs its own model under its TP plan (with sequence
and loss parallelism); Trainer a model of transformers under transformers' TP plan; `shardwise train` its own
Llama under the plan rowwise, and that model of transformers under a plan that it made; with --compiled, its
own once more under --compile inductor (a warm-up compiles). Checkpoints, validation and the proof before step
1 are off.

torchtitan 0.2.2 and transformers with accelerate need environments of their own: benchmarks/README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from benchmarks import results
from benchmarks.results import Bar, BarKind, Result, Side, compare
from shardwise.core.errors import OptionError, RunError
from shardwise.core.training import TrainOptions
from shardwise.files.step_log import read_steps
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import get_spec
from shardwise.text.stream import load_tokens

WHAT, RANKS = "train-peers", 2
OURS, THEIR_MODEL = "shardwise train", "shardwise train, transformers' model"
COMPILED = "shardwise train --compile inductor"
TITAN, TRAINER = "torchtitan", "transformers' Trainer"
TIMEOUT_S = 600
ANSWER = '{"ends_s"'
SHARDWISE = (sys.executable, "-m", "shardwise")
HERE = Path(__file__).parent / "peers"
PROBE = "import importlib.metadata as m, sys; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of one run. steps: of each run, the warm-ups among them."""

    model: str = "llama3-debug"
    batch: int = 4
    seq: int = 512
    steps: int = 12
    warm_ups: int = 3
    rounds: int = 5
    seed: int = 0
    learning_rate: float = 3e-4
    max_norm: float = 1.0


class Run(msgspec.Struct, frozen=True):
    """What a side's first rank says of a run. parameters: None where it is known from its model's sizes."""

    ends_s: list[float]
    losses: list[float]
    parameters: int | None = None


def shared(settings: Settings, folder: Path) -> dict[str, object]:
    """The settings that a peer's rank takes, and what it needs on disk."""
    config = get_spec(settings.model).config
    assert isinstance(config, LlamaConfig)
    stream = load_tokens(vocab_size=config.vocab_size, seed=settings.seed)
    np.save(folder / "tokens.npy", np.asarray(stream.ids, dtype=np.int32))
    weights = folder / "weights"
    weights.mkdir()
    (weights / "config.json").write_text(json.dumps(_as_transformers(config, settings.seq)), "utf-8")
    options = TrainOptions(steps=settings.steps)
    return {
        "tokens": str(folder / "tokens.npy"),
        "weights": str(weights),
        "makes_weights": False,
        "out": str(folder / "out"),
        "batch": settings.batch,
        "seq": settings.seq,
        "steps": settings.steps,
        "hidden": config.hidden,
        "layers": config.n_layers,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "vocab": config.vocab_size,
        "rope_theta": config.rope_theta,
        "ffn_multiple_of": config.ffn_hidden,
        "learning_rate": settings.learning_rate,
        "weight_decay": options.weight_decay,
        "betas": [options.beta1, options.beta2],
        "max_norm": settings.max_norm,
        "warm_up": 1,
    }


def _as_transformers(config: LlamaConfig, seq: int) -> dict[str, object]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.ffn_hidden,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "max_position_embeddings": seq,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def ran(command: Iterable[str], said: str = "") -> str:
    """What a command prints. RunError with its last lines where it fails; not where it had printed a line
    that begins with `said`: other trainers' ranks may die while they take their groups down."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command], capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False
    )
    if done.returncode and not (said and f"\n{said}" in f"\n{done.stdout}"):
        raise RunError("\n".join((" ".join(command), *done.stdout.splitlines()[-9:], done.stderr[-3000:])))
    return done.stdout


def peer(python: str, script: str, asked: dict[str, object]) -> Run:
    """A run of another trainer, by its own interpreter."""
    start = (python, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--standalone")
    printed = ran((*start, str(HERE / script), json.dumps(asked)), said=ANSWER)
    line = next(each for each in reversed(printed.splitlines()) if each.startswith(ANSWER))
    return msgspec.json.decode(line, type=Run)


def ours(settings: Settings, model: tuple[str, ...]) -> Run:
    """A run of `shardwise train`."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = ("--batch", str(settings.batch), "--seq", str(settings.seq), "--steps", str(settings.steps))
        rates = ("--learning-rate", str(settings.learning_rate), "--warmup", "1")
        bare = ("--validate-every", "0", "--save-every", "0", "--held-out", "0", "--no-verify")
        ran(
            (
                *SHARDWISE,
                "train",
                *model,
                "--mesh",
                f"tp={RANKS}",
                *sizes,
                *rates,
                *bare,
                "--seed",
                str(settings.seed),
                "--out",
                f"{folder}/run",
            )
        )
        records = read_steps(Path(folder) / "run")
    return Run([each.ended_at or 0.0 for each in records], [each.loss for each in records])


def sides(
    settings: Settings, asked: dict[str, object], titan: str, trainer: str, compiles: bool
) -> dict[str, Callable[[], Run]]:
    """By name, what runs each side once."""
    own = ("rowwise", "--model", settings.model)
    found: dict[str, Callable[[], Run]] = {OURS: partial(ours, settings, own)}
    if compiles:
        found[COMPILED] = partial(ours, settings, (*own, "--compile", "inductor"))
    if titan:
        found[TITAN] = partial(peer, titan, "titan_rank.py", asked)
    if trainer:
        ran((trainer, str(HERE / "trainer_rank.py"), json.dumps({**asked, "makes_weights": True})))
        model = ("--model", f"hf:{asked['weights']}")
        plan = Path(str(asked["weights"])) / "made.toml"
        made = ran((*SHARDWISE, "plan", *model, "--mesh", f"tp={RANKS}", "--toml"))
        plan.write_text(made, "utf-8")
        found[THEIR_MODEL] = partial(ours, settings, (str(plan), *model, "--weights", str(asked["weights"])))
        found[TRAINER] = partial(peer, trainer, "trainer_rank.py", asked)
    return found


def measure(settings: Settings, titan: str, trainer: str, compiles: bool) -> Result:
    started, load_before = results.now(), results.load_average()
    spec = get_spec(settings.model)
    times: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = shared(settings, Path(folder))
        runs = sides(settings, asked, titan, trainer, compiles)
        names = [*runs]
        for round_ in range(settings.rounds):
            for place in range(len(names)):
                name = names[(place + round_) % len(names)]
                print(f"round {round_ + 1} of {settings.rounds}: {name}", file=sys.stderr, flush=True)
                run = runs[name]()
                check(settings, name, run, spec.config.n_parameters)
                measured = run.ends_s[settings.warm_ups - 1 :]
                times.setdefault(name, []).append((measured[-1] - measured[0]) / (len(measured) - 1))
                losses.setdefault(name, []).extend((run.losses[0], run.losses[-1]))
    tokens = settings.batch * settings.seq
    about = {OURS: "rowwise", THEIR_MODEL: "a made plan", COMPILED: "rowwise"}
    about |= {TITAN: versions(titan, "torchtitan", "torch")} if titan else {}
    about |= {TRAINER: versions(trainer, "transformers", "accelerate", "torch")} if trainer else {}
    found = []
    for name, seconds in times.items():
        side = Side(name, about[name], (tuple(seconds),), {}, tuple(losses[name]))
        found.append(replace(side, facts={"tokens_per_s": tokens / side.median_s}))
    bars = [(OURS, TITAN, 1.25), (OURS, TRAINER, 1.3), (THEIR_MODEL, TRAINER, None), (COMPILED, OURS, None)]
    return Result(
        what=WHAT,
        settings={
            **msgspec.to_builtins(settings),
            "parameters": spec.config.n_parameters,
            "dtype": "float32",
        },
        environment=results.describe_machine(
            command(titan, trainer), RANKS, 1, (("OMP_NUM_THREADS", "1"),), started
        ),
        load_average=(load_before, results.load_average()),
        text=load_tokens(vocab_size=spec.vocab_size, seed=settings.seed).summary,
        checks=(
            f"Each side trained {spec.config.n_parameters:,} parameters; each run's loss began within 5 % of "
            f"ln {spec.vocab_size} and fell.",
        ),
        sides=tuple(found),
        comparisons=tuple(
            compare(found, one, other, Bar(BarKind.SPEEDUP_AT_LEAST, bar) if bar else None)
            for one, other, bar in bars
            if {one, other} <= {*times}
        ),
        notes=(
            f"A time is that of a step. Losses are the first and the last of each run of {settings.steps} "
            "steps; weights and the order of the text differ from side to side.",
            "gloo between two processes of one machine: on GPUs, where all have the same kernels and NCCL, "
            "the differences are others.",
        ),
    )


def check(settings: Settings, name: str, run: Run, n_parameters: int) -> None:
    """That a run did the steps that were asked for, and learnt: else RunError."""
    expected = float(np.log(get_spec(settings.model).vocab_size))
    if run.parameters not in (None, n_parameters):
        raise RunError(f"{name} trained {run.parameters:,} parameters; {n_parameters:,} were meant.")
    if len(run.ends_s) != settings.steps or len(run.losses) != settings.steps:
        raise RunError(f"{name} told of {len(run.ends_s)} steps; {settings.steps} were meant.")
    if not abs(run.losses[0] / expected - 1) < 0.05 or not run.losses[-1] < run.losses[0]:
        raise RunError(
            f"{name}'s loss went from {run.losses[0]:.3f} to {run.losses[-1]:.3f}: it didn't learn."
        )


def command(*interpreters: str) -> str:
    """As it was typed, but for where this machine has its interpreters."""
    line = results.command_line("benchmarks.train_peers")
    for path in filter(None, interpreters):
        line = line.replace(path, "PYTHON")
    return line


def versions(python: str, *packages: str) -> str:
    return ran((python, "-c", PROBE, *packages)).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_peers", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument(
        "--titan", default="", metavar="PYTHON", help="an interpreter that has torchtitan 0.2.2"
    )
    parser.add_argument(
        "--trainer", default="", metavar="PYTHON", help="one that has transformers and accelerate"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="a side more: compiled layers (needs a C++ compiler)"
    )
    defaults = Settings()
    for name in ("batch", "seq", "steps", "rounds"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--dry", action="store_true", help="print, and write no results file")
    given = parser.parse_args()
    if not given.titan and not given.trainer:
        raise OptionError("name at least one peer's interpreter: --titan PYTHON, --trainer PYTHON.")
    settings = Settings(batch=given.batch, seq=given.seq, steps=given.steps, rounds=given.rounds)
    result = measure(settings, given.titan, given.trainer, given.compiled)
    results.show(result)
    print(*result.checks, sep="\n")
    if not given.dry:
        print(f"written: {result.write()}")


if __name__ == "__main__":
    main()
