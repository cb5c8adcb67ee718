"""The parts of a Python file that trains a model under a plan in plain PyTorch: how it is sharded, the
training step, how the model is built, a short run. Each is text that `ruff format` leaves as it is."""

from collections.abc import Iterable, Iterator

from shardwise.core.case import StepSettings
from shardwise.core.mesh import REPLICAS_AXIS, SHARDS_AXIS, TENSOR_AXIS
from shardwise.core.op_names import ALTERNATE_MATMULS, KEPT_OPS
from shardwise.export.code import Raw, attribute, call, statement, text
from shardwise.export.job import Job
from shardwise.export.torch_styles import TorchStyles

WHOLE = '''

class Whole(ParallelStyle):
    """Parameters that are whole on every rank; plain tensors in and out.

    given: how the input lies; used: what the module is given; gives: what comes out.
    """

    def __init__(self, given=Replicate(), used=None, gives=None):
        self.given, self.used, self.gives = given, used or given, gives

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def take(_, args, kwargs):
            taken = {name: self._placed(each, mesh) for name, each in kwargs.items()}
            return tuple(self._placed(each, mesh) for each in args), taken

        def give(_, inputs, output):
            if self.gives is not None:
                output = output.redistribute(placements=[self.gives])
            return output.to_local()

        module.register_forward_pre_hook(take, with_kwargs=True)
        module.register_forward_hook(give)
        return distribute_module(module, mesh)

    def _placed(self, each, mesh):
        if not isinstance(each, Tensor):
            return each
        if not isinstance(each, DTensor):
            each = DTensor.from_local(each, mesh, [self.given], run_check=False)
        return each.redistribute(placements=[self.used])
'''

PLAIN = '''

class Plain(ParallelStyle):
    """A module that all ranks run whole, on plain tensors, whatever it does with its parameters.

    given: how the first tensor lies that it takes; gives: how the first lies that it gives.
    """

    def __init__(self, given=Replicate(), gives=Replicate()):
        self.given, self.gives = given, gives

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        forward = module.forward

        def run(*args, **kwargs):
            own = (*module.named_parameters(), *module.named_buffers())
            plain = {name: each.to_local() for name, each in own if isinstance(each, DTensor)}
            values = dict(enumerate(args)) | kwargs
            first = next(name for name, each in values.items() if isinstance(each, Tensor))
            values[first] = moved(values[first], self.given, Replicate())
            args = [values.pop(place) for place in range(len(args))]
            module.forward = forward  # for functional_call, which calls the module
            try:
                given = functional_call(module, plain, tuple(args), values)
            finally:
                module.forward = run
            if isinstance(given, Tensor):
                return moved(given, Replicate(), self.gives)
            return moved(given[0], Replicate(), self.gives), *given[1:]

        def moved(tensor, before, after):
            placed = DTensor.from_local(tensor, mesh, [before], run_check=False)
            return placed.redistribute(placements=[after]).to_local()

        module.forward = run
        return distribute_module(module, mesh)
'''

_OWN = {"Whole": WHOLE, "Plain": PLAIN}


def own_styles(styles: TorchStyles) -> str:
    """The classes that PyTorch has no style for, those that the table names."""
    names = {code.name for _, code in styles.table.items if hasattr(code, "name")}
    return "".join(text for name, text in _OWN.items() if name in names)


def _overloads(names: Iterable[str]) -> Iterator[str]:
    """`aten::mm` as code."""
    return (f"torch.ops.{name.replace('::', '.')}.default" for name in names)


SELECTIVE = (
    "\nKEPT = (\n"
    + "".join(f"    {each},\n" for each in _overloads(KEPT_OPS))
    + f")\nMATMULS = ({', '.join(_overloads(ALTERNATE_MATMULS))})\n"
    + '''

def selective_ops():
    """Keeps attention, what was reduce-scattered, and every second matmul."""
    matmuls = {again: count(1) for again in (False, True)}

    def policy(context, op, *args, **kwargs):
        if op in KEPT or (op in MATMULS and next(matmuls[context.is_recompute]) % 2):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
'''
)


def parallelize(job: Job, styles: TorchStyles | None) -> str:
    """The function that shards a model in place: tensors over tp, layers recomputed, FSDP2 over the rest."""
    body = _tensors(job, styles) + _recompute(job) + _fsdp(job)
    before = own_styles(styles) if styles is not None else ""
    before += SELECTIVE if job.step.recompute == "selective-ops" else ""
    doc = '    """Shards the model in place, over the axes of `mesh`: ' + f'{_axes(job)}."""\n'
    return (
        f"{before}\n\ndef parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:\n"
        f"{doc}{body}    return model\n"
    )


def _axes(job: Job) -> str:
    return ", ".join(name for name, size in job.mesh.axes if size > 1) or "none"


