"""The Llama family: exact sizes, the same logits as Hugging Face's, errors, and initial weights."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.cli.plans import plans
from shardwise.core.errors import ModelError
from shardwise.models.init import initial_parameter
from shardwise.models.llama import Llama, LlamaConfig, RopeScaling
from shardwise.models.specs import SPECS, get_spec

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers isn't installed, so the logits are NOT compared with Hugging Face's: pip install "
    "shardwise[hf]",
)


def llama_config(name: str) -> LlamaConfig:
    config = get_spec(name).config
    assert isinstance(config, LlamaConfig)
    return config


@pytest.mark.parametrize(
    ("name", "count"),
    [("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496), ("llama3.1-405b", 405_853_388_800)],
)
def test_a_model_has_exactly_the_published_number_of_parameters(name: str, count: int) -> None:
    spec = get_spec(name)
    assert spec.config.n_parameters == count
    assert sum(parameter.numel() for parameter in spec.build("meta").parameters()) == count


def test_the_debug_model_fits_a_laptop() -> None:
    config = llama_config("llama3-debug")
    assert 30_000_000 < config.n_parameters < 40_000_000
    assert sum(p.numel() for p in Llama(config).parameters()) == config.n_parameters


def test_a_tied_head_counts_once() -> None:
    config = replace(llama_config("llama3-debug"), tied=True)
    with torch.device("meta"):
        model = Llama(config)
    assert model.output.weight is model.tok_embeddings.weight
    assert (
        sum(p.numel() for p in model.parameters())
        == config.n_parameters
        == 32_000 * 384 + replace(config, vocab_size=0).n_parameters
    )


def test_a_spec_at_another_depth_keeps_its_widths() -> None:
    spec = get_spec("llama3-70b")
    assert spec.with_layers(2).config == replace(spec.config, n_layers=2)
    assert len(spec.with_layers(2).build().layers) == 2


def test_building_leaves_the_default_dtype_alone() -> None:
    model = get_spec("llama3-debug").with_layers(1).build("meta", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("name", ["hf:qwen3", "mypackage.models:build"])
def test_built_in_plans_for_a_model_that_is_not_ours_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ModelError) as refused:
        plans("rowwise", model=name)
    assert str(refused.value) == (
        f'model "{name}": the built-in plans are for {", ".join(SPECS)}. For yours: '
        f"shardwise plan --model {name} --toml."
    )


def test_an_unknown_model_is_one_line() -> None:
    with pytest.raises(ModelError) as caught:
        get_spec("llama3-8B")
    assert (
        str(caught.value)
        == f'unknown model "llama3-8B". Did you mean "llama3-8b"? Known: {", ".join(SPECS)}.'
    )
    assert list(SPECS)[:4] == ["llama3-debug", "llama3-8b", "llama3-70b", "llama3.1-405b"]
    assert list(SPECS)[4:8] == ["gpt-debug", "gpt3-1.3b", "gpt3-6.7b", "gpt3-175b"]
    assert list(SPECS)[8:] == ["moe-debug", "mixtral-8x7b", "qwen3-30b-a3b", "megatron-22b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 100}, "llama: hidden 100 is no multiple of 12 heads."),
        ({"hidden": 36}, "llama: head dim 3 is odd; rotary embeddings need an even one."),
        ({"n_kv_heads": 5}, "llama: 12 heads are no multiple of 5 KV heads."),
    ],
)
def test_shapes_that_do_not_fit_are_one_line(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        replace(LlamaConfig(64, 96, 1, 12, 4, 128), **changes)  # type: ignore[arg-type]
    assert str(caught.value) == message


def hugging_face(model: Llama) -> Any:
    """The same model as transformers has it, with the same weights."""
    from transformers import LlamaConfig as HuggingFaceConfig
    from transformers import LlamaForCausalLM

    config = model.config
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq,
        }
    theirs = LlamaForCausalLM(
        HuggingFaceConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden,
            intermediate_size=config.ffn_hidden,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=512,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    theirs.load_state_dict({_hugging_face_name(name): tensor for name, tensor in model.state_dict().items()})
    return theirs.eval()


def _hugging_face_name(name: str) -> str:
    for ours, its in {
        "tok_embeddings": "embed_tokens",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.w": "self_attn.w",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        ".wq": ".q_proj",
        ".wk": ".k_proj",
        ".wv": ".v_proj",
        ".wo": ".o_proj",
    }.items():
        name = name.replace(ours, its)
    return name.replace("output.", "lm_head.") if name.startswith("output.") else f"model.{name}"


def filled(config: LlamaConfig) -> Llama:
    model = Llama(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1, generator=generator)
    return model


@needs_transformers
@pytest.mark.parametrize(
    "rope_scaling", [None, RopeScaling(original_max_seq=64)], ids=["plain rope", "llama 3.1 rope"]
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("n_kv_heads", [12, 4, 1])
def test_logits_equal_those_of_transformers(
    n_kv_heads: int, tied: bool, rope_scaling: RopeScaling | None
) -> None:
    model = filled(LlamaConfig(97, 96, 2, 12, n_kv_heads, 160, tied=tied, rope_scaling=rope_scaling))
    ids_BS = torch.randint(0, 97, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(ids_BS), hugging_face(model)(ids_BS, use_cache=False).logits
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@needs_transformers
def test_rope_scaling_and_theta_change_the_logits() -> None:
    """Else the comparison above would see nothing of them."""
    config = LlamaConfig(97, 96, 2, 12, 4, 160)
    model = filled(config)
    ids_BS = torch.randint(0, 97, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = hugging_face(model)(ids_BS).logits
        for other in (
            replace(config, rope_scaling=RopeScaling(original_max_seq=64)),
            replace(config, rope_theta=10_000.0),
        ):
            assert (filled(other)(ids_BS) - logits).abs().max() > 1e-3


def test_a_token_sees_no_later_one() -> None:
    model = filled(LlamaConfig(97, 96, 2, 12, 4, 160))
    ids_BS = torch.arange(20).view(1, 20)
    changed_BS = ids_BS.clone()
    changed_BS[0, 12] = 90
    with torch.no_grad():
        before, after = model(ids_BS), model(changed_BS)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=0)
    assert (before[:, 12:] != after[:, 12:]).any()


def initial(model: nn.Module, names: list[str], seed: int) -> dict[str, Tensor]:
    shapes = dict(model.named_parameters())
    return {
        name: initial_parameter(
            name, shapes[name].shape, seed=seed, dtype=torch.float32, device=torch.device("cpu")
        )
        for name in names
    }


def test_initial_weights_do_not_depend_on_the_order_in_which_they_are_drawn() -> None:
    model = get_spec("llama3-debug").with_layers(2).build()
    names = [name for name, _ in model.named_parameters()]
    torch.manual_seed(123)
    forward = initial(model, names, seed=7)
    torch.rand(10)
    backward = initial(model, names[::-1], seed=7)
    for name in names:
        assert torch.equal(forward[name], backward[name])


def test_initial_weights_differ_by_seed_and_name() -> None:
    shape = torch.Size((16, 16))
    drawn = [
        initial_parameter(name, shape, seed=seed, dtype=torch.float32, device=torch.device("cpu"))
        for name in ("layers.0.attention.wq.weight", "layers.1.attention.wq.weight")
        for seed in (0, 1)
    ]
    assert len({tuple(tensor.flatten().tolist()) for tensor in drawn}) == 4


def test_initial_matrices_are_normal_and_vectors_ones() -> None:
    matrix = initial_parameter(
        "w", torch.Size((512, 512)), seed=0, dtype=torch.float32, device=torch.device("cpu")
    )
    assert abs(float(matrix.mean())) < 1e-4
    assert float(matrix.std()) == pytest.approx(0.02, rel=0.01)
    vector = initial_parameter(
        "norm.weight", torch.Size((8,)), seed=0, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert vector.dtype is torch.bfloat16
    assert (vector == 1).all()


def test_initial_weights_are_rounded_to_the_dtype_after_they_are_drawn() -> None:
    shape, device = torch.Size((8, 8)), torch.device("cpu")
    single = initial_parameter("w", shape, seed=0, dtype=torch.float32, device=device)
    half = initial_parameter("w", shape, seed=0, dtype=torch.bfloat16, device=device)
    assert torch.equal(half, single.to(torch.bfloat16))
