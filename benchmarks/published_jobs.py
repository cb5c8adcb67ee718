"""What a published row is taken for: the Program and the setup that predict needs, by its configuration
columns alone, never by its time; or why it isn't taken. Rows: benchmarks/data/measurements.csv."""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks import published_mixtures
from benchmarks.published_mixtures import TracedMixture, is_mixture
from benchmarks.published_results import NotTaken
from shardwise.core.allocator import PYTORCHS, AllocatorSettings
from shardwise.core.machine import Machine
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import AttentionKernel, Precision, Scaling, Setup
from shardwise.predict.machines import load_machine

DATA = Path(__file__).parent / "data" / "measurements.csv"
SHAPE = (
    "layers",
    "hidden",
    "heads",
    "ffn",
    "vocab",
    "seq_len",
    "micro_batch",
    "tp",
    "pp",
    "dp",
    "n_gpus",
    "global_batch",
)
MACHINES = {
    "A100-SXM-80GB": "a100-sxm-80gb",
    "A100-SXM-40GB": "a100-sxm-40gb",
    "H100-SXM-96GB-HBM2e": "h100-sxm-96gb-500w",
    "H100-SXM-95GB-HBM2e": "h100-sxm-96gb-500w",
    "H100-SXM-80GB": "h100-sxm-80gb",
    "H200-SXM-141GB": "h200-sxm-141gb",
    "B200-SXM": "b200-sxm",
    "GB200": "gb200-nvl72",
    # as NVIDIA's own tables call those of a DGX
    "H100": "h100-sxm-80gb",
    "B200": "b200-sxm",
}
UNFUSED = (
    "Megatron-LM 2021",
    "Megatron-LM PTD-P",
    "Megatron-LM 2022",
    "DeepSpeed ZeRO-3",
    "Megatron-DeepSpeed/Megatron-LM (see paper), measured by vTrain authors",
)
TIMED_PASSES = tuple(name for name in UNFUSED if "Megatron" in name)
"""Trainers whose timers stand around each forward and backward and wait for the device. Source: Megatron-LM
up to 2022, megatron/timers.py (torch.cuda.synchronize in start and stop) and schedules.py."""

GENERATIONS = {"llm-foundry": AttentionKernel.FLASH_1, "torchtitan": AttentionKernel.FLASH_2}
"""Trainers whose fused attention was an older one. Sources: llm-foundry's scripts/train/benchmarking/
submit_benchmarks.py (attn_impl "triton": FlashAttention 1 in Triton); torchtitan called
scaled_dot_product_attention, which on Hopper ran FlashAttention 2 in the PyTorch of its tables."""

SIMUMAX = "Megatron-LM 0.14 + TE 2.11 (measured by SimuMax authors)"
"""A trainer with a distributed optimizer that sums gradients, in float32, and gathers parameters beside
nothing. Source: SimuMax, simu_tools/megatron_scripts/scripts/run_pretrain_llama3.sh
(--use-distributed-optimizer, --accumulate-allreduce-grads-in-fp32, and neither --overlap-grad-reduce nor
--overlap-param-gather)."""

FUSED = ("NeMo/Megatron-Core (DGX Cloud benchmarking)",)
"""Trainers that fuse what stands between matmuls: NeMo 2's Llama 3 has bias_activation_fusion,
bias_dropout_fusion and apply_rope_fusion (nemo/collections/llm/gpt/model/llama.py). The same step of
Llama 3 8B in fp8 on 8 H100 took 10.68 s with NeMo 24.07 and 9.33 s with this one."""

BOARD, SWITCHED = 4, 8
"""Nodes of four SXM GPUs have no NVSwitch: each pair is joined by a third of the links, where a node of eight
has switches. Source: NVIDIA, "Introducing NVIDIA HGX H100" (HGX H100 4-GPU, point to point)."""

SELECTIVE_LAYER, EVERY_SECOND = "selective layer", 2
"""torchtitan's selective recompute by layers ran every second layer again (selective_ac_option = "2" in its
train_configs of 2024)."""

EXPANDABLE = AllocatorSettings(expandable_segments=True)
"""torchtitan's allocator. Source: PYTORCH_CUDA_ALLOC_CONF in its run_llama_train.sh of December 2024 and
run_train.sh since. Its parameters are filled shard by shard (init_weights of DTensors)."""

FP8 = ("fp8", "float8")
COMPILED_LOSS = "2025-04"
"""Since when torchtitan compiles its loss where it compiles its layers (before, it said that this failed).
Source: its pull request 1033."""

Row = dict[str, str]


def number(row: Row, column: str, absent: int = 0) -> int:
    """A whole number of a column, the first where it names several ("8 or 16"); `absent` where it is
    empty."""
    return int(float(row[column].split()[0])) if row[column] else absent


def usable(row: Row) -> bool:
    """By the configuration only; see why_not. fp8 rows are in."""
    return why_not(row) is None


