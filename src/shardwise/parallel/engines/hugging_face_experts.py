"""Plan `hf-ep`: transformers' expert-parallel plan above its tensor-parallel one, as from_pretrained carries
both out for DistributedConfig(tp_size=N, ep_size=N): each rank has whole experts, which tokens travel to.

Experts are shared out over the ranks of tp; on a mesh with ep, whose ranks see other tokens, over those of
both. Where nobody knows what a router chose (a trace), each expert gets as many tokens as any other, or as
is assumed (models/routing.py): transformers asks the data for the splits.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.errors import PlanError
from shardwise.core.mesh import EXPERTS_AXIS, TENSOR_AXIS, joined
from shardwise.core.shown import shown
from shardwise.models.routing import is_balanced_by_assumption, shared_out
from shardwise.torch_private import flattened

_ASSUMING = "shardwise_auto"


def experts_plan(model: nn.Module) -> dict[str, str]:
    """Pattern -> style, without the rules of the tensor-parallel plan. Raises PlanError where there is
    none."""
    plan: dict[str, str] = getattr(model, "ep_plan", None) or {}
    if not plan:
        raise PlanError(
            f'plan "hf-ep": transformers has no expert-parallel plan for {shown(type(model).__name__)}. Plan '
            '"hf" is its tensor-parallel one; `shardwise plan` makes one for experts too.'
        )
    return dict(plan)


def is_of_experts(pattern: str, plan: dict[str, str]) -> bool:
    """Whether a rule is for a module that the plan of experts has a rule for, or for what is in it: then that
    plan's holds."""
    return any(pattern == rule or pattern.startswith(f"{rule}.") for rule in plan)


def experts_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The 1-D mesh of the ranks that share experts out. All ranks must ask for it."""
    if mesh.ndim == 1:
        return mesh
    names = tuple(name for name in mesh.mesh_dim_names or () if name in (EXPERTS_AXIS, TENSOR_AXIS))
    several = tuple(name for name in names if mesh[name].size() > 1)
    if len(several) < 2:
        return mesh[several[0] if several else TENSOR_AXIS]
    of_both: DeviceMesh = flattened(mesh, several, joined(several))
    return of_both


def share_experts_out(
    model: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh, expanded: dict[str, str]
) -> None:
    """Has transformers do it, in place. expanded: concrete names -> styles."""
    from transformers.distributed.expert_parallel import EPImplementationInterface, apply_expert_parallelism

    if _ASSUMING not in EPImplementationInterface():
        EPImplementationInterface.register(_ASSUMING, _assuming())
    apply_expert_parallelism(model, ep_mesh, tp_mesh, expanded, ep_implementation=_ASSUMING)


def _assuming() -> Any:
    """transformers' default implementation, which a trace can run: what the router chose of fake tokens is
    what is assumed."""
    from transformers.distributed.expert_parallel import AllToAllEP, AutoEP

    class AllToAll(AllToAllEP):
        def _dispatch_tokens(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
            if is_balanced_by_assumption(top_k_index):
                ranks, own = self.ep_mesh.size(), cast(int, self.num_local_experts)
                top_k_index = _assumed(top_k_index, own * ranks, ranks)
            return super()._dispatch_tokens(hidden_states, top_k_index, top_k_weights)

    class Auto(AutoEP):
        def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self.all_to_all = AllToAll(experts, ep_mesh, tp_mesh)

    return Auto


def _assumed(index_NK: Tensor, experts: int, ranks: int) -> Tensor:
    """Experts of each token's choices, made of sizes alone, so that a trace knows them: each as often as
    shared_out() says, and those of a token as far apart as can be."""
    assignments, choices = index_NK.numel(), index_NK.shape[1]
    counts = shared_out(assignments, experts, ranks)
    own = torch.arange(assignments, device=index_NK.device)
    if len(set(counts)) == 1:
        return (own % experts).view(-1, choices)
    expert_A = (own[:, None] >= torch.tensor(counts, device=index_NK.device).cumsum(0)).sum(1)
    return expert_A.view(choices, -1).t().contiguous()
