"""Broken Llama plans, systematically: what `python -m benchmarks.verify_mutants` tries verify on. Each is a
factory `benchmarks.mutants:NAME`.

A mutant is a built-in plan with one thing changed: a rule dropped or another style in its place (on PyTorch's
own styles, which refuse little), or, on the native engine, what it does tampered with: a gradient that isn't
reduced, doubled, halved, zeroed or of another rank; an output of another rank; a sum left out; a tie undone.
`expected` was written down before verify saw any of them: the cause that verify should name, CRASHES where no
step can run or the plan is refused, HARMLESS where every gradient stays right. Whether a mutant is harmful is
for benchmarks/mutant_oracle.py to say.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.core.finding import Cause
from shardwise.core.placement import Replicate, Shard
from shardwise.core.plan import Ownership, Plan, ReduceScatter, Rule, Style, StyleName
from shardwise.models.llama import Llama, LlamaConfig
from shardwise.parallel import collectives, parameters
from shardwise.parallel.apply import parallelize
from shardwise.parallel.builtin import builtin_plan
from shardwise.parallel.engines import native
from shardwise.parallel.styles import gather_input

CRASHES, HARMLESS = "crashes", "harmless"
CONFIG = LlamaConfig(vocab_size=128, hidden=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=96)

Tamper = Callable[[nn.Module, DeviceMesh], None]
PlanChange = Callable[[Plan], Plan]


@dataclass(frozen=True, slots=True)
class Mutant:
    """around: what is patched while the plan is applied. tamper: what is done to the sharded model."""

    name: str
    about: str
    plan: Plan
    expected: str
    tied: bool = False
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    tamper: Tamper = lambda *_: None

    def build(self, mesh: DeviceMesh | None = None) -> nn.Module:
        """The model, whole or sharded; what the factory of this name does."""
        model = Llama(replace(CONFIG, tied=self.tied))
        if mesh is not None:
            with self.around():
                parallelize(model, self.plan, mesh)
            self.tamper(model, mesh)
        return model


# ------------------------------------------------------------------------------------------- plans


def without(pattern: str) -> PlanChange:
    return lambda plan: replace(plan, rules=tuple(rule for rule in plan.rules if rule.pattern != pattern))


def styled(pattern: str, style: Style) -> PlanChange:
    return lambda plan: replace(
        plan,
        rules=tuple(Rule(rule.pattern, style) if rule.pattern == pattern else rule for rule in plan.rules),
    )


def swapped(one: str, other: str) -> PlanChange:
    def change(plan: Plan) -> Plan:
        styles = {rule.pattern: rule.style for rule in plan.rules}
        return styled(other, styles[one])(styled(one, styles[other])(plan))

    return change


def with_first(rule: Rule) -> PlanChange:
    return lambda plan: replace(plan, rules=(rule, *plan.rules))


# ------------------------------------------------------------------------------------ gradients and outputs


def _tp(mesh: DeviceMesh) -> dist.ProcessGroup:
    return mesh.get_group("tp")


def on_gradient(name: str, change: Callable[[Tensor, dist.ProcessGroup], Tensor]) -> Tamper:
    """change: of this rank's part of the gradient, before it is reduced and kept."""

    def tamper(model: nn.Module, mesh: DeviceMesh) -> None:
        def hook(gradient: Tensor) -> Tensor:
            if not isinstance(gradient, DTensor):
                return change(gradient, _tp(mesh))
            local = change(gradient.to_local(), _tp(mesh))
            return DTensor.from_local(
                local,
                gradient.device_mesh,
                gradient.placements,
                run_check=False,
                shape=gradient.shape,
                stride=gradient.stride(),
            )

        model.get_parameter(name).register_hook(hook)

    return tamper


def times(factor: float) -> Callable[[Tensor, dist.ProcessGroup], Tensor]:
    return lambda gradient, _: factor * gradient


def summed(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total, group=group)
    return total