def why_not(row: Row) -> str | None:
    """Why a row isn't taken: shapes and degrees must be stated (those of a mixture of experts are its
    model's), and there must be a machine file of its GPU, and a step time. None where it is."""
    if row["gpu"] not in MACHINES:
        return f"no machine file of a {row['gpu'] or 'GPU that it names'}"
    if not row["step_time_s"]:
        return "no step time"
    if is_mixture(row):
        return published_mixtures.why_not(row)
    absent = [column for column in SHAPE if not row[column]]
    if absent:
        return f"doesn't state {', '.join(absent)}"
    layers, stages, chunks = number(row, "layers"), number(row, "pp"), number(row, "vp", 1)
    if stages * chunks > layers:
        return f"{layers} layers can't be cut into {stages} stages of {chunks} chunks"
    return None


def is_llama(row: Row) -> bool:
    """Gated feed-forwards, RMSNorm and no biases; all other families are taken for GPT."""
    return "llama" in row["model"]


@dataclass(frozen=True, slots=True)
class Traced:
    """What a Program depends on: rows that agree in it share one."""

    llama: bool
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    seq: int
    max_seq: int
    micro_batch: int
    tp: int
    sequence_parallel: bool
    data_axis: str
    data_size: int
    recompute: str
    mixed: bool
    plan: str
    fused_swiglu: bool
    context: int = 1
    recompute_layers: int | None = None
    gathers_once: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A row as predict takes it. per_node: GPUs of a node; None: as the machine file says."""

    traced: Traced | TracedMixture
    setup: Setup
    machine: str
    per_node: int | None = None
    is_fitted: bool = True  # by a machine with what is fitted to whole runs


def machine_of(group: str, gpu: str) -> str:
    """The machine file that a published group's rows on this GPU are predicted by."""
    return "a100-sxm-80gb-vtrain" if group.startswith("vtrain") else MACHINES[gpu]


@cache
def machine_called(name: str) -> Machine:
    return load_machine(name)


def job_of(row: Row) -> Job:
    """A mixture's or a dense model's."""
    return mixture_job(row) if is_mixture(row) else dense_job(row)


