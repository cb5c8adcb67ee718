"""Broken steps on every mesh, systematically: what `python -m benchmarks.verify_mutants` tries verify on
beside the plans of mutants.py. A mutant is a right model, plan and mesh, and one fault planted in what runs
(axis_faults.py): a gradient that isn't summed over an axis, or summed twice, averaged, another rank's; a loss
that isn't divided by what counts in the whole batch; labels or positions of other tokens; a norm that is
clipped by a part; what only one axis has: a router, experts, keys that travel, a tied head at both ends.

`expected` was written down before verify saw any of them: the cause that it should name; LOSS or NORM where
the loss or the norm of the gradients alone is wrong; HARMLESS where all stays right. `where` is to be found
in what verify says: the axis over which a sum is lacking, the module whose output is wrong. Whether a mutant
is harmful is for axis_oracle.py to say.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from benchmarks import axis_faults as faults
from benchmarks.mutants import HARMLESS
from shardwise.core.finding import Cause
from shardwise.core.mesh import Mesh
from shardwise.core.pipeline import Pipeline, Schedule
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.models.gpt import GPTConfig
from shardwise.models.llama import LlamaConfig
from shardwise.models.moe import MoEConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan

LOSS, NORM = "loss_differs", "gradient_norm"
BATCH, SEQ, VOCAB = 8, 16, 61
MODELS = {
    "llama": ModelSpec("llama", LlamaConfig(VOCAB, 32, 2, 4, 4, 48), ""),
    "gpt": ModelSpec("gpt", GPTConfig(VOCAB, 32, 2, 4, 48, 2 * SEQ, tied=True), ""),
    "moe": ModelSpec("moe", MoEConfig(VOCAB, 32, 2, 4, 4, 16, n_experts=4, top_k=2, qk_norm=True), ""),
}
Planted = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class AxisMutant:
    """model: of MODELS. fault: planted while the sharded model is built and run; one process's step has no
    mesh, and none of them touches it."""

    name: str
    about: str
    model: str
    mesh: str
    expected: str
    fault: Planted = nullcontext
    where: str = ""
    accumulation: int = 1
    schedule: Schedule = Schedule.ONE_F_ONE_B

    @property
    def spec(self) -> ModelSpec:
        return MODELS[self.model]

    @property
    def mesh_noun(self) -> Mesh:
        return Mesh.parse(self.mesh)

    @property
    def plan(self) -> AnyPlan:
        mesh = self.mesh_noun
        if mesh.tp == 1 and mesh.experts == 1:
            return TheirPlan.UNSHARDED
        return builtin_plan("rowwise", family=self.spec.family)

    @property
    def pipeline(self) -> Pipeline | None:
        stages = self.mesh_noun.stages
        return Pipeline(stages, 1, self.schedule) if stages > 1 else None


# per mesh: the model that runs on it
MESHES = {
    "dp=2": "llama",
    "fsdp=2": "llama",
    "ep=2": "moe",
    "cp=2": "llama",
    "pp=2": "gpt",
    "dp=2,tp=2": "llama",
    "fsdp=2,tp=2": "llama",
    "dp=2,fsdp=2": "gpt",
    "dp=2,ep=2": "moe",
    "fsdp=2,ep=2": "moe",
    "ep=2,tp=2": "moe",
    "cp=2,tp=2": "llama",
    "dp=2,cp=2": "llama",
    "fsdp=2,cp=2": "llama",
    "pp=2,tp=2": "gpt",
    "pp=2,dp=2": "gpt",
    "pp=2,fsdp=2": "llama",
}
# of each model, parameters of each kind: a norm's, a matrix', a table's
PARAMETERS = {
    "llama": ("layers.0.ffn_norm.weight", "layers.1.attention.wo.weight", "tok_embeddings.weight"),
    "gpt": (
        "layers.1.attention_norm.weight",
        "layers.0.feed_forward.w1.bias",
        "layers.1.attention.wqkv.weight",
    ),
    "moe": ("norm.weight", "layers.0.feed_forward.router.gate.weight", "layers.1.attention.wq.weight"),
}
EXPERTS = ("layers.0.feed_forward.experts.w1", "layers.1.feed_forward.experts.w2")
SUMS, TWICE, HALF = Cause.PARTS_NOT_SUMMED, Cause.SUMMED_TOO_OFTEN, Cause.AVERAGED


def _accumulation(mesh: str) -> int:
    return 2 if Mesh.parse(mesh).stages > 1 else 1


def _mutant(mesh: str, name: str, about: str, expected: str, fault: Planted, where: str = "") -> AxisMutant:
    return AxisMutant(
        f"{mesh} {name}", about, MESHES[mesh], mesh, expected, fault, where, _accumulation(mesh)
    )


def _sums(mesh: str) -> Iterator[AxisMutant]:
    """What the step itself sums after the backward, over each axis and over all."""
    noun = Mesh.parse(mesh)
    several = [name for name in noun.summing_axes if noun.size(name) > 1]
    names = PARAMETERS[MESHES[mesh]]
    for axis in several:
        for name in names:
            about = f"the gradient of {name} isn't summed over {axis}"
            yield _mutant(
                mesh, f"unsummed over {axis} {name}", about, SUMS, faults.unsummed((axis,), name), axis
            )
        name = names[0]
        yield _mutant(
            mesh,
            f"summed twice over {axis} {name}",
            f"the gradient of {name} is summed over {axis} once more",
            TWICE,
            faults.changed(name, faults.summed_over(axis)),
        )
        yield _mutant(
            mesh,
            f"averaged over {axis} {names[1]}",
            f"the gradient of {names[1]} is averaged over {axis}",
            HALF,
            faults.changed(names[1], faults.times(1 / noun.size(axis))),
        )
        yield _mutant(
            mesh, f"unsummed over {axis}", f"no gradient is summed over {axis}", SUMS,
            faults.unsummed((axis,)), axis,
        )  # fmt: skip
    if len(several) > 1:
        joined = "+".join(several)
        for name in names[:2]:
            about = f"the gradient of {name} is summed over none of {joined}"
            fault = faults.unsummed(tuple(several), name)
            yield _mutant(mesh, f"unsummed over {joined} {name}", about, SUMS, fault, joined)


def _gradients(mesh: str) -> Iterator[AxisMutant]:
    """Gradients that are changed when all is summed."""
    names = PARAMETERS[MESHES[mesh]]
    for word, factor, expected, name in (("doubled", 2.0, TWICE, names[1]), ("halved", 0.5, HALF, names[2])):
        about = f"the gradient of {name} times {factor:g}"
        yield _mutant(mesh, f"{word} {name}", about, expected, faults.changed(name, faults.times(factor)))
    name = names[0]
    yield _mutant(
        mesh, f"zeroed {name}", f"the gradient of {name} is zero", Cause.NOTHING_ARRIVES,
        faults.changed(name, faults.times(0.0)),
    )  # fmt: skip
    yield _mutant(
        mesh, "zeroed on one rank", f"the gradient of {name} is zero on the last rank", Cause.NOTHING_ARRIVES,
        faults.zero_on_the_last(name),
    )  # fmt: skip


def _losses(mesh: str) -> Iterator[AxisMutant]:
    noun = Mesh.parse(mesh)
    yield _mutant(
        mesh, "ignored labels count", "the loss is divided by all labels, ignored ones too", LOSS,
        faults.all_labels_count(),
    )  # fmt: skip
    if noun.token_axes:
        yield _mutant(
            mesh, "valid not summed", "each rank divides its loss by its own labels alone", LOSS,
            faults.valid_not_summed(),
        )  # fmt: skip
        yield _mutant(
            mesh,
            "labels of others",
            "each rank has its neighbour's labels",
            LOSS,
            faults.labels_of_the_next(),
        )
    yield _mutant(
        mesh, "labels from the own tokens", "labels are the rank's own next tokens, then its first", LOSS,
        faults.labels_rolled(),
    )  # fmt: skip


def _norms(mesh: str) -> Iterator[AxisMutant]:
    """Where our own clipping clips; PyTorch's does where FSDP alone has cut the model."""
    noun = Mesh.parse(mesh)
    if noun.tp > 1 or noun.experts > 1 or noun.stages > 1:
        yield _mutant(
            mesh, "clipped by a part", "each rank clips by the norm of its own part", NORM,
            faults.norm_not_summed(),
        )  # fmt: skip
    if noun.tp > 1:
        yield _mutant(
            mesh, "whole counted on each rank", "the norm counts what ranks hold alike once for each", NORM,
            faults.counted_on_each_rank(),
        )  # fmt: skip


