"""Which plans a model can't carry: every refusal word for word, on meta models, and that a refused model is
as it was before."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwise.core.argument_cut import ArgumentCut
from shardwise.core.errors import MeshError, PlanError
from shardwise.core.held import Held
from shardwise.core.placement import Partial, Replicate, Shard
from shardwise.core.plan import Engine, Ownership, Plan, Rule, Style, StyleName
from shardwise.models.llama import Llama, LlamaConfig
from shardwise.models.specs import get_spec
from shardwise.parallel.apply import applied_to, parallelize
from shardwise.parallel.builtin import builtin_plan
from shardwise.parallel.resolve import below_gather_input, head_of, resolve, tied_parameters

ROWWISE, COLWISE, ROUTED = Style(StyleName.ROWWISE), Style(StyleName.COLWISE), Style(StyleName.ROUTED)
REPLICATE, GATHER_INPUT = Style(StyleName.REPLICATE), Style(StyleName.GATHER_INPUT)


def llama(*, vocab_size: int = 32, tied: bool = False, n_kv_heads: int = 4) -> Llama:
    with torch.device("meta"):
        return Llama(LlamaConfig(vocab_size, 96, 2, 12, n_kv_heads, 160, tied=tied))


def changed(name: str, *, engine: Engine = Engine.NATIVE, **styles: Style | None) -> Plan:
    """A built-in plan with other styles for some patterns (`__` for a dot, `ANY` for a star); None takes a
    rule away."""
    new = {pattern.replace("__", ".").replace("ANY", "*"): style for pattern, style in styles.items()}
    rules = [
        Rule(r.pattern, new.pop(r.pattern, r.style) or r.style)
        for r in builtin_plan(name).rules
        if new.get(r.pattern, r) is not None
    ]
    return Plan(
        "mine", tuple(rules) + tuple(Rule(pattern, style) for pattern, style in new.items() if style), engine
    )


def refusal(model: nn.Module, plan: Plan, *, tp: int = 2, seq: int | None = None, fsdp: int = 1) -> str:
    before = snapshot(model)
    with pytest.raises(PlanError) as caught:
        resolve(model, plan, tp=tp, seq=seq, fsdp=fsdp)
    assert snapshot(model) == before
    return str(caught.value)


def snapshot(model: nn.Module) -> list[object]:
    """Everything that a style would change: parameters, forwards, hooks, attributes."""
    return [
        *((name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)),
        *((name, "forward" in vars(module), sorted(vars(module))) for name, module in model.named_modules()),
        *(
            (
                name,
                len(module._forward_pre_hooks),
                len(module._state_dict_hooks),
                len(module._load_state_dict_pre_hooks),
            )
            for name, module in model.named_modules()
        ),
    ]


def mistyped(pattern: str) -> Plan:
    return Plan("x", (*builtin_plan("rowwise").rules, Rule(pattern, COLWISE)))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("layers.*.atention.wq", '; did you mean "layers.*.attention.wq"?'),
        ("layers.7.attention.wq", '; did you mean "layers.*.attention.wq"?'),
        (
            "lm_head",
            ". The model's modules: tok_embeddings, layers, layers.0, layers.0.attention_norm, "
            "layers.0.attention, layers.0.attention.wq, ...",
        ),
    ],
)
def test_a_rule_that_matches_nothing_is_refused(pattern: str, said: str) -> None:
    message = refusal(llama(), mistyped(pattern))
    assert message.rstrip(".") == f'plan "x": rule "{pattern}" (colwise) matched nothing{said}'.rstrip(".")


GATHER_FROM_2 = Style(StyleName.GATHER_INPUT, input=Shard(2))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            changed("routed", engine=Engine.DTENSOR),
            'rule "tok_embeddings" (routed): PyTorch\'s own styles have no "routed" for tok_embeddings, a '
            'Embedding. Use engine = "native".',
        ),
        (
            changed("replicated", engine=Engine.DTENSOR),
            'rule "tok_embeddings" (replicated): PyTorch\'s own styles have no "replicated" for '
            'tok_embeddings, a Embedding. Use engine = "native".',
        ),
        (
            changed("rowwise", norm=GATHER_INPUT),
            'rule "norm" (gather_input) matched norm, a RMSNorm. gather_input is for modules that hold '
            "others.",
        ),
        (
            changed("rowwise", layers__ANY__attention=GATHER_FROM_2),
            'rule "layers.*.attention" (gather_input): from is Shard(2). Allowed: shard(1), replicate.',
        ),
        (
            changed("rowwise", layers__ANY__attention=COLWISE),
            'rule "layers.*.attention" (colwise) matched layers.0.attention, a Attention, whose class '
            "doesn't tell how its parameters are cut. Say it: "
            'parameters = { "inner.weight" = "shard(DIM)" }.',
        ),
        (
            changed("rowwise", output=ROUTED),
            'rule "output" (routed) matched output, a Linear. Its styles: colwise, local, replicate, '
            "rowwise, sequence_parallel, whole.",
        ),
        (
            changed("rowwise", tok_embeddings=Style(StyleName.SEQUENCE_PARALLEL)),
            'rule "tok_embeddings" (sequence_parallel) matched tok_embeddings, a Embedding. Its styles: '
            "colwise, local, replicate, replicated, routed, rowwise, whole.",
        ),
        (
            changed("rowwise", norm=COLWISE),
            'rule "norm" (colwise) matched norm, a RMSNorm. Its styles: local, replicate, '
            "sequence_parallel, whole.",
        ),
        (
            changed("rowwise", tok_embeddings=replace(ROWWISE, output=Shard(2))),
            'rule "tok_embeddings" (rowwise): output is shard(2). Allowed for Embedding: shard(1), '
            "replicate.",
        ),
        (
            changed("rowwise", tok_embeddings=replace(ROWWISE, input=Replicate())),
            'rule "tok_embeddings" (rowwise): input is replicate. Allowed for Embedding: none.',
        ),
        (
            changed("rowwise", output=replace(COLWISE, output=Partial())),
            'rule "output" (colwise): output is partial. Allowed for Linear: shard(-1), replicate, shard(1).',
        ),
        (
            changed("rowwise", output=replace(COLWISE, input=Shard(-1))),
            'rule "output" (colwise): input is shard(-1). Allowed for Linear: replicate, shard(1).',
        ),
        (
            changed("rowwise", layers__ANY__attention__wo=replace(ROWWISE, output=Shard(-1))),
            'rule "layers.*.attention.wo" (rowwise): output is shard(-1). Allowed for Linear: replicate, '
            "shard(1).",
        ),
        (
            changed("rowwise", layers__ANY__attention__wo=replace(ROWWISE, input=Shard(1))),
            'rule "layers.*.attention.wo" (rowwise): input is shard(1). Allowed for Linear: shard(-1), '
            "replicate.",
        ),
        (
            changed("rowwise", norm=None),
            'no rule covers norm, a RMSNorm. Add one: "norm" = one of local, replicate, sequence_parallel, '
            "whole.",
        ),
        (
            changed("rowwise", output=None),
            'no rule covers output, a Linear. Add one: "output" = one of colwise, local, replicate, '
            "rowwise, sequence_parallel, whole.",
        ),
        (
            changed("rowwise", layers__ANY__attention__wq=replace(COLWISE, input=Shard(1))),
            'rule "layers.*.attention.wq" (colwise): input is shard(1), but a gather_input above '
            "layers.0.attention.wq has made it whole. "
            "Leave input out.",
        ),
        (
            changed("rowwise", layers__ANY__attention__wo=replace(ROWWISE, input=Replicate())),
            'rule "layers.*.attention.wo" (rowwise): layers.0.attention.wo is below a gather_input, where '
            "each rank's gradient is a part of "
            "the sum. Leave input out, and make the layer before it colwise.",
        ),
        (
            changed("rowwise", layers__ANY__attention__wk=REPLICATE),
            'rule "layers.*.attention.wk" (replicate): layers.0.attention.wk is below a gather_input, '
            "where each rank's gradient is a part of "
            'the sum. Add gradient = "partial", which sums the parts.',
        ),
    ],
)
def test_a_plan_that_the_model_cannot_carry_is_refused(plan: Plan, message: str) -> None:
    assert refusal(llama(), plan) == f'plan "mine": {message}'


def test_a_replicated_norm_below_a_gather_input_is_refused() -> None:
    """Forward exact, gradients wrong: what q_norm and k_norm are in many plans."""
    model = llama()
    for layer in model.layers:
        assert isinstance(layer.attention, nn.Module)
        layer.attention.q_norm = nn.RMSNorm(8, device="meta")
    plan = changed("rowwise", layers__ANY__attention__q_norm=REPLICATE)
    assert refusal(model, plan) == (
        'plan "mine": rule "layers.*.attention.q_norm" (replicate): layers.0.attention.q_norm is below a '
        "gather_input, where each rank's "
        'gradient is a part of the sum. Add gradient = "partial", which sums the parts.'
    )
    for right in (replace(REPLICATE, gradient=Partial()), Style(StyleName.SEQUENCE_PARALLEL)):
        resolve(model, changed("rowwise", layers__ANY__attention__q_norm=right), tp=2)


@pytest.mark.parametrize(
    ("tp", "message"),
    [
        (
            5,
            'rule "layers.*.attention.wq" (colwise) splits 12 heads of layers.0.attention over tp=5. Use '
            "tp in {1, 2, 3, 4, 6, 12}.",
        ),
        (
            3,
            'rule "layers.*.attention.wk" (colwise) splits 4 KV heads of layers.0.attention over tp=3. Use '
            "tp in {1, 2, 4}.",
        ),
        (
            12,
            'rule "layers.*.attention.wk" (colwise) splits 4 KV heads of layers.0.attention over tp=12. '
            "Use tp in {1, 2, 4}.",
        ),
    ],
)
def test_heads_that_do_not_divide_are_refused(tp: int, message: str) -> None:
    assert refusal(llama(), builtin_plan("rowwise"), tp=tp) == f'plan "rowwise": {message}'


class Projected(nn.Module):
    """In heads of 4; made of a low rank that is twice as wide by chance, or in pieces, one of them so."""

    head_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(12, 8, bias=False), nn.Linear(8, 32, bias=False)
        self.fused, self.o = nn.Linear(12, 36, bias=False), nn.Linear(32, 12, bias=False)


def test_what_is_as_wide_as_a_head_by_chance_may_be_cut_across() -> None:
    rules = {"low": COLWISE, "high": ROWWISE, "fused": replace(COLWISE, pieces=(16, 16, 4)), "o": REPLICATE}
    plan = Plan("mine", tuple(Rule(name, style) for name, style in rules.items()))
    resolve(Projected(), plan, tp=4)
    keys = replace(COLWISE, pieces=(20, 8, 8))
    split = Plan("mine", (*plan.rules[:2], Rule("fused", keys), plan.rules[3]))
    assert 'rule "fused" (colwise) splits 5 heads of ' in refusal(Projected(), split, tp=4)


def test_llama_3_8b_fits_no_more_than_8_ranks() -> None:
    assert refusal(get_spec("llama3-8b").with_layers(1).build(), builtin_plan("colwise"), tp=16) == (
        'plan "colwise": rule "layers.*.attention.wk" (colwise) splits 8 KV heads of layers.0.attention '
        "over tp=16. Use tp in {1, 2, 4, 8}."
    )


def test_a_hidden_size_that_does_not_divide_is_refused_for_colwise_only() -> None:
    assert refusal(llama(), builtin_plan("colwise"), tp=7) == (
        'plan "colwise": rule "tok_embeddings" (colwise) splits hidden 96 of tok_embeddings over tp=7. '
        "Use tp in {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96}."
    )
    assert "splits 12 heads" in refusal(llama(), builtin_plan("rowwise"), tp=7)


@pytest.mark.parametrize("name", ["rowwise", "colwise", "routed", "replicated"])
def test_a_sequence_that_does_not_divide_is_refused(name: str) -> None:
    assert refusal(llama(), builtin_plan(name), tp=4, seq=10) == (
        f'plan "{name}": rule "tok_embeddings" ({name}) cuts the sequence, and 10 is no multiple of tp=4. '
        "Use a sequence that is a multiple of 4, or a plan without sequence parallelism."
    )


def test_any_sequence_goes_without_sequence_parallelism() -> None:
    assert len(resolve(llama(), builtin_plan("rowwise", sequence_parallel=False), tp=4, seq=10)) == 25


def test_an_empty_shard_is_refused_with_an_fsdp_axis_only() -> None:
    model = llama(vocab_size=5)
    resolve(model, builtin_plan("rowwise"), tp=4)
    assert refusal(model, builtin_plan("rowwise"), tp=4, fsdp=2) == (
        'plan "rowwise": rule "tok_embeddings" (rowwise) leaves a rank without rows of tok_embeddings (5 '
        "over tp=4), "
        "which FSDP can't shard further. Use tp of at most 5, or no fsdp axis."
    )
    assert refusal(model, builtin_plan("colwise"), tp=4, fsdp=2) == (
        'plan "colwise": rule "output" (colwise) leaves a rank without rows of output (5 over tp=4), '
        "which FSDP can't shard further. Use tp of at most 5, or no fsdp axis."
    )


def test_an_interleaved_table_with_an_fsdp_axis_is_refused() -> None:
    assert refusal(llama(), builtin_plan("routed-interleaved"), fsdp=2) == (
        'plan "routed-interleaved": rule "tok_embeddings" (routed) interleaves the rows of tok_embeddings, '
        'and no checkpoint could tell their order once FSDP cuts them again. Use ownership = "contiguous", '
        "or no fsdp axis."
    )


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_embedding_options_that_no_style_carries_out_are_refused(option: dict[str, object]) -> None:
    model = llama()
    model.tok_embeddings = nn.Embedding(32, 96, device="meta", **option)  # type: ignore[arg-type]
    assert refusal(model, builtin_plan("rowwise")) == (
        'plan "rowwise": rule "tok_embeddings" (rowwise): tok_embeddings uses max_norm, sparse or '
        "scale_grad_by_freq, "
        "which no style carries out. Switch them off."
    )


def test_uneven_widths_are_refused_for_the_dtensor_engine() -> None:
    assert refusal(llama(n_kv_heads=12), builtin_plan("rowwise@dtensor"), tp=3) == (
        'plan "rowwise@dtensor": rule "layers.*.feed_forward.w1" (colwise) splits 160 of '
        "layers.0.feed_forward.w1 over tp=3, "
        "and PyTorch's own styles need equal parts. Use tp in {1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 80, 160}."
    )
    resolve(llama(n_kv_heads=12), builtin_plan("rowwise"), tp=3)


def test_an_empty_shard_is_refused_for_the_dtensor_engine() -> None:
    assert refusal(llama(vocab_size=5), builtin_plan("rowwise@dtensor"), tp=4) == (
        'plan "rowwise@dtensor": rule "tok_embeddings" (rowwise) leaves a rank without rows of '
        "tok_embeddings (5 over tp=4). "
        "Use tp of at most 5."
    )


def test_tied_weights_are_refused_for_the_dtensor_engine() -> None:
    assert refusal(llama(tied=True), builtin_plan("rowwise@dtensor")) == (
        'plan "rowwise@dtensor": tok_embeddings.weight and output.weight are tied, and PyTorch\'s own '
        'styles would untie them. Use engine = "native".'
    )


def test_a_tied_head_must_be_colwise() -> None:
    assert refusal(llama(tied=True), changed("rowwise", output=ROWWISE)) == (
        'plan "mine": rule "output" (rowwise): output is tied to the embedding. Allowed for a tied head: '
        "colwise."
    )


def test_a_tied_head_without_a_rule_is_not_covered() -> None:
    assert refusal(llama(tied=True), changed("rowwise", output=None)) == (
        'plan "mine": no rule covers output, a Linear. Add one: "output" = one of colwise, local, '
        "replicate, rowwise, sequence_parallel, whole."
    )


def test_tied_weights_that_are_held_alike_are_taken_and_others_refused() -> None:
    model = llama()
    first, second = model.layers
    first.feed_forward.w1.weight = second.feed_forward.w1.weight  # type: ignore[union-attr]
    resolve(model, builtin_plan("rowwise"), tp=2)
    whole = replace(REPLICATE, gradient=Partial())
    plan = Plan("mine", (*builtin_plan("rowwise").rules, Rule("layers.1.feed_forward.w1", whole)))
    assert refusal(model, plan) == (
        'plan "mine": layers.0.feed_forward.w1.weight and layers.1.feed_forward.w1.weight are tied, and rule '
        '"layers.*.feed_forward.w1" (colwise) holds it as shard(0), rule "layers.1.feed_forward.w1" '
        "(replicate) as replicate, gradient partial. Hold it alike."
    )


INTERLEAVED = Style(StyleName.ROUTED, ownership=Ownership.INTERLEAVED)


def test_whole_logits_of_a_tied_interleaved_table_are_refused() -> None:
    plan = changed(
        "rowwise",
        tok_embeddings=INTERLEAVED,
        output=Style(StyleName.COLWISE, input=Shard(1), output=Replicate()),
    )
    assert refusal(llama(tied=True), plan) == (
        'plan "mine": rule "output" (colwise): output is tied to an interleaved table, so its whole logits '
        'would be out of order. Use output = "shard(-1)", or ownership = "contiguous".'
    )
    resolve(llama(), plan, tp=2)


def test_the_bias_of_a_head_tied_to_an_interleaved_table_is_refused() -> None:
    model = llama(tied=True)
    model.output.bias = nn.Parameter(torch.empty(32, device="meta"))
    assert refusal(model, builtin_plan("routed-interleaved")) == (
        'plan "routed-interleaved": rule "output" (colwise): output is tied to an interleaved table, and '
        'its bias is not dealt out like that. Use ownership = "contiguous".'
    )
    resolve(model, builtin_plan("routed"), tp=2)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout])
def test_dropout_is_refused_where_ranks_have_parts_of_several_sizes(kind: type[nn.Dropout]) -> None:
    model = llama(n_kv_heads=12)
    model.layers[0].add_module("drop", kind(0.1))
    resolve(model, builtin_plan("rowwise"), tp=2)
    assert refusal(model, builtin_plan("rowwise"), tp=3) == (
        f'plan "rowwise": layers.0.drop is a {kind.__name__}(0.1), and layers.0.feed_forward.w1.weight has '
        "160 to share out over tp=3: masks would differ between the ranks. Set its p to 0, or use a tp that "
        "divides."
    )
    model.layers[0].add_module("drop", kind(0.0))
    resolve(model, builtin_plan("rowwise"), tp=3)


def test_parameters_of_a_module_that_holds_others_want_a_rule() -> None:
    model = llama()
    model.layers[1].register_parameter("gate", nn.Parameter(torch.empty(3, device="meta")))
    assert refusal(model, builtin_plan("rowwise")) == (
        'plan "rowwise": no rule covers gate of layers.1, a Block. Add one: "layers.1" = { style = "local", '
        'parameters = { gate = "shard(DIM)" } }, or "replicate" where it isn\'t cut.'
    )
    gate = Style(StyleName.LOCAL, parameters=(("gate", Held(Replicate())),))
    resolve(model, Plan("p", (*builtin_plan("rowwise").rules, Rule("layers.1", gate))), tp=2)


def test_parameters_of_the_model_itself_want_a_rule() -> None:
    model = llama()
    model.register_parameter("positions", nn.Parameter(torch.empty(3, 96, device="meta")))
    assert refusal(model, builtin_plan("rowwise")) == (
        'plan "rowwise": no rule covers positions of the model itself, a Llama. Add one: "." = { style = '
        '"local", parameters = { positions = "shard(DIM)" } }, or "replicate" where it isn\'t cut.'
    )
    resolve(model, Plan("p", (*builtin_plan("rowwise").rules, Rule(".", REPLICATE))), tp=2)


def test_a_subclass_is_taken_for_its_class_where_it_has_its_forward() -> None:
    class Named(nn.Linear):
        pass

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for kind, sharder in ((Named, "ColwiseLinear"), (Scaled, "ColwiseLeaf")):
        model = llama()
        model.output = kind(96, 32, bias=False, device="meta")
        *_, head = resolve(model, builtin_plan("rowwise"), tp=2)
        assert type(head.sharder).__name__ == sharder
        assert head.held == {"weight": Held(Shard(0))}


class Fused(nn.Module):
    """Query, key and value in one weight, laid [in, out]; its heads are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 6
        self.config = LlamaConfig(8, 96, 1, 12, 12, 8)
        self.weight = nn.Parameter(torch.empty(96, 96 + 48 + 48, device="meta"))