def _axis(job: Job, name: str) -> str:
    """The 1-D mesh of an axis."""
    return f"mesh[{text(name)}]"


def _tensors(job: Job, styles: TorchStyles | None) -> str:
    if styles is None:
        return ""
    lines = statement(f"tp = {_axis(job, TENSOR_AXIS)}", Raw(""), 1).rstrip() + "\n"
    lines += statement("styles = ", styles.table, 1)
    lines += "    parallelize_module(model, tp, styles)\n"
    for name, other in styles.job.tied():
        holder, _, own = other.rpartition(".")
        first, _, first_own = name.rpartition(".")
        lines += "    # styles make parameters anew: what was one is tied again\n"
        lines += f"    {attribute('model', holder)}.{own} = {attribute('model', first)}.{first_own}\n"
    for number, (pattern, own) in enumerate(styles.counts):
        lines += "    # counts of what is cut are a rank's own\n" if not number else ""
        lines += _divided(job, pattern, own)
    return lines


def _divided(job: Job, pattern: str, own: str) -> str:
    layers = job.layers
    prefix = f"{layers.prefix}." if layers is not None else None
    if layers is not None and prefix is not None and pattern.startswith(f"{prefix}*"):
        module = attribute("layer", pattern[len(prefix) + 2 :])
        return (
            f"    for layer in {attribute('model', layers.prefix)}:\n        {module}.{own} //= tp.size()\n"
        )
    return f"    {attribute('model', pattern)}.{own} //= tp.size()\n"


def _recompute(job: Job) -> str:
    if job.step.recompute == "none" or job.layers is None:
        return ""
    more = ", context_fn=selective_ops" if job.step.recompute == "selective-ops" else ""
    said = f"layer.forward = partial(checkpoint, layer.forward, use_reentrant=False{more})"
    if len(said) + 8 > 88:
        said = (
            "layer.forward = partial(\n"
            f"            checkpoint, layer.forward, use_reentrant=False{more}\n        )"
        )
    layers = attribute("model", job.layers.prefix)
    return f"    for layer in {layers}:  # each keeps its input alone\n        {said}\n"


def _fsdp(job: Job) -> str:
    """FSDP2 over fsdp, with dp before it as replicas of the shards; a unit per layer, then the rest."""
    if not job.mesh.shard_axes:
        return ""
    has_replicas = job.mesh.size(REPLICAS_AXIS) > 1
    axes = f"{text(REPLICAS_AXIS)}, {text(SHARDS_AXIS)}" if has_replicas else text(SHARDS_AXIS)
    step = job.step
    lines = f"    fsdp = mesh[{axes}]\n"
    policy = ""
    if step.param_dtype or step.reduce_dtype:
        made = call(
            "MixedPrecisionPolicy",
            param_dtype=_dtype(step.param_dtype),
            reduce_dtype=_dtype(step.reduce_dtype),
        )
        lines += statement("policy = ", made, 1)
        policy = ", mp_policy=policy"
    layers = job.layers
    if layers is not None:
        keeps = "" if step.reshard_after_forward else ", reshard_after_forward=False"
        lines += f"    for layer in {attribute('model', layers.prefix)}:\n"
        lines += f"        fully_shard(layer, mesh=fsdp{policy}{keeps})\n"
    lines += f"    fully_shard(model, mesh=fsdp{policy})\n"
    return lines + (
        "    for module in model.modules():  # sums: the loss is of all ranks' tokens already\n"
        "        if isinstance(module, FSDPModule):\n"
        "            module.set_gradient_divide_factor(1.0)\n"
        "            module.set_force_sum_reduction_for_comms(True)  # gloo knows no factor\n"
    )


def _dtype(name: str | None) -> Raw | None:
    return Raw(f"torch.{name}") if name else None