def _harmless(mesh: str) -> Iterator[AxisMutant]:
    name = PARAMETERS[MESHES[mesh]][0]
    changes = {
        "same": ("the gradient of a norm times 1", faults.changed(name, faults.times(1.0))),
        "there and back": (
            "the gradients of a norm, doubled and halved",
            faults.changed(name, lambda gradient, _: 0.5 * (2 * gradient)),
        ),
        "in another order": ("gradients are summed in another order", faults.sums_reversed()),
        "by a gather": ("gradients are gathered and summed", faults.summed_by_a_gather()),
    }
    for word, (about, fault) in changes.items():
        yield _mutant(mesh, f"harmless {word}", about, HARMLESS, fault)
    more = _mutant(mesh, "harmless more micro-batches", "twice as many micro-batches", HARMLESS, nullcontext)
    yield replace(more, accumulation=2 * more.accumulation)


def _tensors(mesh: str) -> Iterator[AxisMutant]:
    """Where tp meets another axis: what the plan's styles sum."""
    if Mesh.parse(mesh).tp == 1:
        return
    norms = {
        "llama": ("layers.0.attention_norm.weight", "layers.1.ffn_norm.weight", "norm.weight"),
        "gpt": ("layers.0.attention_norm.weight", "layers.1.ffn_norm.bias", "pos_embeddings.weight"),
        "moe": ("layers.0.ffn_norm.weight", "layers.1.attention.q_norm.weight",
                "layers.0.feed_forward.router.gate.weight"),
    }  # fmt: skip
    for name in norms[MESHES[mesh]] if not Mesh.parse(mesh).shard_axes else ():  # FSDP sums what is Partial
        about = f"nobody sums the parts of {name}'s gradient over tp"
        yield _mutant(mesh, f"unsummed over tp {name}", about, SUMS, faults.not_reduced(name), "tp")
    cut = {"llama": "layers.0.attention.wq.weight", "gpt": "layers.1.feed_forward.w2.weight",
           "moe": "layers.1.attention.wo.weight"}[MESHES[mesh]]  # fmt: skip
    yield _mutant(
        mesh, f"shifted over tp {cut}", f"each rank has the next one's gradient of {cut}", Cause.WRONG_SHARD,
        faults.changed(cut, faults.of_the_next("tp")),
    )  # fmt: skip