def with_fused(**arguments: object) -> tuple[nn.Module, Plan]:
    model = llama()
    for layer in model.layers:
        layer.fused = Fused()
    style = Style(StyleName.LOCAL, **arguments)  # type: ignore[arg-type]
    return model, Plan("p", (*builtin_plan("rowwise").rules, Rule("layers.*.fused", style)))


def held_as(text: str) -> dict[str, object]:
    return {"parameters": (("weight", Held.parse(text)),)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"parameters": (("wieght", Held(Shard(0))),)},
            "parameters names wieght of layers.0.fused, a Fused, which has no such parameter. Did you mean "
            '"weight"? It has: weight.',
        ),
        (
            held_as("shard(2)"),
            "cuts weight of layers.0.fused along dim 2, and it has shape [96, 192]. Name one of its dims.",
        ),
        (
            held_as("shard(1: 96+48)"),
            "cuts weight of layers.0.fused in pieces 96+48, which are 144 together, and dim 1 has 192. Give "
            "pieces that add up to it.",
        ),
        (
            held_as("shard(1: 95+97)"),
            "cuts weight of layers.0.fused in pieces 95+97, and 95 is no multiple of tp=2. Use a tp size "
            "that fits.",
        ),
        (
            held_as("shard(1: 96+48+48)") | {"divide": ("haeds",)},
            'divide names haeds of layers.0.fused, and Fused has no haeds. Did you mean "heads"? Its counts: '
            "heads.",
        ),
        (
            held_as("shard(1: 96+48+48)") | {"divide": ("config.n_head",)},
            "divide names config.n_head of layers.0.fused, and LlamaConfig has no n_head. Did you mean "
            '"n_heads"? Its counts: ffn_hidden, hidden, n_heads, n_kv_heads, n_layers, vocab_size.',
        ),
        (
            held_as("shard(1: 96+48+48)") | {"divide": ("config",)},
            "divide names config of layers.0.fused, which is LlamaConfig(vocab_size=8, hidden=96, n_l. Name "
            "an integer that counts what is cut.",
        ),
    ],
)
def test_what_a_rule_says_of_parameters_and_counts_must_be_so(
    arguments: dict[str, object], message: str
) -> None:
    model, plan = with_fused(**arguments)
    separator = " " if message.startswith("cuts") else ": "
    assert refusal(model, plan) == f'plan "p": rule "layers.*.fused" (local){separator}{message}'


