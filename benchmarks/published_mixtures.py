"""Published runs of mixtures of experts as predict takes them: benchmarks/mixtures.py has their models.

Megatron's axis of experts lies within its data-parallel ranks; ours stands beside dp, so dp is what is left
of them. Experts' gradients and optimizer state are shared by that many ranks, everything else's by all.
"""

from dataclasses import dataclass

from benchmarks.mixtures import SHAPES, Mixture, plan_of
from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.program import Program

Row = dict[str, str]
STATED = ("seq_len", "micro_batch", "tp", "pp", "dp", "n_gpus", "global_batch", "ep")
"""What a row must say; shapes are the model's, by its name."""


@dataclass(frozen=True, slots=True)
class TracedMixture:
    """What a mixture's Program depends on. replicas: of experts, two at most."""

    model: str
    seq: int
    micro_batch: int
    replicas: int
    experts: int

    @property
    def mesh(self) -> Mesh:
        return Mesh((("dp", self.replicas), ("ep", self.experts), ("tp", 1)))


def is_mixture(row: Row) -> bool:
    return row["ep"] not in ("", "0", "1")


def why_not(row: Row) -> str | None:
    """Why a mixture's row can't be taken, apart from its GPU and its time."""
    if row["model"] not in SHAPES:
        return "its shapes aren't stated, and no published configuration has its name"
    absent = [column for column in STATED if not row[column]]
    if absent:
        return f"doesn't state {', '.join(absent)}"
    at_once = int(row["dp"]) * int(row["micro_batch"])
    if row["grad_accum"] and int(row["grad_accum"]) * at_once != int(row["global_batch"]):
        return f"its accumulation of {row['grad_accum']} doesn't give its batch"
    if int(row["tp"]) > 1 or int(row["dp"]) % int(row["ep"]):
        return "its experts lie across tensor-parallel ranks"
    return None


def traced_of(row: Row) -> TracedMixture:
    """Of a row that why_not() has nothing against."""
    experts = int(row["ep"])
    replicas = min(int(row["dp"]) // experts, 2)
    return TracedMixture(row["model"], int(row["seq_len"]), int(row["micro_batch"]), replicas, experts)


def program_of(traced: TracedMixture) -> Program:
    """Traces a micro-batch of the model on CUDA's ops, in bfloat16."""
    from shardwise.models.factory import FactoryModel
    from shardwise.trace.trace import trace

    shape, mesh = SHAPES[traced.model], traced.mesh
    source = FactoryModel(traced.model, lambda: Mixture(shape), frozenset(), False)
    settings = StepSettings(traced.micro_batch * mesh.data_parallel, traced.seq, "bfloat16")
    return trace(source, plan_of(shape), mesh, settings, device="cuda")
