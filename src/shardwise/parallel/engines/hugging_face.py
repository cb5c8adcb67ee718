"""Plans `hf` and `hf-ep`: the tensor-parallel plan that a Hugging Face model brings along, and with it that
of its experts (hugging_face_experts.py), carried out by transformers itself. A peer is not mended.

transformers merges config.base_model_tp_plan, the class's _tp_plan and an embedding rule of its own, expands
`*` to the layers that there are, and shards parameters and replaces forwards in place. That is what
from_pretrained(distributed_config=...) does before it loads weights, and it ties tied weights again
afterwards; so do we. Its styles: transformers/distributed/tensor_parallel.py.
"""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.core.errors import PlanError
from shardwise.core.layer_name import any_layer
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.core.plan import TheirPlan
from shardwise.core.program import RuleUse
from shardwise.core.shown import shown, told
from shardwise.parallel.apply import Applied, check_has_tensor_axis, mark_applied
from shardwise.parallel.engines.hugging_face_experts import (
    experts_mesh,
    experts_plan,
    is_of_experts,
    share_experts_out,
)
from shardwise.parallel.loss import Loss, PlainLoss

FIRST_VERSION = "5.23"
"""Of transformers, that shards as this module has it done."""


def parallelize_hugging_face(model: nn.Module, mesh: DeviceMesh, plan: TheirPlan = TheirPlan.HF) -> nn.Module:
    """Shards a transformers model (real, meta or fake) in place over the "tp" axis of `mesh`, and returns it;
    see parallelize(). plan: hf or hf-ep.

    applied_to(model).foreign then holds the rules. Raises PlanError, before anything is changed, for a model
    without a plan of its own; PlanError too where transformers can't carry it out, and the model is then of
    no use.
    """
    rules = hugging_face_rules(model, plan)
    loss = apply_hugging_face(model, mesh, plan)
    mark_applied(model, Applied(None, loss, foreign=rules))
    return model


def hugging_face_rules(model: nn.Module, plan: TheirPlan = TheirPlan.HF) -> tuple[RuleUse, ...]:
    """The model's rules and the modules, or else the parameters, that each is applied to. Raises PlanError
    for a model without any."""
    tensors, experts = _own_plans(model, plan)
    rules = tensors | experts
    modules: dict[str, list[str]] = {pattern: [] for pattern in rules}
    parameters: dict[str, list[str]] = {pattern: [] for pattern in rules}
    is_module = {name for name, _ in model.named_modules()}
    for name in _expanded(model, tensors) | _expanded(model, experts):
        pattern = any_layer(name)
        if name in is_module:
            modules[pattern].append(name)
        else:  # a module's rule holds for the parameters that it owns
            parameters[pattern if pattern in rules else pattern.rpartition(".")[0]].append(name)
    return tuple(
        RuleUse(pattern, style, tuple(modules[pattern] or parameters[pattern]))
        for pattern, style in rules.items()
    )


def has_plan(model: nn.Module, plan: TheirPlan) -> bool:
    """Whether transformers has the plan for the model: hf, or hf-ep."""
    return bool(getattr(model, "ep_plan" if plan is TheirPlan.HF_EP else "tp_plan", None))


def apply_hugging_face(model: nn.Module, mesh: DeviceMesh, plan: TheirPlan) -> Loss:
    """Has transformers shard `model` in place over the "tp" axis. Returns the loss for its logits, which must
    be whole."""
    tensors, experts = _own_plans(model, plan)
    check_has_tensor_axis(mesh, f'plan "{plan}"')
    sharded = next(
        (name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)), None
    )
    if sharded is not None:
        raise PlanError(f'plan "{plan}": {sharded} is a DTensor already. Build a fresh model.')
    _refuse_sharded_logits(model, _expanded(model, tensors), plan)
    tied = _tied(model)
    _part(model, tied)
    tp_mesh = mesh[TENSOR_AXIS] if mesh.ndim > 1 else mesh
    try:
        _shard(model, mesh, tp_mesh, _expanded(model, tensors), _expanded(model, experts))
        if tied:
            model.tie_weights()  # type: ignore[operator]  # a method of transformers' models
    except Exception as error:
        raise PlanError(
            f'plan "{plan}": transformers can\'t shard {type(model).__name__} over tp={tp_mesh.size()}: '
            f"{told(error)} Use another tp size."
        ) from error
    untied = tied - _tied(model)
    if untied:
        raise PlanError(
            f'plan "{plan}": {" and ".join(sorted(min(untied, key=sorted)))} were one parameter, and '
            "are several when sharded."
        )
    return PlainLoss()


def _shard(
    model: nn.Module, mesh: DeviceMesh, tp_mesh: DeviceMesh, tensors: dict[str, str], experts: dict[str, str]
) -> None:
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    ep_mesh = experts_mesh(mesh) if experts else tp_mesh
    # on one rank a plan of experts leaves its tensors alone
    if tp_mesh.size() > 1 or not experts:
        apply_tensor_parallelism(model, tp_mesh, tensors)
    if experts and ep_mesh.size() > 1:
        share_experts_out(model, ep_mesh, tp_mesh, experts)


def _own_plans(model: nn.Module, plan: TheirPlan) -> tuple[dict[str, str], dict[str, str]]:
    """Rules of tensors, and of experts."""
    tensors = getattr(model, "tp_plan", None)
    if not hasattr(model, "_expand_parallel_plan") or tensors is None:
        raise PlanError(f'plan "{plan}": {_why_none(model)}')
    if plan is TheirPlan.HF_EP:
        experts = experts_plan(model)
        return {rule: style for rule, style in tensors.items() if not is_of_experts(rule, experts)}, experts
    if not tensors:
        raise PlanError(
            f'plan "{plan}": transformers has no tensor-parallel plan for '
            f"{shown(type(model).__name__)}. `shardwise plan` makes one."
        )
    return dict(tensors), {}


def _why_none(model: nn.Module) -> str:
    if hasattr(model, "_tp_plan") or hasattr(model, "tp_plan"):
        from transformers import __version__

        return (
            f"transformers {__version__} shards in another way than this plan has it done. Install "
            f"transformers {FIRST_VERSION} or newer, or name another plan."
        )
    return (
        f"{shown(type(model).__name__)} is no Hugging Face model. Use it with --model hf:TYPE, or name "
        "another plan."
    )


def _expanded(model: Any, plan: dict[str, str]) -> dict[str, str]:
    """Concrete module or parameter name -> style, in the order in which transformers applies them."""
    expanded: dict[str, str] = model._expand_parallel_plan(plan)
    return expanded


def _refuse_sharded_logits(model: Any, expanded: dict[str, str], plan: TheirPlan) -> None:
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if head is not None and expanded.get(str(name)) == "colwise":
        raise PlanError(
            f'plan "{plan}": its head {name} is colwise, so each rank would hold a part of the logits '
            "and none could tell the loss. transformers' own plans say colwise_gather_output."
        )


def _part(model: nn.Module, tied: set[frozenset[str]]) -> None:
    """Gives each of a parameter's places an nn.Parameter of its own on the same memory: transformers shards
    before it ties."""
    for names in tied:
        for name in sorted(names)[1:]:
            module_name, _, own_name = name.rpartition(".")
            module = model.get_submodule(module_name)
            parameter = getattr(module, own_name)
            setattr(module, own_name, nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad))


def _tied(model: nn.Module) -> set[frozenset[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {frozenset(shared) for shared in names.values() if len(shared) > 1}