@pytest.mark.parametrize(
    ("style", "message"),
    [
        (
            Style(StyleName.COLWISE, pieces=(24,), parts=(3,)),
            "cuts weight of layers.0.attention.wk in pieces 24/3, which are 24 together, and dim 0 has 32. "
            "Give pieces that add up to it.",
        ),
        (Style(StyleName.COLWISE, pieces=(32,), parts=(8,)), ""),
        (
            Style(StyleName.COLWISE, pieces=(2, 30), parts=(1, 3)),
            "cuts weight of layers.0.attention.wk in pieces 2/1+30/3, and 4 ranks can't share 3 parts of 30 "
            "evenly. Use a tp size that fits.",
        ),
        (
            Style(StyleName.COLWISE, output=Replicate(), pieces=(32,), parts=(2,)),
            ": ranks use the same parts of layers.0.attention.wk, which can't be gathered. Leave output out.",
        ),
        (
            Style(StyleName.ROWWISE, pieces=(96,), parts=(2,)),
            ": ranks that use the same part of layers.0.attention.wk would add it to the sum several times. "
            "Give each its own part, or use whole.",
        ),
    ],
)
def test_ranks_may_share_parts_where_they_can(style: Style, message: str) -> None:
    plan = changed("rowwise", layers__ANY__attention__wk=style)
    if not message:
        resolve(llama(), plan, tp=4)
        return
    separator = "" if message.startswith(":") else " "
    expected = f'plan "mine": rule "layers.*.attention.wk" ({style.name}){separator}{message}'
    assert refusal(llama(), plan, tp=4) == expected


