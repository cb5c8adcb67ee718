"""experts: a mixture's experts shared out over an axis, each rank some of them; tokens go to the ranks that
hold the experts which the router chose, and what these make of them comes back. See parallel/experts.py.

It stands on the module that holds experts as weights [experts, ...] and is called as transformers calls one:
experts(hidden [N, H], top_k_index [N, K], top_k_weights [N, K]).

axis "ep", whose ranks see different sequences (the default): `parameters` may cut experts inside over tp at
once. Then each tp rank has all tokens of its ep rank, and gives its summand: `output` replicate sums it here
(and the parts of the inputs' gradients); without `output` a module around does. With gradient = "partial" tp
ranks that hold experts whole each have a part of the tokens.

axis "tp": the tokens are those of the rank's part of the sequence. With `output` replicate every rank has all
tokens: none travels, each rank computes its own experts' part, and the parts are summed.

An axis of one rank leaves experts as they are, cut inside or not. What a rank computes with is the module's
own forward, with as many experts as the rank holds: its own integer attributes that have the number of
experts, and `expert` in their name, become the rank's.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.core.errors import PlanError
from shardwise.core.held import Held
from shardwise.core.placement import Replicate, Shard
from shardwise.core.plan import ExpertsAxis, Style
from shardwise.parallel import collectives, issuing
from shardwise.parallel.axis import Axis, Site
from shardwise.parallel.counts import divide_counts, set_count
from shardwise.parallel.experts import (
    CALL,
    combined,
    number_of_experts,
    route_to_experts,
    route_within,
    takes_tokens_of_experts,
)
from shardwise.parallel.layers import gather_input, sum_parts
from shardwise.parallel.leaves import HoldingContainer, held_for_sum, own_names, uses_of, wholes
from shardwise.parallel.own_forward import Use, on_local, wrap
from shardwise.parallel.sharder import Assignment, Fit, Work, divisors
from shardwise.parallel.watch import show
from shardwise.torch_private import parameters_of


class ByExpert(HoldingContainer):
    outputs = (Replicate(),)

    def is_shared_out(self, style: Style) -> bool:
        return style.axis is ExpertsAxis.EXPERTS

    def held(self, assignment: Assignment) -> dict[str, Held]:
        style = assignment.style
        if style.axis is ExpertsAxis.TENSORS:
            return {name: Held(Shard(0)) for name in own_names(assignment.module)}
        told = super().held(assignment)
        names = own_names(assignment.module)
        held = {name: Held(Replicate(), gradient=style.gradient) for name in names} | told
        return held_for_sum(held) if style.output is not None and _cuts_inside(told) else held

    def check(self, assignment: Assignment, fit: Fit) -> None:
        module, where = assignment.module, f"rule {assignment.rule}: {assignment.shown}, a {assignment.kind},"
        if not takes_tokens_of_experts(module):
            raise PlanError(
                f"{where} isn't called as experts({', '.join(CALL)}). Put the rule on the module that is, or "
                "cut experts inside: local, colwise, rowwise."
            )
        experts = number_of_experts(module)
        if experts is None:
            inside = [name for name, _ in module.named_parameters() if "." in name]
            what = f"holds {inside[0]}" if inside else "has weights of several numbers of experts"
            raise PlanError(
                f"{where} {what}, and is to hold weights of its own, [experts, ...] each. Stack them "
                "(torch.stack), or cut experts inside: local, colwise, rowwise."
            )
        size = fit.experts if assignment.style.axis is ExpertsAxis.EXPERTS else fit.tp
        if experts % size:
            raise PlanError(
                f"{where} shares out {experts} experts over {assignment.style.axis}={size}. Use "
                f"{assignment.style.axis} in {divisors(experts)}."
            )
        self._check_sequences(assignment, fit)
        if assignment.style.axis is ExpertsAxis.TENSORS and assignment.style.parameters:
            raise PlanError(
                f"{where} shares experts out over tp, which can't cut them inside too. Leave out parameters, "
                'or use axis = "ep".'
            )

    def _check_sequences(self, assignment: Assignment, fit: Fit) -> None:
        """Raises PlanError where tokens are of a rank's part of the sequence, and a router beside looks at
        all."""
        style = assignment.style
        is_a_part = style.gradient is not None or (style.axis is ExpertsAxis.TENSORS and style.output is None)
        around = assignment.name.rpartition(".")[0]
        for name, module in fit.modules.items():
            is_beside = name.startswith(f"{around}.") and getattr(module, "needs_whole_sequences", False)
            if is_beside and is_a_part and fit.tp > 1:
                raise PlanError(
                    f"rule {assignment.rule}: {assignment.shown} gets the tokens of a rank's part of the "
                    f"sequence, and {name} drops some of whole sequences. Switch that off (capacity=0), or "
                    "cut experts inside."
                )

    def check_below_gather_input(self, assignment: Assignment) -> None:
        style = assignment.style
        if style.output is None and style.axis is ExpertsAxis.EXPERTS:
            self.check_held_inside(assignment)

    def apply(self, assignment: Assignment, work: Work) -> None:
        module, style = assignment.module, assignment.style
        tensors = work.axis
        axis = work.experts if style.axis is ExpertsAxis.EXPERTS else tensors
        experts = number_of_experts(module)
        assert experts is not None
        n_ranks = axis.size if axis is not None else 1
        added_once = wholes(super().held(assignment)) if style.output is not None else frozenset()
        work.hold(assignment, outer=axis if n_ranks > 1 and axis is not tensors else None)
        divide_counts(assignment, tensors.size)
        for name, value in list(vars(module).items()):
            if "expert" in name and type(value) is int and value == experts:
                set_count(module, name, experts // n_ranks)
        uses = uses_of(assignment, work, added_once)
        shared = None
        if axis is not None and n_ranks > 1:
            site = Site(assignment.name, assignment.rule.ref, axis)
            shared = _Shared(module, experts, site, uses, tensors)
        names = list(inspect.signature(module.forward).parameters)
        over_tensors = Site(assignment.name, assignment.rule.ref, tensors)
        is_summed = style.output is not None

        def around(inner: Any, *args: Any, **kwargs: Any) -> Tensor:
            hidden, index, weights = (*args, *(kwargs[name] for name in names[len(args) :]))
            if is_summed:
                hidden, weights = (gather_input(x, Replicate(), over_tensors) for x in (hidden, weights))
            if shared is None:
                with on_local(uses, tensors):
                    out: Tensor = inner(hidden, index, weights)
            else:
                is_alike = is_summed and axis is tensors
                out = shared(inner, hidden, index, weights, are_tokens_alike=is_alike)
            return sum_parts(out, Replicate(), over_tensors) if is_summed else out

        wrap(module, around)


_THERE = (
    "The router chose each token's experts, and other ranks hold some of them: tokens go there.",
    "What came for an expert goes back as the token's gradient, to the rank whose token it is.",
)
_BACK = (
    "What experts made of other ranks' tokens goes back to these.",
    "The gradient of what experts gave goes to the ranks that hold them.",
)


class _Shared:
    """The forward of experts that are shared out over an axis of several ranks."""

    def __init__(self, module: nn.Module, experts: int, site: Site, uses: list[Use], tensors: Axis) -> None:
        self._module, self._experts, self._site = module, experts, site
        self._uses, self._tensors = uses, tensors

    def __call__(
        self, inner: Any, hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor, *, are_tokens_alike: bool
    ) -> Tensor:
        axis, origin = self._site.axis, self._site.origin(Shard(0), Shard(0))
        if are_tokens_alike:
            plan = route_within(index_NK, self._experts, axis)
        else:
            plan = route_to_experts(index_NK, self._experts, axis, origin)
        route = plan.route
        show("send_rows", route.send_rows)
        show("expand", route.expand)
        rows = hidden_NH[route.send_rows]
        assignments, others = index_NK.numel(), axis.size - 1
        mean = assignments * others / axis.size
        sends = (issuing.Sends(assignments, mean), issuing.Sends(assignments * others, mean))
        if not are_tokens_alike:
            rows = collectives.exchange_rows(
                rows, route.send_splits, route.receive_splits, axis,
                grad_placement=Shard(0), origin=origin, sends=sends, reasons=_THERE,
            )  # fmt: skip
        made = self._computed(inner, rows, plan.expert)
        if not are_tokens_alike:
            made = collectives.exchange_rows(
                made, route.receive_splits, route.send_splits, axis,
                grad_placement=Shard(0), origin=origin, sends=sends[::-1], reasons=_BACK,
            )  # fmt: skip
        return combined(made, route.expand, weights_NK)

    def _computed(self, inner: Any, rows_RH: Tensor, expert_R: Tensor) -> Tensor:
        """What this rank's experts make of the rows: its own forward, each row with one expert and weight
        1."""
        ones = rows_RH.new_ones(len(rows_RH), 1)
        with on_local(self._uses, self._tensors):
            made: Tensor = inner(rows_RH, expert_R.unsqueeze(1), ones)
            if len(rows_RH) == 0:
                # no token came: gradients, and the exchange in the backward, must be as on other ranks
                owned = [p for p in parameters_of(self._module).values() if p is not None]
                made = made + rows_RH + torch.stack([p[:0].sum() for p in owned]).sum()
        return made


def _cuts_inside(told: dict[str, Held]) -> bool:
    return any(isinstance(held.placement, Shard) for held in told.values())


SHARDERS = {nn.Module: ByExpert()}