def mixture_job(row: Row) -> Job:
    """By the rules of dense rows (dense_job); published_mixtures.py says what experts add."""
    traced, dp = published_mixtures.traced_of(row), number(row, "dp")
    axes = (("pp", number(row, "pp")), ("dp", dp // traced.experts), ("ep", traced.experts), ("tp", 1))
    distributed = "optimizer" in row["dp_kind"]
    setup = Setup(
        Mesh(axes),
        micro_batches=number(row, "global_batch") // (dp * traced.micro_batch),
        chunks=number(row, "vp", 1) or 1,
        compiled=row["compile"] == "1",
        matmul_dtype="float8" if any(name in row["precision"] for name in FP8) else None,
        scaling=scaling_of(row),
        overlap_data=distributed and row["framework"] != SIMUMAX,
        sums_float32=row["framework"] == SIMUMAX,
        optimizer_shards=dp if distributed else 1,
        precision=Precision.MASTER,
    )
    return Job(traced, setup, machine_of(row["source_group"], row["gpu"]))


def dense_job(row: Row) -> Job:
    """From the configuration columns, by these rules: Megatron pads its vocabulary to a multiple of 128 x TP
    (vTrain's model has 50257 // TP rows of it, src/model/gpt_modeling.py there),
    and its SwiGLU keeps its inputs alone; context ranks exchange keys and values on a ring as Megatron's do,
    under PyTorch's own styles and FSDP by an all-gather, torchtitan's default; 2021 and 2022 trainers ran
    attention unfused; torchtitan runs under PyTorch's own styles, and compiles its loss since COMPILED_LOSS;
    FSDP and ZeRO-3 keep and reduce in float32 and compute in half precision, others keep float32 gradients
    and master weights; a distributed optimizer is shared by data-parallel and context-parallel ranks, and its
    reduction runs beside the backward."""
    llama, tp, dp, context = is_llama(row), number(row, "tp"), number(row, "dp"), number(row, "cp", 1)
    sharded = "FSDP" in row["dp_kind"] or "ZeRO-3" in row["dp_kind"]
    distributed = "optimizer" in row["dp_kind"]
    vocab, multiple = number(row, "vocab"), 128 * tp
    if llama:
        padded = vocab
    elif row["source_group"].startswith("vtrain"):
        padded = vocab // tp * tp
    else:
        padded = math.ceil(vocab / multiple) * multiple
    heads, seq = number(row, "heads"), number(row, "seq_len")
    micro_batch, count = micro_batches_of(row)
    machine = machine_of(row["source_group"], row["gpu"])
    traced = Traced(
        llama,
        padded,
        number(row, "hidden"),
        number(row, "layers"),
        heads,
        number(row, "kv_heads", heads),
        number(row, "ffn"),
        seq,
        seq,
        micro_batch,
        tp,
        row["sp"] == "1" and tp > 1,
        "fsdp" if sharded else "dp",
        min(dp, 2),
        recompute_of(row),
        sharded and dp * context > 1,
        _plan(tp, torchs_own="DTensor" in row["framework"], sharded=sharded),
        llama and not sharded,
        context,
        number(row, "layers") // EVERY_SECOND if row["ac"].startswith(SELECTIVE_LAYER) else None,
        sharded and number(row, "pp") > 1,
    )
    axes = (("pp", number(row, "pp")), (traced.data_axis, dp), ("cp", context), ("tp", tp))
    setup = Setup(
        Mesh(axes),
        micro_batches=count,
        chunks=number(row, "vp", 1) or 1,
        attention=attention_of(row),
        recompute_attention=row["ac"] == "selective (attn core)",
        compiled=row["compile"] == "1" or row["framework"].startswith(FUSED),
        compiled_loss=row["compile"] == "1"
        and "torchtitan" in row["framework"]
        and row["date"] >= COMPILED_LOSS,
        matmul_dtype="float8" if any(name in row["precision"] for name in FP8) else None,
        scaling=scaling_of(row),
        overlap_data=distributed and row["framework"] != SIMUMAX,
        sums_float32=row["framework"] == SIMUMAX,
        overlap_tensor=row["tp_overlap"] not in ("", "none"),
        optimizer_shards=dp * context if distributed else 1,
        precision=Precision.TRACED if traced.mixed else Precision.MASTER,
        waits_for_device=row["framework"] in TIMED_PASSES,
        allocator=EXPANDABLE if "torchtitan" in row["framework"] else PYTORCHS,
    )
    return Job(traced, setup, machine, per_node_of(row, machine))


def recompute_of(row: Row) -> str:
    if row["ac"].startswith(SELECTIVE_LAYER):
        return "full"
    return {"full": "full", "selective-op": "selective-ops"}.get(row["ac"], "none")


def attention_of(row: Row) -> AttentionKernel | None:
    """The kernel that the row's trainer ran, where it isn't PyTorch's or cuDNN's of today."""
    if row["framework"] in UNFUSED:
        return AttentionKernel.UNFUSED
    return next((kernel for name, kernel in GENERATIONS.items() if name in row["framework"]), None)


def scaling_of(row: Row) -> Scaling:
    """torchao's rows name theirs; all others run Transformer Engine, by scales of steps before."""
    named = [scaling for scaling in Scaling if scaling in row["precision"]]
    return named[0] if named else Scaling.DELAYED


def per_node_of(row: Row, machine: str) -> int | None:
    """Where its nodes have fewer GPUs than those of the machine file, whose switches join one node."""
    stated, known = number(row, "gpus_per_node", SWITCHED), machine_called(machine).devices_per_node
    return stated if known == SWITCHED and stated < known else None


def micro_batches_of(row: Row) -> tuple[int, int]:
    """(sequences of one, how many a rank's pipeline or accumulation has). torch's schedules take no fewer
    than there are stages: what torchtitan then cuts up is the local batch, into single sequences
    (pipeline_parallel_microbatch_size = 1)."""
    size, dp, stages = number(row, "micro_batch"), number(row, "dp"), number(row, "pp")
    count = number(row, "global_batch") // (dp * size) or number(row, "grad_accum", 1)
    if "DTensor" in row["framework"] and stages > 1 and count < stages:
        return 1, count * size
    return size, count


def _plan(tp: int, *, torchs_own: bool, sharded: bool) -> str:
    """A built-in plan, whose loss is Megatron's, or PyTorch's own styles and loss."""
    if tp == 1:
        return "unsharded" if sharded else "replicated"
    return "rowwise@dtensor" if torchs_own else "rowwise"


def left_out(row: Row, job: Job) -> Job:
    """The same job without what was fitted to the row's own group."""
    if row["source_group"] == "vtrain-single":
        return replace(job, machine="a100-sxm-80gb", is_fitted=False)
    if row["source_group"] == "torchtitan-benchmarks":
        return replace(job, setup=replace(job.setup, overlap_tensor=False))
    return job


def by_program(rows: Iterable[Row]) -> list[list[tuple[Row, Job]]]:
    """Rows that share a Program, together."""
    groups: dict[Traced | TracedMixture, list[tuple[Row, Job]]] = {}
    for row in rows:
        job = job_of(row)
        groups.setdefault(job.traced, []).append((row, job))
    return list(groups.values())


def not_taken(rows: Iterable[Row]) -> Iterator[NotTaken]:
    """Rows over cp, ep or pp that aren't predicted, those together that are alike."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    for row in rows:
        axes = [axis for axis in ("pp", "cp", "ep") if number(row, axis, 1) > 1]
        reason = why_not(row) if axes else None
        if reason is not None:
            counts[row["source_group"], row["model"], ", ".join(axes), reason] += 1
    for (group, model, over, reason), count in sorted(counts.items()):
        yield NotTaken(group, model, over, reason, count)


def read_rows() -> list[Row]:
    with DATA.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