def test_a_constant_that_no_argument_of_the_forward_is_named_like_is_refused() -> None:
    style = Style(StyleName.GATHER_INPUT, cut=(("slopes", ArgumentCut(0)),))
    assert refusal(llama(), changed("rowwise", layers__ANY__attention=style), tp=2).endswith(
        "cut names slopes, and the forward of layers.0.attention, a Attention, takes no such argument. It "
        "takes: hidden_BSH, rope_2SD, mask_B1SS."
    )


def test_counts_that_do_not_divide_are_refused() -> None:
    model, plan = with_fused(**held_as("shard(1: 96+48+48)"), divide=("heads",))
    assert refusal(model, plan, tp=4).endswith(
        "divide names heads of layers.0.fused, 6 over tp=4. Use tp in {1, 2, 3, 6}."
    )


def test_a_parameter_that_two_rules_hold_is_held_alike() -> None:
    model = llama()
    for style, held in (("shard(0)", True), ("shard(1)", False)):
        around = Style(StyleName.GATHER_INPUT, parameters=(("wq.weight", Held.parse(style)),))
        plan = changed("rowwise", layers__ANY__attention=around)
        if held:
            resolve(model, plan, tp=2)
            continue
        assert refusal(model, plan) == (
            'plan "mine": rule "layers.*.attention" (gather_input) holds layers.0.attention.wq.weight as '
            'shard(1), and rule "layers.*.attention.wq" (colwise) as shard(0). Say it once, or alike.'
        )


