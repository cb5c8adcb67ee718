"""hf: a tp_plan and the DistributedConfig that transformers 5.23 and 5.24 take, with which from_pretrained
shards; and the same done to a model without weights, which can be proved.

transformers cuts no sequence, and has no loss that takes logits cut by vocabulary. Its colwise style sums the
gradient of its input by itself, once for each layer that takes it. What has no rule in TP_PLAN keeps the
model's own, so that each of those is named here: "replicate" where nothing is to be done.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from shardwise.core.errors import ModelError
from shardwise.core.export import File, LeftOut
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.plan import Plan, Rule, Style, StyleName
from shardwise.export.building import building, configuration, is_hugging_face
from shardwise.export.code import Raw, Table, attribute, call, checked_name, file, statement, text
from shardwise.export.heads import doc, head
from shardwise.export.job import Job, Written, check_axes
from shardwise.export.nearest import Unsaid, nearest, without_sequence
from shardwise.parallel.resolve import head_of
from shardwise.parallel.sharder import Assignment

ABOUT = "transformers' tp_plan and DistributedConfig, for from_pretrained"
NAME = "sharded.py"
_MODULES = {"transformers.distributed.tensor_parallel": ("apply_tensor_parallelism",)}
_BF16 = ("bfloat16", "float32")
_GATHERED_ONCE = "transformers' colwise layers sum the gradient of their input each by itself."


def write(job: Job) -> Written:
    """Raises ModelError for a model that isn't transformers', and what nearest() raises."""
    if not is_hugging_face(job.source):
        raise ModelError(
            f"--as hf: {job.source.name} is no Hugging Face model, which is what transformers shards. Use "
            "--model hf:TYPE, or --as pytorch."
        )
    check_axes(job, "hf")
    job, left_out = _said(job)
    left_out += tuple(_settings_left_out(job))
    body = configuration(job.source) + _plan(job) + _config(job) + _load(job) + _sharding(job)
    body += building(job.source, call="shard(model, mesh)")
    made = file(head(job, left_out), doc(job, "by transformers"), body, _MODULES)
    return Written((File(NAME, made),), left_out, job.plan if left_out else None, prove="build")


def _said(job: Job) -> tuple[Job, tuple[LeftOut, ...]]:
    """The nearest plan that transformers can say."""
    if job.plan is None:
        return job, ()
    left_out: list[LeftOut] = []
    plan, cut_sequence = without_sequence(job.plan)
    if cut_sequence:
        left_out.append(
            LeftOut(
                "activations cut along the sequence between blocks",
                "whole on every rank",
                "transformers' enable_sequence_parallel does nothing yet.",
            )
        )
    plan, more = _whole_logits(plan, job)
    left_out += more
    job, more_left_out = nearest(job.under(plan), "hf", lambda each: _unsaid(each, job))
    assert job.plan is not None
    plan = _without_gathers(job.plan)
    if plan != job.plan:
        left_out.append(
            LeftOut("one sum of the gradient of each block's input", "one for each layer", _GATHERED_ONCE)
        )
    return job.under(plan), (*left_out, *more_left_out)


def _whole_logits(plan: Plan, job: Job) -> tuple[Plan, list[LeftOut]]:
    """The head's logits are gathered: transformers has no loss of logits that are cut."""
    head_name = next((name for name, each in job.model.named_modules() if each is head_of(job.model)), "")
    rule = plan.rule_for(head_name)
    if rule is None or rule.style.name is not StyleName.COLWISE or rule.style.output not in (None, Shard(-1)):
        return plan, []
    new = replace(rule, style=replace(rule.style, output=Replicate()))
    rules = tuple(new if each == rule else each for each in plan.rules)
    why = "transformers has no loss of logits that are cut."
    return replace(plan, rules=rules), [LeftOut("logits cut by vocabulary", "gathered on every rank", why)]


def _without_gathers(plan: Plan) -> Plan:
    """Each colwise layer sees to its own input."""
    return replace(plan, rules=tuple(each for each in plan.rules if not _only_gathers(each)))


def _only_gathers(rule: Rule) -> bool:
    style = rule.style
    return style == Style(StyleName.GATHER_INPUT, input=style.input)


def _unsaid(assignment: Assignment, job: Job) -> Unsaid | None:
    style, module = assignment.style, assignment.module
    if style.pieces or style.parameters or style.divide or style.cut or style.every_input:
        return Unsaid("transformers' tp_plan says a style for a module, and nothing more")
    match style.name:
        case StyleName.COLWISE | StyleName.ROWWISE if not isinstance(module, nn.Linear | nn.Embedding):
            return Unsaid(f"transformers cuts linear layers and tables, and not {type(module).__name__}")
        case StyleName.ROWWISE if style.gradient is not None:
            return Unsaid("transformers sums no gradient of what a rowwise layer gives")
        case StyleName.ROUTED | StyleName.EXPERTS | StyleName.SPLIT_INPUT | StyleName.SEQUENCE_PARALLEL:
            return Unsaid(f"transformers has no style like {style.name}")
        case StyleName.GATHER_INPUT if style.output is not None:
            return Unsaid("transformers sums nothing that a module with others inside gives")
        case StyleName.WHOLE if Shard(-1) in _ends(assignment):
            return Unsaid("transformers gathers no features for a module between layers that are cut")
    return None