def train_step(job: Job, *, cut_logits: bool, takes_output: bool = False) -> str:
    """One optimizer step. takes_output: how logits are taken of what the model gives."""
    step, axes = job.step, job.mesh.token_axes
    lines = [
        "\n\ndef train_step(model, batch, optimizer, mesh=None):\n",
        '    """One step on this rank\'s part of the batch (ids, labels), both [B, S].\n\n'
        '    Returns the mean loss over all ranks\' tokens, and the norm before clipping.\n    """\n',
        "    ids, labels = batch\n    valid = (labels != -100).sum()\n",
    ]
    sums = [f"dist.all_reduce({{}}, group=mesh.get_group({text(axis)}))" for axis in axes]
    if sums:
        lines.append("    if mesh is not None:  # ranks may have unequally many labels\n")
        lines += [f"        {each.format('valid')}\n" for each in sums]
    inner, micro = "    ", step.accumulation > 1
    lines.append("    total = torch.zeros((), device=labels.device)\n" if micro else "")
    if micro:
        lines.append(f"    parts = zip(ids.chunk({step.accumulation}), labels.chunk({step.accumulation}))\n")
        lines.append(
            "    for number, (ids, labels) in enumerate(parts, 1):\n"
            if _once(step, job)
            else "    for ids, labels in parts:\n"
        )
        inner = "        "
        if _once(step, job):
            lines.append(
                f"{inner}if isinstance(model, FSDPModule):  # gradients are reduced once a step\n"
                f"{inner}    model.set_requires_gradient_sync(number == {step.accumulation})\n"
                f"{inner}    model.set_is_last_backward(number == {step.accumulation})\n"
            )
    if cut_logits:
        lines.append(f"{inner}with loss_parallel() if mesh is not None else nullcontext():\n")
        inner += "    "
    lines += [f"{inner}{line}\n" for line in _loss(takes_output)]
    inner = inner[4:] if cut_logits else inner
    if cut_logits:
        lines.append(f"{inner}loss = loss.full_tensor() if isinstance(loss, DTensor) else loss\n")
    lines.append(f"{inner}total = {'total + ' if micro else ''}loss.detach()\n")
    lines.append(_sums_replicas(job))
    if sums:
        lines.append("    if mesh is not None:\n")
        lines += [f"        {each.format('total')}\n" for each in sums]
    lines.append(
        f"    norm = nn.utils.clip_grad_norm_(model.parameters(), {step.max_norm!r})\n"
        "    optimizer.step()\n    optimizer.zero_grad()\n"
        "    return total, norm.full_tensor() if isinstance(norm, DTensor) else norm\n"
    )
    return "".join(lines)


def _once(step: StepSettings, job: Job) -> bool:
    return step.reduce_once and bool(job.mesh.shard_axes)


def _loss(takes_output: bool) -> tuple[str, ...]:
    taken = (
        ("output = model(ids)", "logits = output if isinstance(output, Tensor) else output.logits")
        if takes_output
        else ("logits = model(ids)",)
    )
    return (
        *taken,
        "logits = logits.flatten(0, 1)",
        "logits = logits if logits.dtype == torch.float64 else logits.float()",
        'loss = F.cross_entropy(logits, labels.flatten(), reduction="sum") / valid',
        "loss.backward()",
    )


def _sums_replicas(job: Job) -> str:
    """Over dp alone nobody else sums gradients."""
    if job.mesh.shard_axes or job.mesh.size(REPLICAS_AXIS) < 2:
        return ""
    return (
        "    for parameter in model.parameters() if mesh is not None else ():\n"
        "        own = parameter.grad\n"
        "        own = own.to_local() if isinstance(own, DTensor) else own\n"
        f"        dist.all_reduce(own, group=mesh.get_group({text(REPLICAS_AXIS)}))\n"
    )


def main(job: Job) -> str:
    """A run on random ids, for torchrun."""
    names = [name for name, size in job.mesh.axes if size > 1] or [TENSOR_AXIS]
    sizes = [job.mesh.size(name) for name in names]
    shape = f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"
    axes = f"({', '.join(map(text, names))}{',' if len(names) == 1 else ''})"
    part = "dist.get_rank()" if job.mesh.tp == 1 else f"dist.get_rank() // {job.mesh.tp}"
    made = call("init_device_mesh", Raw("device"), Raw(shape), mesh_dim_names=Raw(axes))
    return (
        "\n\ndef main() -> None:\n"
        '    device = "cuda" if torch.cuda.is_available() else "cpu"\n'
        + statement("mesh = ", made, 1)
        + "    torch.manual_seed(0)  # the same weights on all ranks, before they are cut\n"
        + f"    model = build().to(device{_in_dtype(job.step)})\n"
        '    vocabulary = getattr(model, "vocab_size", None) or model.config.vocab_size\n'
        "    parallelize(model, mesh)\n"
        + statement(
            "optimizer = ",
            call("torch.optim.AdamW", Raw("model.parameters()"), lr=Raw(repr(job.step.learning_rate))),
            1,
        )
        + f"    torch.manual_seed({part})  # ranks of tp see the same tokens\n"
        "    for step in range(3):\n"
        f"        ids = torch.randint(vocabulary, ({_share(job)}, {job.step.seq or 128}), device=device)\n"
        "        loss, norm = train_step(model, (ids, ids.roll(-1, 1)), optimizer, mesh)\n"
        "        if dist.get_rank() == 0:\n"
        '            print(f"step {step}: loss {loss.item():.4f}, norm {norm.item():.4f}")\n'
        "    dist.destroy_process_group()\n"
        '\n\nif __name__ == "__main__":\n    main()\n'
    )


def _in_dtype(step: StepSettings) -> str:
    return "" if step.dtype == "float32" else f", torch.{step.dtype}"


def _share(job: Job) -> int:
    """Sequences of one rank in a step."""
    share = job.step.batch // job.mesh.data_parallel if job.step.batch else job.step.accumulation
    return max(1, share)