def of_the_next_rank(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts[(group.rank() + 1) % group.size()]


class _Exchange(torch.autograd.Function):
    """Each rank gets the next one's tensor, and its gradient goes back there. Two ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return of_the_next_rank(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return of_the_next_rank(gradients[0], ctx.group), None


def outputs_shifted(*modules: str) -> Tamper:
    def tamper(model: nn.Module, mesh: DeviceMesh) -> None:
        for name in modules:
            inner = model.get_submodule(name).forward
            model.get_submodule(name).forward = lambda *args, inner=inner: _Exchange.apply(
                inner(*args), _tp(mesh)
            )

    return tamper


def not_reduced(*names: str) -> Callable[[], AbstractContextManager[object]]:
    """The native engine's end of backward forgets these parameters."""
    original = parameters.PartialGradients

    def some(model: nn.Module, places: Any, axis: Any, origin: Any) -> object:
        left_out = {(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
        return original(model, [place for place in places if tuple(place) not in left_out], axis, origin)

    return lambda: mock.patch.object(native, "PartialGradients", some)


def input_not_summed(module: str) -> Tamper:
    """What comes back to a gather_input is taken for whole, and isn't summed."""

    def wrong(x: Tensor, before: Any, site: Any) -> Tensor:
        if before == Replicate():
            return x
        full_size = site.axis.size * x.shape[1]
        origin = site.origin(Shard(1), Replicate())
        return collectives.all_gather(
            x, 1, site.axis, full_size=full_size, grad_placement=Replicate(), origin=origin
        )

    def tamper(model: nn.Module, _: DeviceMesh) -> None:
        inner = model.get_submodule(module).forward

        def forward(*args: object) -> object:
            with mock.patch.object(gather_input, "gather_input", wrong):
                return inner(*args)

        model.get_submodule(module).forward = forward

    return tamper


def output_not_summed(module: str) -> Tamper:
    """A rowwise linear layer that keeps its part of the sum to itself, forward and backward."""

    def tamper(model: nn.Module, _: DeviceMesh) -> None:
        linear: Any = model.get_submodule(module)
        linear.forward = lambda x: torch.nn.functional.linear(
            x, parameters.local_weight(linear.weight, Shard(1))
        )

    return tamper


def untied(model: nn.Module, _: DeviceMesh) -> None:
    head: Any = model.get_submodule("output")
    head.weight = nn.Parameter(head.weight.detach().clone())


# --------------------------------------------------------------------------------------------- the list

_NAMES = {
    rule.pattern: rule.pattern.removeprefix("layers.*.").replace(".", "_")
    for rule in builtin_plan("rowwise").rules
}
_NORMS = (
    "layers.0.attention_norm.weight",
    "layers.0.ffn_norm.weight",
    "layers.1.attention_norm.weight",
    "layers.1.ffn_norm.weight",
    "norm.weight",
)
_SP = {True: "sp", False: "nosp"}


def _short(name: str) -> str:
    return (
        name.removesuffix(".weight")
        .replace("layers.", "layer")
        .replace("attention.", "")
        .replace("feed_forward.", "")
        .replace(".", "_")
    )


def _dropped_rules() -> list[Mutant]:
    """On PyTorch's styles. With sequence parallelism a norm without a rule keeps a part of its gradient;
    without it, what holds no shard needs no rule. The gathers before attention and feed-forward can always be
    left out: each colwise layer then gathers for itself."""
    parts = {"layers.*.attention_norm", "layers.*.ffn_norm", "norm"}
    gathers = {"layers.*.attention", "layers.*.feed_forward"}
    needless = parts | gathers | {"tok_embeddings", "output"}
    found = []
    for parallel in (True, False):
        plan = builtin_plan("rowwise@dtensor", sequence_parallel=parallel)
        for rule in plan.rules:
            if parallel:
                expected = (
                    str(Cause.PARTS_NOT_SUMMED)
                    if rule.pattern in parts
                    else HARMLESS
                    if rule.pattern in gathers
                    else CRASHES
                )
            else:
                expected = HARMLESS if rule.pattern in needless else CRASHES
            name = f"drop_{_NAMES[rule.pattern]}_{_SP[parallel]}"
            found.append(Mutant(name, f"no rule for {rule.pattern}", without(rule.pattern)(plan), expected))
    return found


def _other_styles() -> list[Mutant]:
    with_sp, without_sp = (
        builtin_plan("rowwise@dtensor", sequence_parallel=parallel) for parallel in (True, False)
    )
    found = [
        Mutant(
            "swap_wq_wo",
            "wq and wo swap styles",
            swapped("layers.*.attention.wq", "layers.*.attention.wo")(with_sp),
            CRASHES,
        ),
        Mutant(
            "swap_w1_w2",
            "w1 and w2 swap styles",
            swapped("layers.*.feed_forward.w1", "layers.*.feed_forward.w2")(with_sp),
            CRASHES,
        ),
        Mutant(
            "swap_wk_wo_nosp",
            "wk and wo swap styles",
            swapped("layers.*.attention.wk", "layers.*.attention.wo")(without_sp),
            CRASHES,
        ),
        Mutant(
            "swap_w3_w2_nosp",
            "w3 and w2 swap styles",
            swapped("layers.*.feed_forward.w3", "layers.*.feed_forward.w2")(without_sp),
            CRASHES,
        ),
    ]
    for pattern in ("layers.*.attention_norm", "layers.*.ffn_norm", "norm"):
        whole = styled(pattern, Style(StyleName.REPLICATE))(with_sp)
        found.append(
            Mutant(
                f"replicate_{_NAMES[pattern]}",
                f"{pattern} takes its part for the whole",
                whole,
                Cause.PARTS_NOT_SUMMED,
            )
        )
        part = styled(pattern, Style(StyleName.SEQUENCE_PARALLEL))(without_sp)
        found.append(
            Mutant(
                f"sequence_parallel_{_NAMES[pattern]}",
                f"{pattern} takes the whole for its part",
                part,
                CRASHES,
            )
        )
    for pattern in ("layers.*.attention.wo", "layers.*.feed_forward.w2"):
        whole = styled(pattern, Style(StyleName.ROWWISE, output=Replicate()))(with_sp)
        found.append(
            Mutant(
                f"whole_output_{_NAMES[pattern]}",
                f"{pattern} gives the whole where a part is wanted",
                whole,
                CRASHES,
            )
        )
    for parallel, plan in ((True, with_sp), (False, without_sp)):
        between = Shard(1) if parallel else Replicate()
        embedding = styled(
            "tok_embeddings", Style(StyleName.COLWISE, output=None if parallel else Replicate())
        )(plan)
        found.append(
            Mutant(f"colwise_embedding_{_SP[parallel]}", "the embedding colwise", embedding, HARMLESS)
        )
        head = styled("output", Style(StyleName.COLWISE, input=between, output=Replicate()))(plan)
        found.append(Mutant(f"gathered_head_{_SP[parallel]}", "the head gathers its logits", head, HARMLESS))
    return found


def _wrong_gradients() -> list[Mutant]:
    with_sp, without_sp = (builtin_plan("rowwise", sequence_parallel=parallel) for parallel in (True, False))
    found = [
        Mutant(
            f"unreduced_{_short(name)}",
            f"nobody sums the gradient of {name}",
            with_sp,
            Cause.PARTS_NOT_SUMMED,
            around=not_reduced(name),
        )
        for name in _NORMS
    ]
    table = "tok_embeddings.weight"
    found.append(
        Mutant(
            "unreduced_table",
            "nobody sums the table's gradient",
            builtin_plan("replicated"),
            Cause.PARTS_NOT_SUMMED,
            around=not_reduced(table),
        )
    )
    doubled = (_NORMS[0], _NORMS[3], "norm.weight", "layers.0.attention.wq.weight", table, "output.weight")
    halved = ("norm.weight", _NORMS[0], "layers.1.feed_forward.w2.weight")
    changes = [(name, 2.0, "doubled", str(Cause.SUMMED_TOO_OFTEN)) for name in doubled]
    changes += [(name, 0.5, "halved", str(Cause.AVERAGED)) for name in halved]
    changes += [
        (name, 0.0, "zeroed", str(Cause.NOTHING_ARRIVES))
        for name in ("norm.weight", "layers.0.attention.wk.weight")
    ]
    changes += [(name, 1.0, "same", HARMLESS) for name in ("norm.weight", "layers.1.feed_forward.w1.weight")]
    for name, factor, word, expected in changes:
        found.append(
            Mutant(
                f"{word}_{_short(name)}",
                f"the gradient of {name} times {factor:g}",
                with_sp,
                expected,
                tamper=on_gradient(name, times(factor)),
            )
        )
    for name in ("norm.weight", _NORMS[1], _NORMS[2]):
        about = f"the gradient of {name}, whole on every rank, is summed"
        found.append(
            Mutant(
                f"summed_{_short(name)}",
                about,
                without_sp,
                Cause.SUMMED_TOO_OFTEN,
                tamper=on_gradient(name, summed),
            )
        )
    for name in (
        "layers.0.attention.wq",
        "layers.1.attention.wk",
        "layers.0.feed_forward.w1",
        "layers.1.feed_forward.w2",
        "tok_embeddings",
        "output",
    ):
        tamper = on_gradient(f"{name}.weight", of_the_next_rank)
        found.append(
            Mutant(
                f"shifted_gradient_{_short(name)}",
                f"each rank has the next one's gradient of {name}",
                with_sp,
                Cause.WRONG_SHARD,
                tamper=tamper,
            )
        )
    return found


def _wrong_insides() -> list[Mutant]:
    with_sp, without_sp = (builtin_plan("rowwise", sequence_parallel=parallel) for parallel in (True, False))
    found = []
    for names in (
        ("layers.0.attention.wq",),
        ("layers.1.attention.wv",),
        ("layers.0.feed_forward.w1",),
        ("layers.0.feed_forward.w1", "layers.0.feed_forward.w3"),
    ):
        short = "_".join(_short(name) for name in names)
        about = f"each rank has the next one's output of {' and '.join(names)}"
        found.append(
            Mutant(
                f"shifted_output_{short}", about, with_sp, Cause.WRONG_SHARD, tamper=outputs_shifted(*names)
            )
        )
    for parallel, plan in ((True, with_sp), (False, without_sp)):
        for module in ("layers.1.attention", "layers.0.feed_forward"):
            about = f"what comes back to the input of {module} isn't summed"
            name = f"unsummed_input_{_short(module)}_{_SP[parallel]}"
            found.append(Mutant(name, about, plan, Cause.PARTS_NOT_SUMMED, tamper=input_not_summed(module)))
    for module in ("layers.0.attention.wo", "layers.1.feed_forward.w2"):
        about = f"the parts that {module} gives aren't summed"
        found.append(
            Mutant(
                f"unsummed_output_{_short(module)}",
                about,
                without_sp,
                Cause.PARTS_NOT_SUMMED,
                tamper=output_not_summed(module),
            )
        )
    for parallel, plan in ((True, with_sp), (False, without_sp)):
        found.append(
            Mutant(
                f"untied_{_SP[parallel]}",
                "head and embedding, tied, are two",
                plan,
                Cause.UNTIED,
                tied=True,
                tamper=untied,
            )
        )
    return found


def _harmless() -> list[Mutant]:
    with_sp, without_sp = (builtin_plan("rowwise", sequence_parallel=parallel) for parallel in (True, False))
    wq, wo = "layers.*.attention.wq", "layers.*.attention.wo"
    plans = {
        "backend_reduce_scatter": (
            "gloo's own reduce-scatter",
            replace(with_sp, reduce_scatter=ReduceScatter.BACKEND),
        ),
        "rules_reversed": ("the rules in another order", replace(with_sp, rules=with_sp.rules[::-1])),
        "rule_shadowed": (
            "a rule that a later one overrides",
            with_first(Rule("layers.0.attention.wq", Style(StyleName.ROWWISE)))(with_sp),
        ),
        "pattern_spelled": (
            "wq by another pattern",
            with_first(Rule("**.wq", Style(StyleName.COLWISE)))(without(wq)(with_sp)),
        ),
        "input_spelled": (
            "wo's default input written out",
            styled(wo, Style(StyleName.ROWWISE, input=Shard(-1), output=Shard(1)))(with_sp),
        ),
        "head_gathered": (
            "the head gathers its logits",
            styled("output", Style(StyleName.COLWISE, input=Shard(1), output=Replicate()))(with_sp),
        ),
        "embedding_colwise": ("the embedding colwise", builtin_plan("colwise")),
        "embedding_routed": ("the embedding routed", builtin_plan("routed")),
        "embedding_interleaved": (
            "the embedding routed, rows dealt out",
            styled("tok_embeddings", Style(StyleName.ROUTED, ownership=Ownership.INTERLEAVED))(with_sp),
        ),
        "embedding_replicated": ("the embedding replicated", builtin_plan("replicated")),
        "no_sequence_parallelism": ("whole sequences between the blocks", without_sp),
    }
    found = [Mutant(f"harmless_{name}", about, plan, HARMLESS) for name, (about, plan) in plans.items()]
    found.append(Mutant("harmless_tied", "head and embedding tied", with_sp, HARMLESS, tied=True))
    shifted_twice = outputs_shifted("layers.0.attention.wq", "layers.0.attention.wq")
    found.append(
        Mutant(
            "harmless_shifted_twice",
            "wq's output goes round the two ranks",
            with_sp,
            HARMLESS,
            tamper=shifted_twice,
        )
    )
    return found


MUTANTS = {
    mutant.name: mutant
    for make in (_dropped_rules, _other_styles, _wrong_gradients, _wrong_insides, _harmless)
    for mutant in make()
}


def __getattr__(name: str) -> Callable[..., nn.Module]:
    """The factory of a mutant."""
    if name not in MUTANTS:
        raise AttributeError(f"there is no mutant {name}")
    mutant = MUTANTS[name]

    def factory(mesh: DeviceMesh | None = None) -> nn.Module:
        return mutant.build(mesh)

    return factory
