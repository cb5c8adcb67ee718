"""What one item of a Program costs on a Machine: seconds on the device, seconds of the host that issues it,
and the term it counts to.

    matmul       the machine's tiles and waves, and never less than its bytes take; a share of that rate
                 where rows begin at odd places
    grouped      each group's tiles as one matmul's, load being balanced; and what a group costs beside
    attention    FLOPs over the fused kernel's rate; unfused: its matmuls, and the score matrix B N S S read
                 or written by each kernel between (forward: softmax 2 times, dropout 2; backward: softmax 3,
                 dropout 2; Korthikanti et al. 2022, section 4.1, figure 3). Scale, mask and softmax run
                 apart, in float32, where the fused softmax of those trainers takes no such batch
    look-ups     by elements or bytes, whichever is slower
    collectives  the link's rates of that kind; one that none was measured for takes its start and bandwidth,
                 a reduce the rates of a broadcast; a recv waits for what the other rank sends
    all others   bytes over the rate of that op, else of its kind, else the default

What this file does not know: what runs beside what.
"""

from dataclasses import dataclass
from math import prod

from shardwise.core.collective import TO_ONE_RANK, CollectiveKind, wire_bytes
from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.errors import MachineError
from shardwise.core.grouped import GROUPED, grouped_product
from shardwise.core.machine import FRESH, Link, Machine, MatmulRate
from shardwise.core.mesh import Role, role_of
from shardwise.core.prediction import AttentionKernel, Precision, Scaling, Setup, Term
from shardwise.core.program import IN_LAYERS, LOSS_MODULE, ONCE, Collective, Op, OpKind, Phase, TensorSpec
from shardwise.predict.float8 import CAST, ROWWISE_SHARE
from shardwise.predict.groups import RankGroup

SCORE_PASSES = {False: 4, True: 5}  # forward, backward
UNFUSED_LAUNCHES = {False: 6, True: 10}
FUSED_SOFTMAX_OF = 4
"""Megatron's fused softmax takes batches x heads that are a multiple of this (its FusedScaleMaskSoftmax:
is_kernel_available, attn_batches % 4 == 0). Else five ops do in the forward what it does in one: to float32,
scale, mask, softmax, to half; and their gradients."""

APART_PASSES = {False: 16, True: 17}
"""Beyond SCORE_PASSES, in reads or writes of the scores in half precision: forward 6 + 8 + 8 + 8 + 6 bytes
for the 4 of the fused one; backward 6 + 12 + 8 + 8 + 6 for its 6."""

APART_LAUNCHES = 4
ALIGNED_BYTES = 4
"""Tensor cores are fed by copies that go beside the multiplying, and those take no fewer bytes (PTX ISA,
cp.async: 4, 8 or 16), so rows must begin at multiples of them."""

FUSED_TRAFFIC = 0.5
"""Share of eager traffic that is left where a compiler fuses kernels between matmuls."""

FUSED_LOSS_TRAFFIC = 0.2
"""The same of a loss: two reads of the logits forward, one and a write backward, 8 of the 40 bytes that eager
kernels move for a logit in half precision (to float32 6, log-softmax 8, its gradient 4 + 12, to half 6, fill
4). Of logits in float32 it would be 16 of 28, and is counted too low."""

SUMMED_WIDE = {False: 2.0, True: 1.5}
"""What a sum in float32 sends for one in half precision; where ranks share the optimizer (True), a
reduce-scatter in float32 and an all-gather in half for an all-reduce in half."""

TENSOR_HIDDEN = 0.33
"""Of all-gathers and reduce-scatters that are cut up to run beside the matmul that takes or makes them, the
share that is hidden. Fitted to the six pairs of rows with and without async TP that torchtitan published:
median of what it saved over what is predicted for them (hidden_share in benchmarks/published_results.py)."""

EFFICIENT = "efficient"
"""PyTorch's memory-efficient attention in half precision, as a machine file calls it."""

_CHUNKED = (CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER)
_FUSIBLE = (OpKind.ELEMENTWISE, OpKind.NORM, OpKind.SOFTMAX, OpKind.REDUCTION, OpKind.COPY, OpKind.FILL)
_OTHER_HALF = {"float16": "bfloat16", "bfloat16": "float16"}