def test_what_is_whole_inside_a_gather_input_says_that_its_gradient_is_a_part() -> None:
    model = llama()
    for layer in model.layers:
        assert isinstance(layer.attention, nn.Module)
        layer.attention.register_parameter("temperature", nn.Parameter(torch.empty((), device="meta")))
    around = Style(StyleName.GATHER_INPUT, parameters=(("temperature", Held(Replicate())),))
    assert refusal(model, changed("rowwise", layers__ANY__attention=around)) == (
        'plan "mine": rule "layers.*.attention" (gather_input): temperature of layers.0.attention is whole '
        "where each rank's gradient is a part of the sum. Write "
        '"replicate, gradient partial", which sums them.'
    )


def test_whole_holds_for_what_is_inside_without_a_rule() -> None:
    inside = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
    rules = [
        rule
        for rule in builtin_plan("rowwise").rules
        if not f"{rule.pattern}.".startswith("layers.*.attention.")
    ]
    plan = Plan("p", (*rules, Rule("layers.*.attention", Style(StyleName.WHOLE))))
    found = {each.name: each for each in resolve(llama(), plan, tp=2)}
    assert found["layers.1.attention"].below == tuple(name.partition(".")[2] for name in inside)
    assert found["layers.1.attention"].held == {
        f"{name.partition('.')[2]}.weight": Held(Replicate()) for name in inside
    }
    assert "layers.1.attention.wq" not in found