def _fsdp(mesh: str) -> Iterator[AxisMutant]:
    if not Mesh.parse(mesh).shard_axes:
        return
    yield _mutant(
        mesh,
        "fsdp averages",
        "FSDP divides by its ranks, as it does by default",
        HALF,
        faults.fsdp_averages(),
    )
    norm = PARAMETERS[MESHES[mesh]][0]
    yield _mutant(
        mesh, f"left out of fsdp {norm}", f"{norm} isn't FSDP's, and nobody sums it", SUMS,
        faults.left_out_of_fsdp(norm),
    )  # fmt: skip


def _experts(mesh: str) -> Iterator[AxisMutant]:
    if Mesh.parse(mesh).experts == 1:
        return
    for name in EXPERTS:
        yield _mutant(
            mesh, f"summed over ep {name}", f"the ranks' gradients of {name}, each of its own, are added",
            TWICE, faults.changed(name, faults.summed_over("ep")),
        )  # fmt: skip
        yield _mutant(
            mesh, f"shifted over ep {name}", f"each rank has the gradient of the next one's {name}",
            Cause.WRONG_SHARD, faults.changed(name, faults.of_the_next("ep")),
        )  # fmt: skip
        yield _mutant(
            mesh, f"averaged over ep {name}", f"the gradient of {name} is divided by the ranks of ep", HALF,
            faults.changed(name, faults.times(0.5)),
        )  # fmt: skip
    at = "layers.0.feed_forward.experts"
    for word, about, fault in (
        ("next expert", "each token goes to the expert after the one that was chosen", faults.next_expert()),
        ("last choice dropped", "a token's last choice doesn't come back", faults.last_choice_dropped()),
        ("unweighted", "choices are summed without the router's weights", faults.unweighted()),
        ("swapped back", "what comes back is put at the neighbour's place", faults.swapped_back()),
    ):
        yield _mutant(mesh, word, about, Cause.FORWARD, fault, at)
    yield _mutant(
        mesh, "nothing comes back", "the gradient of what experts gave isn't sent to them",
        Cause.NOTHING_ARRIVES, faults.no_gradient_to_experts(), "experts",
    )  # fmt: skip