@dataclass(frozen=True, slots=True)
class Cost:
    """device_s: on its stream. host_s: to issue it. known: False where nobody knows what the device runs."""

    device_s: float
    host_s: float
    term: Term
    known: bool = True


def op_cost(op: Op, machine: Machine, setup: Setup, context: int = 1, dtype: str | None = None) -> Cost:
    """Of one op on its stream. context: ranks that share each sequence, where the op was traced without
    them. dtype: that a matmul runs in, where it isn't its matrices'."""
    backward = op.phase is Phase.BACKWARD
    issue_s = (machine.launch.backward_s if backward else machine.launch.forward_s) or 0.0
    if op.on_host:
        return Cost(0.0, issue_s, Term.LAUNCH)
    if op.phase in ONCE:
        if op.kind is OpKind.COPY and setup.precision is Precision.MASTER:
            return Cost(0.0, 0.0, Term.OPTIMIZER)  # gradients lie in one buffer, in float32, from the start
        return Cost(_kernel_s(op, machine), issue_s, Term.OPTIMIZER)
    if op.name == CAST:  # the bytes are a fused kernel's
        return Cost(_kernel_s(op, machine), 0.0 if setup.compiled else issue_s, Term.KERNELS)
    match op.kind:
        case OpKind.MATMUL:
            share = ROWWISE_SHARE if dtype is not None and setup.scaling is Scaling.ROWWISE else 1.0
            return Cost(_matmul_s(op, machine, dtype) / share, issue_s, Term.MATMUL)
        case OpKind.ATTENTION:
            return _attention(op, machine, setup, issue_s, context)
        case OpKind.EMBEDDING:
            return Cost(_kernel_s(op, machine), issue_s, Term.EMBEDDING)
        case OpKind.UNKNOWN:
            if op.flops:
                return _attention(op, machine, setup, issue_s, context)
            return Cost(_kernel_s(op, machine), issue_s, Term.KERNELS, known=op.name in dict(machine.kernels))
        case _:
            seconds = _kernel_s(op, machine)
            in_loss = op.module == LOSS_MODULE
            if op.kind in _FUSIBLE and (setup.compiled_loss if in_loss else setup.compiled):
                return Cost(seconds * (FUSED_LOSS_TRAFFIC if in_loss else FUSED_TRAFFIC), 0.0, Term.KERNELS)
            return Cost(seconds, issue_s, Term.KERNELS)


def _kernel_s(op: Op, machine: Machine) -> float:
    elements = float(max((prod(spec.shape) for spec in op.outputs), default=0))
    first = next(iter((*op.inputs, *op.outputs)), None)
    of_dtype = (f"{op.name} {first.dtype}",) if first is not None else ()
    seconds = machine.kernel(*of_dtype, op.name, op.kind).time_s(op.read_bytes + op.write_bytes, elements)
    return seconds + fresh_memory_s(op, machine)


def _matmul_s(op: Op, machine: Machine, run_in: str | None) -> float:
    dims = matmul_dims(op)
    dtype = (
        run_in or op.inputs[0 if op.name == GROUPED else -1].dtype
    )  # a grouped one's last are its groups' ends
    if dims is None:  # a convolution, a dot product: by its FLOPs at the best tile
        rate = machine.matmul(dtype)
        share = max(tile.share for tile in rate.tiles) if rate is not None else 1.0
        seconds = op.flops / (rate.peak_flops * share) if rate is not None else 0.0
    else:
        seconds = _product_s(machine, dtype, *dims)
        if not is_aligned(op, dims, dtype):
            seconds /= _rate(machine, dtype).unaligned
    seconds = max(seconds, machine.kernel("matmul bytes", "copy").time_s(op.read_bytes + op.write_bytes))
    if op.name == GROUPED and dims is not None:
        seconds += dims[0] * _rate(machine, dtype).group_s
    return seconds + fresh_memory_s(op, machine)


def is_aligned(op: Op, dims: tuple[int, int, int, int], dtype: str) -> bool:
    """Whether rows of what is multiplied begin where tensor cores can fetch them. In a forward both matrices
    lie along k; in a backward each dim is one along which one of the two matmuls' matrices lie (that of the
    tokens is taken for one too)."""
    _, m, n, k = dims
    along = (m, n, k) if op.phase is Phase.BACKWARD else (k,)
    width = DTYPE_BYTES.get(dtype, 4)
    return all(size * width % ALIGNED_BYTES == 0 for size in along)