def _ends(assignment: Assignment) -> tuple[Placement, Placement]:
    return assignment.sharder.input_of(assignment.style), assignment.sharder.output_of(assignment.style)


def _style(assignment: Assignment) -> str:
    style, is_table = assignment.style, isinstance(assignment.module, nn.Embedding)
    match style.name:
        case StyleName.COLWISE if is_table:
            return "embedding_colwise"
        case StyleName.ROWWISE if is_table:
            return "embedding_rowwise"
        case StyleName.COLWISE:
            is_whole = assignment.sharder.output_of(style) == Replicate()
            return "colwise_gather_output" if is_whole else "colwise"
        case StyleName.ROWWISE:
            return "rowwise_split_input" if assignment.sharder.input_of(style) == Replicate() else "rowwise"
        case StyleName.REPLICATE if style.gradient == Partial():
            return "replicated_with_grad_allreduce"
    return "replicate"


def _plan(job: Job) -> str:
    if job.plan is None:
        return ""
    own: dict[str, str] = getattr(job.model, "tp_plan", None) or {}
    found = {checked_name(each.name): _style(each) for each in job.assignments}
    rules = {
        pattern: style
        for pattern, style in job.patterns(found).items()
        if style != "replicate" or pattern in own
    }
    rules |= {checked_name(pattern): "replicate" for pattern in own if pattern not in rules}
    table = Table(
        tuple((pattern, Raw(text(style))) for pattern, style in rules.items()),
        tuple(_comments(rules)),
        is_open=True,
    )
    return "\n" + statement("TP_PLAN = ", table)


def _comments(rules: dict[str, str]) -> Iterator[tuple[str, str]]:
    said = {
        "replicated_with_grad_allreduce": "on a rank's own heads: its gradient is a part, which is summed",
        "colwise_gather_output": "logits are gathered: the loss wants them whole",
        "replicate": "the model's own plan has a rule for it, which this one replaces",
    }
    for pattern, style in rules.items():
        if style in said:
            yield pattern, said.pop(style)


def _config(job: Job) -> str:
    step, mesh = job.step, job.mesh
    sizes = {"tp_size": mesh.tp, "fsdp_size": mesh.fsdp}
    replicas = mesh.data_parallel // mesh.fsdp
    sizes |= {"dp_replicate_size": replicas} if replicas > 1 else {}
    more: dict[str, Raw] = {"tp_plan": Raw("TP_PLAN")} if job.plan is not None else {}
    if (step.param_dtype, step.reduce_dtype) == _BF16:
        more["fsdp_mixed_precision"] = Raw("True")
    layers = job.layers
    fsdp_plan = None
    if mesh.shard_axes and not step.reshard_after_forward and layers is not None:
        fsdp_plan = Table(((f"{checked_name(layers.prefix)}.*", Raw('"keep_full_weight"')),))
    made = call(
        "DistributedConfig",
        **{key: Raw(str(size)) for key, size in sizes.items()},
        **more,
        fsdp_plan=fsdp_plan,
    )
    return "\n" + statement("CONFIGURATION = ", made)


def _load(job: Job) -> str:
    recompute = "    model.gradient_checkpointing_enable()\n" if job.step.recompute != "none" else ""
    return (
        "\n\ndef load(path: str) -> nn.Module:\n"
        '    """A checkpoint, of which each of torchrun\'s ranks reads its part."""\n'
        "    model = AutoModelForCausalLM.from_pretrained(\n"
        "        path,\n        distributed_config=CONFIGURATION,\n    )\n"
        f"{recompute}    return model.train()\n"
    )


def _sharding(job: Job) -> str:
    """As from_pretrained shards, of a model that is there already."""
    lines = "\n\ndef shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:\n"
    lines += '    """Shards tensors as from_pretrained does; FSDP is left to others."""\n'
    if job.plan is None:
        return lines + "    return model\n"
    tied = list(job.tied())
    for _, other in tied:
        holder, _, own = other.rpartition(".")
        place = f"{attribute('model', holder)}.{own}"
        lines += f"    {place} = nn.Parameter({place}.detach())  # tied again below\n"
    lines += (
        "    rules = model._expand_parallel_plan(TP_PLAN)\n"
        '    apply_tensor_parallelism(model, mesh["tp"], rules)\n'
    )
    lines += "    model.tie_weights()\n" if tied else ""
    return lines + "    return model\n"


def _settings_left_out(job: Job) -> Iterator[LeftOut]:
    step = job.step
    precision = (step.param_dtype, step.reduce_dtype)
    if precision not in ((None, None), _BF16):
        yield LeftOut(
            f"mixed precision {step.param_dtype}, reduced in {step.reduce_dtype}",
            "none",
            "transformers' fsdp_mixed_precision is bfloat16, reduced in float32.",
        )
    if step.recompute == "selective-ops":
        why = "transformers recomputes whole layers."
        yield LeftOut("recompute selective-ops", "full", why)