def _stages(mesh: str) -> Iterator[AxisMutant]:
    if Mesh.parse(mesh).stages == 1:
        return
    is_tied = MESHES[mesh] == "gpt"
    if is_tied:
        table = "tok_embeddings.weight"
        yield _mutant(
            mesh, "tied not summed", "the two ends keep their parts of the tied table's gradient", SUMS,
            faults.tied_not_summed(), table,
        )  # fmt: skip
        yield _mutant(
            mesh, "tied summed twice", "the two ends add up what is summed already", TWICE,
            faults.tied_summed_twice(), table,
        )  # fmt: skip
        yield _mutant(
            mesh, "tied counted twice", "both ends count the tied table in the norm", NORM,
            faults.tied_counted_twice(),
        )  # fmt: skip
    yield _mutant(
        mesh,
        "norm of a stage",
        "each stage clips by the norm of its own layers",
        NORM,
        faults.norm_of_a_stage(),
    )
    yield _mutant(
        mesh, "loss of each micro-batch", "losses aren't divided by the number of micro-batches", LOSS,
        faults.loss_of_each_micro_batch(),
    )  # fmt: skip
    yield _mutant(
        mesh, "layer twice", "each stage runs its last layer once more", Cause.FORWARD, faults.layer_twice(),
        "layers.",
    )  # fmt: skip


def _schedules() -> Iterator[AxisMutant]:
    for schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B):
        yield AxisMutant(
            f"pp=2 harmless {schedule}", f"the schedule {schedule}", "llama", "pp=2", HARMLESS,
            accumulation=4, schedule=schedule,
        )  # fmt: skip


def _context(mesh: str) -> Iterator[AxisMutant]:
    if Mesh.parse(mesh).context == 1:
        return
    first = "layers.0.attention"
    for word, about, fault in (
        ("contiguous positions", "positions are those of tokens in a row", faults.contiguous_positions()),
        ("positions from 0", "each rank counts its positions from 0", faults.positions_from_0()),
        ("own keys only", "each rank attends to its own keys alone", faults.own_keys_only()),
    ):
        yield _mutant(mesh, word, about, Cause.FORWARD, fault, first)
    yield _mutant(
        mesh, "keys' gradients kept", "what comes back to keys and values of other ranks isn't sent to them",
        SUMS, faults.gradients_of_keys_kept(),
    )  # fmt: skip


MUTANTS = {
    mutant.name: mutant
    for mutant in (
        *(
            mutant
            for mesh in MESHES
            for make in (
                _sums, _gradients, _losses, _norms, _tensors, _fsdp, _experts, _stages, _context, _harmless
            )
            for mutant in make(mesh)
        ),
        *_schedules(),
    )
}  # fmt: skip