def fresh_memory_s(op: Op, machine: Machine) -> float:
    """What an op's outputs cost beside it where the allocator takes them anew from the system."""
    known = dict(machine.kernels)
    if FRESH not in known:
        return 0.0
    return sum(known[FRESH].time_s(prod(spec.shape) * DTYPE_BYTES.get(spec.dtype, 4)) for spec in op.outputs)


def _rate(machine: Machine, dtype: str) -> MatmulRate:
    rates = (machine.matmul(each) for each in (dtype, _OTHER_HALF.get(dtype, dtype), "float32"))
    return next((rate for rate in rates if rate is not None), machine.matmuls[0][1])


def _product_s(machine: Machine, dtype: str, batch: int, m: int, n: int, k: int) -> float:
    return _rate(machine, dtype).time_s(batch, m, n, k)


def matmul_dims(op: Op) -> tuple[int, int, int, int] | None:
    """(batch, m, n, k); None for what is no plain product."""
    base = op.name.removeprefix("aten::")
    if base in ("mm", "bmm"):
        a, b = op.inputs[0].shape, op.inputs[1].shape
    elif base in ("addmm", "baddbmm"):
        a, b = op.inputs[1].shape, op.inputs[2].shape
    elif op.name == GROUPED:
        made = grouped_product(op.inputs)
        return (made.met, made.m, made.n, made.k)
    else:
        return None
    return (a[0] if len(a) == 3 else 1, a[-2], b[-1], a[-1])


def _attention(op: Op, machine: Machine, setup: Setup, issue_s: float, context: int) -> Cost:
    backward = "backward" in op.name
    q = op.inputs[1 if backward else 0]
    k = op.inputs[2 if backward else 1]
    kernel = setup.attention or (EFFICIENT if runs_efficient(op) else None)
    rate = machine.attention(q.dtype, kernel)
    if rate is None and q.dtype == "float16":
        rate = machine.attention("bfloat16", kernel)
    unfused = setup.attention is AttentionKernel.UNFUSED or op.kind is OpKind.UNKNOWN or rate is None
    if not unfused:
        assert rate is not None
        # one of c ranks meets the keys of all of them: c times the FLOPs of its own part alone, half of which
        # is masked either way
        seconds = rate.time_s(op.flops * context, q.shape[-2] * context, backward=backward)
        return Cost(seconds, issue_s, Term.ATTENTION)
    keys = k.shape[-2] * context
    seconds = _unfused_s(machine, q, keys, backward=backward)
    launches = _unfused_launches(q, backward=backward)
    if backward and setup.recompute_attention:
        seconds += _unfused_s(machine, q, keys, backward=False)
        launches += _unfused_launches(q, backward=False)
    return Cost(seconds, launches * issue_s, Term.ATTENTION)


def runs_efficient(op: Op) -> bool:
    """Whether FlashAttention takes no such attention in half precision (values of another width than keys, a
    mask), so that PyTorch runs its memory-efficient kernel, or cuDNN's: before FlashAttention's where it
    prefers it, on Hopper with heads of 256 at most from cuDNN 9.10 on, else of 128 (PyTorch's sdp_utils.cpp,
    check_cudnn_tensor_shapes)."""
    return "efficient_attention" in op.name and op.inputs[-1].dtype != "float32" and bool(op.flops)


def _fuses_softmax(q: TensorSpec) -> bool:
    batch, heads, *_ = q.shape
    return batch * heads % FUSED_SOFTMAX_OF == 0


def _unfused_launches(q: TensorSpec, *, backward: bool) -> int:
    return UNFUSED_LAUNCHES[backward] + (0 if _fuses_softmax(q) else APART_LAUNCHES)


def _unfused_s(machine: Machine, q: TensorSpec, keys: int, *, backward: bool) -> float:
    batch, heads, sequence, head_dim = q.shape
    dtype = q.dtype
    scores = _product_s(machine, dtype, batch * heads, sequence, keys, head_dim)
    values = _product_s(machine, dtype, batch * heads, sequence, head_dim, keys)
    matmuls = (2 * scores + 2 * values) if backward else (scores + values)
    matrix_bytes = batch * heads * sequence * keys * DTYPE_BYTES.get(dtype, 4)
    passes = SCORE_PASSES[backward] + (0 if _fuses_softmax(q) else APART_PASSES[backward])
    return matmuls + passes * machine.kernel("scores", "softmax").time_s(matrix_bytes)


