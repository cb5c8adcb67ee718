"""What the ranks of test_train_axes.py run: whole runs of train, one mesh after the other; and the cases, as
data."""

import itertools
from dataclasses import replace
from math import prod
from pathlib import Path

import msgspec
import numpy as np

from shardwise.core.case import MASKED, StepSettings
from shardwise.core.mesh import AXES, Mesh
from shardwise.core.training import Saved, StepRecord, TrainOptions
from shardwise.launch import RankContext
from shardwise.launch.mail import Kind
from shardwise.models.source import find_model
from shardwise.parallel.any_plan import text_of
from shardwise.parallel.builtin import builtin_plan
from shardwise.text.samples import Samples
from shardwise.text.stream import TokenStream
from shardwise.train.loop import Event, Loop, TrainJob
from tests.distributed.shared_groups import shared_groups

RANKS, STEPS, BATCH, SEQ, HELD_OUT, VOCAB = 4, 8, 8, 16, 13, 64
SHAPE = f"hidden=32,n_heads=8,n_kv_heads=4,vocab_size={VOCAB}"
MODELS = {
    "llama": f"llama3-debug?{SHAPE},ffn_hidden=48",
    "gpt": f"gpt-debug?hidden=32,n_heads=8,vocab_size={VOCAB},ffn_hidden=64,max_seq={SEQ}",
    "moe": f"moe-debug?{SHAPE},ffn_hidden=16,n_experts=8",
    "balanced moe": f"moe-debug?{SHAPE},ffn_hidden=16,n_experts=8,aux_loss=0.1",
}
OPTIONS = TrainOptions(
    steps=STEPS, validate_every=4, held_out=HELD_OUT, warmup=3, save_every=0, alike_every=4
)


class AxesCase(msgspec.Struct, frozen=True):
    """A run of a model on a mesh, under the plan that train takes where none is named."""

    model: str
    mesh: str
    accumulation: int = 1
    recompute: str = "none"
    chunks: int = 1
    reduce_once: bool = False

    @property
    def name(self) -> str:
        more = {
            f"accumulation={self.accumulation}": self.accumulation > 1,
            f"recompute={self.recompute}": self.recompute != "none",
            "interleaved": self.chunks > 1,
            "reduced once": self.reduce_once,
        }
        return ", ".join((f"{self.model} on {self.mesh}", *(text for text, holds in more.items() if holds)))

    @property
    def is_telling(self) -> bool:
        return self in TELLING

    @property
    def built(self) -> str:
        """The model's name, with as many layers as a pipeline's parts need."""
        parts = Mesh.parse(self.mesh).stages * self.chunks
        return f"{MODELS[self.model]},n_layers={max(2, parts)}"

    @property
    def settings(self) -> StepSettings:
        return replace(
            settings_of(),
            accumulation=max(self.accumulation, Mesh.parse(self.mesh).stages),
            recompute=self.recompute,
            chunks=self.chunks,
            reduce_once=self.reduce_once,
        )

    def job(self, folder: Path) -> TrainJob:
        """folder: where it saves its end."""
        return TrainJob(
            model=self.built,
            mesh=self.mesh,
            plan=text_of(builtin_plan("rowwise", family=find_model(self.built).family)),
            settings=self.settings,
            options=OPTIONS,
            saved=Saved(0, 0, samples().digest, {}, {}, 1, RANKS),
            checkpoints=str(folder / self.name.replace(" ", "_")),
            documents=MASKED,
        )


def settings_of() -> StepSettings:
    """What all cases share. The rate is high, so that a wrong step is seen in the next loss."""
    return StepSettings(BATCH, SEQ, dtype="float64", learning_rate=0.01, max_norm=0.5, seed=3)


TELLING = (
    AxesCase("balanced moe", "ep=2,tp=2", recompute="selective-ops"),
    AxesCase("gpt", "fsdp=2,cp=2", accumulation=2, recompute="full", reduce_once=True),
    AxesCase("llama", "pp=2,dp=2", accumulation=4, chunks=2),
)


def cases() -> list[AxesCase]:
    """Every way to make four ranks of the axes that a step runs over, for Llama; with experts' axis for a
    mixture too, and else for a mixture or GPT in turn; and settings of the step on some of them."""
    found = list(TELLING)
    for number, mesh in enumerate(_meshes()):
        mixture = "moe" if Mesh.parse(mesh).stages > 1 else "balanced moe"
        other = mixture if Mesh.parse(mesh).experts > 1 or number % 2 else "gpt"
        found += [AxesCase(model, mesh) for model in ("llama", other)]
    found += [
        AxesCase(model, mesh, accumulation=accumulation, recompute=recompute, reduce_once="fsdp" in mesh)
        for model, mesh, accumulation, recompute in (
            ("llama", "fsdp=4", 2, "full"),
            ("llama", "fsdp=2,tp=2", 4, "selective-ops"),
            ("llama", "dp=2,cp=2", 2, "full"),
            ("llama", "pp=4", 8, "full"),
            ("gpt", "dp=2,fsdp=2", 2, "none"),
            ("gpt", "pp=2,tp=2", 4, "full"),
            ("moe", "ep=4", 2, "full"),
            ("moe", "ep=2,tp=2", 4, "selective-ops"),
            ("moe", "pp=2,ep=2", 4, "full"),
        )
    ]
    found += [
        AxesCase(model, mesh, accumulation=4, chunks=2)
        for model, mesh in (("llama", "pp=2,tp=2"), ("gpt", "pp=2,cp=2"), ("moe", "pp=2,ep=2"))
    ]
    return list(dict.fromkeys(found))


def _meshes() -> list[str]:
    names = [axis.name for axis in AXES if axis.runs]
    return [
        ",".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True) if size > 1)
        for sizes in itertools.product((1, 2, 4), repeat=len(names))
        if prod(sizes) == RANKS
    ]


def samples() -> Samples:
    """Less than a run reads, so that it begins a second epoch; in documents, so that ranks and micro-batches
    have unequal numbers of labels."""
    draw = np.random.default_rng(7)
    # skewed, so that there is something to learn
    ids = np.minimum(draw.geometric(0.1, 70 * SEQ + 1), VOCAB).astype(np.int32) - 1
    ends = np.unique(np.append(draw.integers(1, ids.size, 200), ids.size)).astype(np.int64)
    stream = TokenStream.of(ids, vocab_size=VOCAB, source="drawn", tokenizer="none", ends=ends)
    return Samples.of(stream, SEQ, 3, HELD_OUT, MASKED)


@shared_groups()
def run(context: RankContext, payload: bytes) -> bytes:
    """payload: a folder, and the names of cases. Returns each case's lines, as rank 0 reports them."""
    folder, names = msgspec.json.decode(payload, type=tuple[str, list[str]])
    found: dict[str, list[StepRecord]] = {}
    for case in cases():
        if case.name in names:
            lines = found[case.name] = []

            def send(kind: Kind, body: bytes, case: AxesCase = case, lines: list[StepRecord] = lines) -> None:
                if kind is Kind.NOTE:
                    context.note(f"{case.name}: {body.decode()}")
                    return
                record = msgspec.json.decode(body, type=Event).record
                if record is not None:
                    lines.append(record)

            Loop(replace(context, send=send), case.job(Path(folder)), samples()).run()
    return msgspec.json.encode(found)
