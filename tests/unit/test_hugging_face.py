"""Hugging Face models as sources, and plan `hf` on a fake process group. Numbers on real ranks:
tests/distributed/test_hugging_face.py."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import MeshError, ModelError, PlanError
from shardwise.core.mesh import Mesh
from shardwise.core.program import RuleUse
from shardwise.models.source import find_model, vocab_size_of
from shardwise.parallel.apply import applied_to, loss_of
from shardwise.parallel.engines.hugging_face import hugging_face_rules, parallelize_hugging_face
from shardwise.parallel.loss import PlainLoss
from shardwise.verbs.explain import explain
from shardwise.verbs.predict import predict

pytest.importorskip(
    "transformers",
    reason="transformers isn't installed, so nothing of it is tested: pip install shardwise[hf]",
)

SMALL = (
    "vocab_size=65,hidden_size=32,intermediate_size=48,num_attention_heads=4,num_key_value_heads=2,"
    "num_hidden_layers=2"
)
TINY_LLAMA = f"hf:llama?{SMALL}"
DEEP_CONFIG = '{"model_type": "llama", "a": ' * 50_000 + "1" + "}" * 50_000


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def built(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return find_model(name).build(dtype=dtype)


def refusal(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        built(name)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert len(message) < 500
    assert message.isprintable()
    return message


def written(folder: Path, config: object) -> str:
    """A config.json, as a command would name it."""
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return f"hf:{path}"


def with_weights(model: Any) -> Any:
    """A model from the meta device, with small random weights and its buffers computed anew."""
    model = model.to_empty(device="cpu")
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(0, 0.1, generator=generator)
    return model


def test_a_type_is_its_default_configuration_on_the_meta_device_in_train_mode() -> None:
    source = find_model("hf:qwen3?num_hidden_layers=1")
    model: Any = source.build(dtype=torch.bfloat16)
    assert (source.name, source.about) == (
        "hf:qwen3?num_hidden_layers=1",
        "Hugging Face qwen3, as transformers builds it",
    )
    assert (source.vocab_size, source.notes) == (151_936, ())
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert model.training
    assert model.config.num_hidden_layers == 1
    assert model.config.hidden_size == 4096
    assert "model.layers.0.self_attn.q_proj.weight" in dict(model.named_parameters())


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_ids_give_the_logits_of_transformers_own_model(model_type: str) -> None:
    changes = SMALL if model_type != "gpt2" else "vocab_size=65,n_embd=32,n_layer=2,n_head=4,n_positions=64"
    changes += ",bos_token_id=1,eos_token_id=2"
    model = built(f"hf:{model_type}?{changes}")
    model.to_empty(device="cpu")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    model.load_state_dict(theirs.state_dict())
    for ours, own in zip(model.modules(), theirs.modules(), strict=True):
        for name, buffer in own.named_buffers(recurse=False):
            setattr(ours, name, buffer)
    model.eval()
    ids_BS = torch.randint(0, 65, (2, 9))
    logits = model(ids_BS)
    assert type(logits) is Tensor
    assert torch.equal(logits, theirs(input_ids=ids_BS).logits)
    assert not torch.equal(logits, theirs(input_ids=ids_BS.flip(1)).logits)


def test_a_config_file_or_its_folder_is_read(tmp_path: Path) -> None:
    name = written(
        tmp_path,
        {
            "model_type": "llama",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "dtype": "float16",
        },
    )
    for found in (find_model(name), find_model(f"hf:{tmp_path}")):
        model: Any = found.build(dtype=torch.float32)
        assert (model.config.hidden_size, len(model.model.layers)) == (64, 3)
        assert next(model.parameters()).dtype is torch.float32


def test_a_changed_depth_cuts_the_lists_that_have_an_entry_per_layer(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    name = written(
        tmp_path,
        {"model_type": "qwen3", "num_hidden_layers": 4, "layer_types": kinds, "use_sliding_window": True},
    )
    model = built(f"{name}?num_hidden_layers=2")
    assert model.config.layer_types == kinds[:2]
    assert refusal(f"{name}?num_hidden_layers=5").endswith(
        "layer_types has an entry for each of 4 layers, so there can be no more than those."
    )


def test_a_key_of_the_language_model_inside_a_larger_one_needs_no_path() -> None:
    short, long = (
        find_model("hf:gemma3?num_hidden_layers=2"),
        find_model("hf:gemma3?text_config.num_hidden_layers=2"),
    )
    for source in (short, long):
        model: Any = source.build(dtype=torch.float32)
        assert model.config.text_config.num_hidden_layers == 2
        assert model.config.vision_config.num_hidden_layers == 12
        assert vocab_size_of(model) == source.vocab_size == 262_208


def test_a_key_that_a_type_calls_by_a_name_of_its_own_is_known_by_both() -> None:
    assert built("hf:gpt2?num_hidden_layers=3").config.n_layer == 3
    assert built("hf:gpt2?n_layer=3").config.n_layer == 3


def test_dropout_and_experts_and_quantization_are_told(tmp_path: Path) -> None:
    assert find_model("hf:gpt2").notes == (
        "Dropout is on, as in training: resid_pdrop 0.1, embd_pdrop 0.1, attn_pdrop 0.1.",
    )
    (experts,) = find_model("hf:mixtral").notes
    assert experts.startswith("Experts are multiplied by grouped_mm")
    quantized = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    assert find_model(written(tmp_path, quantized)).notes == (
        "quantization_config is left out: the weights are of the dtype that was asked for.",
    )


def test_experts_are_grouped_where_the_kernel_takes_the_dtype() -> None:
    mixtral = "hf:mixtral?num_hidden_layers=1"
    for dtype in (torch.bfloat16, torch.float32):
        assert built(mixtral, dtype).config._experts_implementation == "grouped_mm"
    assert built(mixtral, torch.float64).config._experts_implementation == "batched_mm"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:", "hf: wants a model type, such as hf:qwen3, or the path of a config.json."),
        (
            "hf:?num_hidden_layers=2",
            "hf: wants a model type, such as hf:qwen3, or the path of a config.json.",
        ),
        ("hf:qwen33", 'type "qwen33" isn\'t known in transformers VERSION. Did you mean "qwen3"?'),
        (
            "hf:resnet",
            'type "resnet" is no causal language model in transformers VERSION. Did you mean "prophetnet"?',
        ),
        (
            "hf:meta-llama/Llama-3.1-8B",
            "no such file. The hub is never read: download config.json and give its path, or give a type, "
            "such as hf:qwen3.",
        ),
        (
            "hf:qwen3?num_hiden_layers=2",
            'a qwen3 configuration has no "num_hiden_layers". Did you mean "num_hidden_layers"?',
        ),
        (
            "hf:gemma3?vision.hidden_size=2",
            'a gemma3 configuration has no "vision.hidden_size". Did you mean "hidden_size"?',
        ),
        ("hf:qwen3?__class__=2", 'a qwen3 configuration has no "__class__".'),
        ("hf:qwen3?", 'can\'t read "". Write KEY=VALUE with a number, true or false.'),
        ("hf:qwen3?hidden_size", 'can\'t read "hidden_size". Write KEY=VALUE with a number, true or false.'),
        (
            "hf:qwen3?hidden_act=gelu",
            'can\'t read "hidden_act=gelu". Write KEY=VALUE with a number, true or false.',
        ),
        (
            "hf:qwen3?vocab_size=0.5",
            "transformers refuses its configuration: TypeError: Field 'vocab_size' expected int, got float "
            "(value: 0.5). Change the configuration.",
        ),
        (
            "hf:gpt2?n_embd=64",
            "transformers can't build it: ValueError: `embed_dim` must be divisible by num_heads (got "
            "`embed_dim`: 64 and `num_heads`: 12). Change the configuration.",
        ),
        (
            "hf:qwen3?num_hidden_layers=1000000000000",
            "num_hidden_layers is 1000000000000; at most 4,096 is taken.",
        ),
        (
            "hf:mixtral?num_local_experts=1000000000000",
            "num_local_experts is 1000000000000; at most 4,096 is taken.",
        ),
        (
            "hf:qwen3?hidden_size=1000000000000",
            "hidden_size is 1000000000000; at most 10,000,000,000 is taken.",
        ),
    ],
)
def test_what_is_wrong_with_a_name_is_one_line(name: str, message: str) -> None:
    from transformers import __version__

    assert refusal(name) == f'model "{name}": {message.replace("VERSION", __version__)}'


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "not JSON: Expecting value: line 1 column 1 (char 0)."),
        ("[1]", "a config.json is an object, {...}, not list."),
        ("{}", 'the file has no "model_type". Give the config.json of a Hugging Face model.'),
        ('{"model_type": 3}', 'the file has no "model_type". Give the config.json of a Hugging Face model.'),
        (DEEP_CONFIG, "larger than 1 MiB, which no config.json is."),
        (DEEP_CONFIG[: 29 * 20_000], "not a config.json: nested too deep."),
        ({"model_type": "</script>"}, 'type "</script>" isn\'t known in transformers VERSION.'),
        ({"model_type": "llama", "x": "y" * 10_000_000}, "larger than 1 MiB, which no config.json is."),
        (
            {"model_type": "llama", "num_hidden_layers": 10**12},
            "num_hidden_layers is 1000000000000; at most 4,096 is taken.",
        ),
        (
            {"model_type": "llama", "num_labels": 10**12},
            "num_labels is 1000000000000; at most 4,096 is taken.",
        ),
        (
            {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}},
            "num_hidden_layers is 1000000000; at most 4,096 is taken.",
        ),
        (
            {"model_type": "llama", "num_hidden_layers": "many"},
            "transformers refuses its configuration: TypeError: Field 'num_hidden_layers' expected int, "
            "got str (value: 'many'). Change the configuration.",
        ),
    ],
)
def test_what_is_wrong_with_a_config_file_is_one_line(tmp_path: Path, config: object, message: str) -> None:
    from transformers import __version__

    name = written(tmp_path, config)
    found = refusal(name)
    assert found.partition(": ")[2].endswith(message.replace("VERSION", __version__))


@pytest.mark.parametrize(
    "values",
    [
        {"__class__": "x"},
        {"attribute_map": {"hidden_size": "__class__"}},
        {"sub_configs": 3},
        {"hidden_size": -1},
        {"hidden_size": 0},
        {"rope_parameters": {"rope_type": "</script>\u001b[31m\n" + "x" * 500_000}},
        {"hidden_act": "</script>" * 10_000},
        {"pad_token_id": 10**9},
        {"vocab_size": None},
        {"vocab_size": [1]},
        {"hidden_size": 10**10, "vocab_size": 10**10},
        {"num_hidden_layers": 4096, "per_layer_config": {"0": {"hidden_size": "x"}}},
    ],
)
def test_a_hostile_configuration_ends_in_a_short_line_or_a_model(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    name = written(tmp_path, {"model_type": "llama", "num_hidden_layers": 1, **values})
    message = ""
    try:
        built(name)
    except ModelError as error:
        message = str(error)
    assert len(message) < 500
    assert message.isprintable()


def test_code_and_kernels_that_a_configuration_asks_for_are_left_out(tmp_path: Path) -> None:
    name = written(
        tmp_path,
        {
            "model_type": "llama",
            "num_hidden_layers": 1,
            "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
            "attn_implementation": "kernels-community/evil",
            "_attn_implementation": "kernels-community/evil",
        },
    )
    model = built(name)
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert model.config._attn_implementation == "sdpa"


def test_a_device_or_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert refusal("hf:/dev/zero") == 'model "hf:/dev/zero": not a file. Give the path of a config.json.'
    assert "no such file" in refusal(f"hf:{tmp_path}")


def test_too_many_modules_end_the_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.models.hugging_face.MAX_MODULES", 30)
    assert refusal("hf:qwen3?num_hidden_layers=4") == (
        'model "hf:qwen3?num_hidden_layers=4": more than 30 modules. Take fewer layers or experts.'
    )
    built("hf:qwen3?num_hidden_layers=1")


def test_without_transformers_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert (
        refusal("hf:qwen3")
        == "model \"hf:qwen3\": transformers isn't installed. Try: pip install 'shardwise[hf]'."
    )


def test_a_user_s_factory_may_return_a_hugging_face_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_hugging_face.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "def tiny():\n"
        "    return LlamaForCausalLM(LlamaConfig(vocab_size=65, hidden_size=32, intermediate_size=48, "
        "num_hidden_layers=1,\n"
        "                                        num_attention_heads=4))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    model = with_weights(built("own_hugging_face:tiny"))
    logits = model(torch.zeros(1, 3, dtype=torch.long))
    assert type(logits) is Tensor
    assert logits.shape == (1, 3, 65)


def placements(model: nn.Module) -> dict[str, tuple[Placement, ...] | None]:
    """Of every name, tied ones twice; None for a plain tensor."""
    return {
        name: p.placements if isinstance(p, DTensor) else None
        for name, p in model.named_parameters(remove_duplicate=False)
        if ".1." not in name
    }


def test_plan_hf_shards_what_its_rules_say(mesh: DeviceMesh) -> None:
    model = built(TINY_LLAMA.replace("llama", "qwen3"))
    sharded: Any = parallelize_hugging_face(model, mesh)
    assert sharded is model
    rows, columns = (Shard(0),), (Shard(1),)
    layer = "model.layers.0"
    expected: dict[str, tuple[Placement, ...] | None] = {
        "model.embed_tokens.weight": rows,
        f"{layer}.self_attn.q_proj.weight": rows,
        f"{layer}.self_attn.k_proj.weight": rows,
        f"{layer}.self_attn.v_proj.weight": rows,
        f"{layer}.self_attn.o_proj.weight": (Shard(-1),),
        f"{layer}.self_attn.q_norm.weight": None,
        f"{layer}.self_attn.k_norm.weight": None,
        f"{layer}.mlp.gate_proj.weight": rows,
        f"{layer}.mlp.up_proj.weight": rows,
        f"{layer}.mlp.down_proj.weight": (Shard(-1),),
        f"{layer}.input_layernorm.weight": None,
        f"{layer}.post_attention_layernorm.weight": None,
        "model.norm.weight": None,
        "lm_head.weight": rows,
    }
    found = placements(model)
    assert found.keys() == expected.keys()
    for name, placement in expected.items():
        wanted = columns if placement == (Shard(-1),) else placement
        assert found[name] in (placement, wanted), name
    assert all(p.is_meta for p in model.parameters())


def test_the_rules_tell_what_each_matched(mesh: DeviceMesh) -> None:
    model = built(TINY_LLAMA)
    rules = hugging_face_rules(model)
    parallelize_hugging_face(model, mesh)
    applied = applied_to(model)
    assert (applied.plan, applied.foreign) == (None, rules)
    assert loss_of(model) == PlainLoss()
    by_pattern = {use.rule.pattern: use for use in rules}
    assert by_pattern["model.layers.*.self_attn.q_proj"] == RuleUse(
        "model.layers.*.self_attn.q_proj",
        "colwise",
        ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
    )
    assert by_pattern["lm_head"].rule.style == "colwise_gather_output"
    assert by_pattern["model.embed_tokens"].rule.style == "embedding_rowwise"
    assert all(use.modules for use in rules)
    rule = applied.rule_for("model.layers.1.mlp.down_proj.weight")
    assert str(rule) == '"model.layers.*.mlp.down_proj" (rowwise)'
    assert applied.rule_for("model.norm") is None


def test_a_rule_that_matches_nothing_is_kept_and_says_so() -> None:
    model = built(TINY_LLAMA)
    model._tp_plan["model.layers.*.self_attn.qkv_proj"] = "colwise"
    idle = [use for use in hugging_face_rules(model) if not use.modules]
    assert idle == [RuleUse("model.layers.*.self_attn.qkv_proj", "colwise", ())]


def test_a_tied_head_stays_tied_to_the_sharded_embedding(mesh: DeviceMesh) -> None:
    model = built(f"{TINY_LLAMA},tie_word_embeddings=true")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    parallelize_hugging_face(model, mesh)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head.weight, DTensor)
    assert model.lm_head.weight.placements == (Shard(0),)


def test_real_weights_are_cut_to_this_rank_s_part(mesh: DeviceMesh) -> None:
    model = with_weights(built(TINY_LLAMA))
    whole = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    parallelize_hugging_face(model, mesh)
    part = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(part, DTensor)
    assert torch.equal(part.to_local(), whole[:24])


@pytest.mark.parametrize("model_type", ["bloom", "gpt2"])
def test_a_model_without_a_plan_of_its_own_is_refused_in_one_line(model_type: str, mesh: DeviceMesh) -> None:
    model = built(f"hf:{model_type}?num_hidden_layers=1")
    with pytest.raises(PlanError) as caught:
        parallelize_hugging_face(model, mesh)
    assert str(caught.value) == (
        f'plan "hf": transformers has no tensor-parallel plan for {type(model).__name__}. '
        "`shardwise plan` makes one."
    )


def test_a_model_that_is_none_of_theirs_is_refused_in_one_line(mesh: DeviceMesh) -> None:
    with pytest.raises(PlanError) as caught:
        parallelize_hugging_face(built("llama3-debug"), mesh)
    assert (
        str(caught.value)
        == 'plan "hf": Llama is no Hugging Face model. Use it with --model hf:TYPE, or name another plan.'
    )


def test_a_head_that_would_leave_the_logits_cut_is_refused(mesh: DeviceMesh) -> None:
    model = built(TINY_LLAMA)
    model._tp_plan["lm_head"] = "colwise"
    with pytest.raises(PlanError) as caught:
        parallelize_hugging_face(model, mesh)
    assert str(caught.value) == (
        'plan "hf": its head lm_head is colwise, so each rank would hold a part of the logits and none '
        "could tell the loss. transformers' own "
        "plans say colwise_gather_output."
    )
    assert not any(isinstance(p, DTensor) for p in model.parameters())


def test_a_transformers_that_shards_in_another_way_is_said_to_be_the_reason(mesh: DeviceMesh) -> None:
    class Older(nn.Module):
        tp_plan: ClassVar[dict[str, str]] = {"up": "colwise"}

    from transformers import __version__

    with pytest.raises(PlanError) as caught:
        parallelize_hugging_face(Older(), mesh)
    assert str(caught.value) == (
        f'plan "hf": transformers {__version__} shards in another way than this plan has it done. Install '
        "transformers 5.23 or newer, or name another plan."
    )


def test_a_model_is_sharded_once_and_over_an_axis_named_tp(mesh: DeviceMesh) -> None:
    model = built(TINY_LLAMA)
    with pytest.raises(MeshError, match="Name one of them"):
        parallelize_hugging_face(model, init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)))
    parallelize_hugging_face(model, mesh)
    with pytest.raises(PlanError, match=r"is a DTensor already\. Build a fresh model\.$"):
        parallelize_hugging_face(model, mesh)


def test_building_and_sharding_warn_of_nothing_and_leave_settings_alone(
    mesh: DeviceMesh, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from torch.nn.modules.module import register_module_module_registration_hook

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    while_building = set()
    handle = register_module_module_registration_hook(
        lambda *_: while_building.add(constants.is_offline_mode())
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallelize_hugging_face(built(TINY_LLAMA, torch.bfloat16), mesh)
    handle.remove()
    assert while_building == {True}
    assert not constants.is_offline_mode()
    assert torch.get_default_dtype() is torch.float32
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    ("name", "longest"),
    [
        ("gpt2?n_layer=1", 1024),
        ("gpt2?n_layer=1,n_positions=40", 40),
        ("opt?num_hidden_layers=1", 2048),
        ("roberta?num_hidden_layers=1", 510),
        ("llama?num_hidden_layers=1", None),
    ],
)
def test_a_table_of_learned_positions_says_how_long_a_sequence_may_be(name: str, longest: int | None) -> None:
    assert find_model(f"hf:{name}").max_seq == longest


@pytest.mark.parametrize("verb", [explain, predict])
def test_heads_that_ranks_can_t_share_out_are_told_where_the_model_only_says_that_a_shape_is_wrong(
    verb: Callable[[Case], object],
) -> None:
    case = Case(TINY_LLAMA, Mesh.parse("tp=4"), ("hf",), StepSettings(1, 16, dtype="bfloat16"))
    with pytest.raises(PlanError) as caught:
        verb(case)
    assert str(caught.value) == (
        'plan "hf": tp=4 doesn\'t divide the 2 KV heads, and the rule cuts the projection that makes them: '
        'rule "model.layers.*.self_attn.k_proj" (colwise). Use tp in {1, 2}, or leave the projection whole.'
    )