def collective_cost(
    item: Collective, machine: Machine, setup: Setup, group: RankGroup, packed: float = 1.0
) -> Cost:
    """Of one collective over a group of the whole mesh. packed: the share of its bytes that is sent, where
    what it sends was cast to less."""
    call, size = item.call, group.size
    term = _term_of(item)
    sent = call.wire_bytes if size == call.axis_size else wire_bytes(call.kind, call.payload_bytes, size)
    if call.kind is CollectiveKind.RECV:
        sent = float(call.payload_bytes)
    if item.by_data is not None:
        sent = max(sent, item.by_data.max_bytes)  # the hottest rank sets the time
    seconds = collective_s(machine, call.kind, sent * packed, call.payload_bytes * packed, group)
    if _hides_tensor(machine, setup) and term is Term.TENSOR and call.kind in _CHUNKED:
        seconds *= 1 - TENSOR_HIDDEN
    if setup.sums_float32 and item.phase is Phase.REDUCE:
        seconds *= SUMMED_WIDE[setup.optimizer_shards > 1] if DTYPE_BYTES.get(call.dtype) == 2 else 1.0
    issue_s = machine.launch.collective_s or 0.0
    return Cost(seconds, issue_s, term, known=call.kind is not CollectiveKind.UNKNOWN)


def _hides_tensor(machine: Machine, setup: Setup) -> bool:
    """On a CPU, host and device in one, nothing runs beside."""
    return setup.overlap_tensor and machine.device != "cpu"


def _term_of(item: Collective) -> Term:
    """What is exchanged between a layer's ops counts to its axis; what sums and gathers parameters, gradients
    and losses to data."""
    match role_of(item.call.axis):
        case Role.CUTS_TENSORS:
            return Term.TENSOR
        case Role.CUTS_EXPERTS if item.phase in IN_LAYERS:
            return Term.EXPERTS
        case Role.CUTS_SEQUENCE if item.phase in IN_LAYERS:
            return Term.CONTEXT
        case _:
            return Term.DATA


def collective_s(
    machine: Machine, kind: CollectiveKind, sent: float, payload: float, group: RankGroup
) -> float:
    """Seconds in which each of the group's ranks sends `sent` bytes. Over several nodes a ring passes every
    node's NICs: of L local ranks each has one, so the ring runs at L NICs' rate, and never faster than the
    link within. In an all-to-all each rank's bytes for other nodes go through its own NIC, while those for
    its node go over the link within."""
    size = group.size
    if size == 1:
        return 0.0
    local = group.local(machine.devices_per_node)
    within = _within_s(machine.within, kind, sent, min(local, size)) if local > 1 else 0.0
    if local >= size or machine.between is None:
        return within if local > 1 else _within_s(machine.within, kind, sent, size)
    link, nodes = machine.between, -(-size // local)
    if kind is CollectiveKind.ALL_TO_ALL:  # what is for other nodes goes through the rank's own NIC
        near, sent = sent * (local - 1) / (size - 1), sent * (size - local) / (size - 1)
        within = _within_s(machine.within, kind, near, local) if local > 1 else 0.0
        rate = link.bytes_per_s * link.share_at(payload / local * machine.devices_per_node)
        return max(link.start_s + link.start_per_hop_s * nodes + sent / rate, within)
    # each NIC carries 1/local of it, but one rank's message goes through its own
    nics = 1 if kind in TO_ONE_RANK else local
    rate = link.bytes_per_s * link.share_at(payload / nics * machine.devices_per_node) * nics
    return max(link.start_s + link.start_per_hop_s * nodes + sent / rate, within)


def _within_s(link: Link, kind: CollectiveKind, sent: float, ranks: int) -> float:
    if not link.is_known:
        raise MachineError(
            "the machine's file has no link: none was measured. "
            "Calibrate with --base MACHINE, whose links are then taken."
        )
    sent /= link.usable(ranks)
    rate = link.rate(CollectiveKind.BROADCAST if kind is CollectiveKind.REDUCE else kind, ranks)
    return rate.time_s(sent) if rate is not None else link.start_s + sent / link.bytes_per_s