def test_every_module_of_a_fitting_plan_gets_its_rule_in_the_models_order() -> None:
    assignments = resolve(llama(), builtin_plan("rowwise"), tp=2, seq=24)
    assert [a.name for a in assignments[:4]] == [
        "tok_embeddings",
        "layers.0.attention_norm",
        "layers.0.attention",
        "layers.0.attention.wq",
    ]
    assert [str(a.rule) for a in assignments[-2:]] == ['"norm" (sequence_parallel)', '"output" (colwise)']


def test_ties_are_known_by_all_their_names() -> None:
    names = ("tok_embeddings.weight", "output.weight")
    assert tied_parameters(llama(tied=True)) == dict.fromkeys(names, names)
    assert tied_parameters(llama()) == {}


def test_below_a_gather_input_is_what_an_enclosing_module_gathers_for() -> None:
    plan = builtin_plan("rowwise")
    assert below_gather_input("layers.0.attention.wq", plan)
    assert not below_gather_input("layers.0.attention", plan)
    assert not below_gather_input("output", plan)


@pytest.fixture
def two_ranks() -> Iterator[DeviceMesh]:
    """Rank 0 of 2, without another process: PyTorch's fake process group."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "plan",
    [
        mistyped("layers.*.atention.wq"),
        changed("rowwise", norm=None),
        changed("rowwise", output=ROUTED),
        changed("rowwise", layers__ANY__attention__wk=REPLICATE),
        replace(changed("routed"), engine=Engine.DTENSOR),
    ],
    ids=lambda plan: plan.rules[-1].pattern,
)
def test_a_refused_model_is_as_it_was_before(two_ranks: DeviceMesh, plan: Plan) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(PlanError):
        parallelize(model, plan, two_ranks)
    assert snapshot(model) == before
    assert applied_to(model).plan is None
    parallelize(model, "rowwise", two_ranks)
    assert snapshot(model) != before
    assert applied_to(model).plan == builtin_plan("rowwise")


def test_a_sharded_model_is_not_sharded_again(two_ranks: DeviceMesh) -> None:
    model = parallelize(llama(), "rowwise", two_ranks)
    with pytest.raises(
        PlanError,
        match=r'^plan "colwise": the model is sharded already\. Build a fresh one for another plan\.$',
    ):
        parallelize(model, "colwise", two_ranks)


def test_a_model_of_dtensors_is_refused(two_ranks: DeviceMesh) -> None:
    model = llama()
    whole = distribute_tensor(torch.ones(96), two_ranks, [TorchReplicate()])
    model.norm.weight = nn.Parameter(whole)
    with pytest.raises(
        PlanError,
        match=r'^plan "rowwise": norm\.weight is a DTensor already\. Call parallelize\(\) before '
        r"fully_shard\(\)\.$",
    ):
        parallelize(model, "rowwise", two_ranks)


def test_a_mesh_of_one_axis_is_for_tensors_whatever_others_call_it(two_ranks: DeviceMesh) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor_parallel",))
    model = parallelize(llama(), "rowwise", mesh)
    weight = model.get_parameter("layers.0.attention.wq.weight")
    assert isinstance(weight, DTensor)
    assert weight.device_mesh.mesh_dim_names == ("tensor_parallel",)
    assert weight.to_local().shape[0] * 2 == weight.shape[0]
    assert parallelize(llama(), "rowwise", init_device_mesh("cpu", (2,))) is not None


def test_a_mesh_without_a_tp_axis_is_refused(two_ranks: DeviceMesh) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    with pytest.raises(
        MeshError, match=r'^parallelize: the mesh has axes \(\'dp\',\)\. Name one of them "tp"\.$'
    ):
        parallelize(llama(), "rowwise", mesh)


@pytest.mark.parametrize(
    "after",
    [nn.Linear(8, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 24, bias=False)],
    ids=["a linear layer", "a convolution", "a layer that widens"],
)
def test_the_head_makes_logits_whatever_is_registered_after_it(after: nn.Module) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(32, 8), "first": nn.Linear(8, 8)})
    model["head"] = nn.Linear(8, 32)
    model["after"] = after
    assert head_of(model) is model["head"]


def test_of_several_that_are_as_wide_as_the_ids_the_last_is_the_head() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(32, 8), "up": nn.Linear(8, 32), "down": nn.Linear(32, 8)})
    model["head"] = nn.Linear(8, 32)
    assert head_of(model) is model["head"]
    no_table = nn.ModuleDict({"first": nn.Linear(8, 8), "last": nn.Linear(8, 4)})
    assert head_of(no_table) is no_table["last"]
