"""Exports without ranks: what each format writes, what it can't say and what that costs, and what is
refused."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import shardwise
from shardwise.core.errors import InputError
from shardwise.core.export import Export
from shardwise.core.plan import Plan
from shardwise.export.code import Raw, Row, Table, call, checked_name, comment, text, written
from shardwise.export.formats import formats
from tests.e2e.command import shardwise as command
from tests.matrix import FULL

SMALL = (
    "num_hidden_layers=2,hidden_size=64,intermediate_size=96,vocab_size=256,num_attention_heads=4,"
    "num_key_value_heads=2"
)
LLAMA = f"hf:llama?{SMALL}"


def exported(plan: str = "rowwise", framework: str = "pytorch", **keys: Any) -> Export:
    cost = keys.pop("cost", False)
    case = shardwise.case(plans=[plan], **keys)
    return shardwise.export(case, framework=framework, cost=cost).answer


def made_plan(model: str, folder: Path) -> str:
    """The plan that `shardwise plan` makes, as a file."""
    path = folder / "plan.toml"
    path.write_text(shardwise.plan(shardwise.case(model=model)).answer.to_toml())
    return str(path)


def refusal(plan: str = "rowwise", framework: str = "pytorch", **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        exported(plan, framework, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_written_in_plain_pytorch_is_laid_out_as_ruff_lays_it_out() -> None:
    settings: list[dict[str, Any]] = [
        {"mesh": "fsdp=2,tp=2", "recompute": "selective-ops", "param_dtype": "bfloat16", "accumulation": 2},
        {"mesh": "dp=2,tp=2", "recompute": "full", "dtype": "bfloat16"},
        {"mesh": "dp=2,fsdp=2,tp=2", "accumulation": 2, "reduce_once": True, "reshard_after_forward": False},
    ]
    plans = ("rowwise", "replicated", "colwise")
    for plan, each in zip(plans, settings, strict=True):
        made = exported(plan, batch=8, seq=64, **each)
        check_clean(made.files[0].text)
        assert made.left_out == ()


def check_clean(code: str) -> None:
    ast.parse(code)
    for how in (["format", "--check"], ["check", "--select", "F,I"]):
        asked = [sys.executable, "-m", "ruff", how[0], "--isolated", "--quiet", *how[1:], "-"]
        done = subprocess.run(asked, input=code, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{code}"


def test_a_file_carries_the_command_that_makes_it_again() -> None:
    made = exported(mesh="fsdp=2,tp=2", recompute="full", reshard_after_forward=False)
    assert made.command == (
        "shardwise export rowwise --as pytorch --model llama3-debug --mesh fsdp=2,tp=2 "
        "--no-reshard-after-forward --recompute full"
    )
    assert made.files[0].text.startswith(f"# Made by: {made.command}\n")
    assert made.prove == "shardwise verify own --model sharded:build --mesh fsdp=2,tp=2"


def test_toml_says_all_of_a_plan_and_its_case() -> None:
    made = exported("routed-interleaved", "toml", mesh="tp=4", recompute="full", seq=64)
    plan, case = (file.text for file in made.files)
    assert Plan.from_toml(plan) == shardwise.builtin_plan("routed-interleaved")
    assert made.left_out == ()
    table = tomllib.loads(case)
    assert table["plans"] == ["plan.toml"]
    assert (table["mesh"], table["recompute"], table["seq"]) == ("tp=4", "full", 64)


def test_what_pytorch_cannot_say_is_named_with_what_it_costs() -> None:
    made = exported("routed", model="llama3-debug", mesh="tp=2", seq=256, cost=True)
    (left_out,) = made.left_out
    assert left_out.asked == '"tok_embeddings" (routed)'
    assert left_out.instead == "rowwise(output=shard(1))"
    assert made.cost is not None
    assert made.cost.asked_s > 0
    assert made.cost.said_s != made.cost.asked_s
    assert made.said is not None
    assert Plan.from_toml(made.said).rules[0].style.name == "rowwise"
    assert "Left out: " in made.files[0].text
    assert "By predict on h100-sxm-80gb" in str(shardwise.Result(made))


def test_a_block_with_a_rule_that_cannot_be_said_is_whole_on_every_rank(tmp_path: Path) -> None:
    rules = shardwise.builtin_plan("rowwise").to_toml()
    pieces = re.sub(
        r'"(layers.*feed_forward.w[13])" = "colwise"',
        r'"\1" = { style = "colwise", pieces = "512+512" }',
        rules,
    )
    old = '"layers.*.feed_forward.w2" = { style = "rowwise"'
    pieces = pieces.replace(old, f'{old}, pieces = "512+512"')
    path = tmp_path / "pieces.toml"
    path.write_text(pieces)
    made = exported(str(path))
    (left_out,) = made.left_out
    assert left_out.instead == "layers.*.feed_forward whole on every rank"
    assert left_out.why == "PyTorch's own styles cut what lies in several pieces as if it were one."
    code = made.files[0].text
    check_clean(code)
    assert '"layers.*.feed_forward": PrepareModuleInputOutput(' in code
    assert '"layers.*.feed_forward.w1": Whole(),' in code
    assert '"layers.*.attention.wq": ColwiseParallel(),' in code


@pytest.fixture(scope="module")
def plan_of_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made_plan(LLAMA, tmp_path_factory.mktemp("plans"))


def test_automodel_imports_a_plan_that_its_yaml_names(plan_of_llama: str) -> None:
    made = exported(plan_of_llama, "automodel", model=LLAMA, mesh="dp=2,fsdp=2,tp=2", recompute="full")
    code, section = (file.text for file in made.files)
    check_clean(code)
    assert made.left_out == ()
    assert "def tp_shard_plan() -> dict[str, ParallelStyle]:" in code
    assert section.splitlines()[2:] == [
        "distributed:",
        "  strategy: fsdp2",
        "  tp_size: 2",
        "  dp_size: 4",
        "  dp_replicate_size: 2",
        "  tp_plan: sharded.tp_shard_plan",
        "  activation_checkpointing: full",
        "  reshard_after_forward: true",
        "  mp_policy:  # Automodel's own default is bfloat16, reduced in float32",
        "    _target_: torch.distributed.fsdp.MixedPrecisionPolicy",
        "    param_dtype: float32",
        "    reduce_dtype: float32",
    ]


def test_hf_says_the_nearest_plan_without_a_cut_sequence(plan_of_llama: str) -> None:
    made = exported(plan_of_llama, "hf", model=LLAMA, mesh="fsdp=2,tp=2")
    assert [each.asked for each in made.left_out] == [
        "activations cut along the sequence between blocks",
        "logits cut by vocabulary",
        "one sum of the gradient of each block's input",
    ]
    code = made.files[0].text
    check_clean(code)
    assert '"model.layers.*.self_attn.q_proj": "colwise",' in code
    assert '"lm_head": "colwise_gather_output",' in code
    assert "DistributedConfig(tp_size=2, fsdp_size=2, tp_plan=TP_PLAN)" in code


@FULL
def test_hf_names_each_rule_of_the_models_own_that_this_plan_has_not(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    text_of = Path(made_plan(LLAMA, tmp_path)).read_text()
    kept = [line for line in text_of.splitlines() if "mlp" not in line]
    path.write_text("\n".join([*kept, '"model.layers.*.mlp" = { style = "whole", input = "shard(1)" }']))
    code = exported(str(path), "hf", model=LLAMA).files[0].text
    assert '"model.layers.*.mlp.gate_proj": "replicate",' in code


def test_fsdp_alone_needs_no_plan() -> None:
    code = exported("unsharded", mesh="fsdp=4").files[0].text
    check_clean(code)
    assert "parallelize_module" not in code
    assert "loss_parallel" not in code
    assert "fully_shard(layer, mesh=fsdp)" in code


def test_what_no_format_comes_near_to_is_refused_in_a_line() -> None:
    assert refusal(framework="pytorhc") == (
        f'--as is "pytorhc". Did you mean "pytorch"? Allowed: {", ".join(formats())}.'
    )
    assert refusal(mesh="pp=2,tp=2") == (
        "--as pytorch: mesh pp=2,tp=2 has pipeline stages, and its files say nothing near that. Use a mesh "
        "of dp, fsdp and tp, or --as toml."
    )
    assert "ranks that share a sequence" in refusal(mesh="cp=2,tp=2", seq=64)
    assert refusal("own") == (
        'plan "own" has no rules of ours to export. `shardwise plan --model llama3-debug --mesh tp=2 --toml '
        "> mine.toml` makes a plan that has."
    )
    assert refusal("unsharded").startswith('plan "unsharded" has no rules of ours')
    assert refusal(framework="torchtitan").endswith(
        "Use --model titan:FAMILY/FLAVOR, with a plan in its modules' names, or --as pytorch."
    )
    assert "is no Hugging Face model, which is what Automodel trains" in refusal(framework="automodel")
    assert refusal(framework="hf") == (
        "--as hf: llama3-debug is no Hugging Face model, which is what transformers shards. Use --model "
        "hf:TYPE, or --as pytorch."
    )


def test_only_dotted_names_enter_code() -> None:
    for name in ("a b", 'x"]', "x\n", "é", "os.system('x')", "__import__('os')", ""):
        with pytest.raises(InputError, match="is no dotted name"):
            checked_name(name)
    assert checked_name("layers.*.attn.0.w") == "layers.*.attn.0.w"
    for hostile in ('"""', "'\"", "\\", "a\nb", "\u202e", "\x00"):
        assert ast.literal_eval(text(hostile)) == hostile
    assert "\n" not in comment("x\nimport os\r\u2028")


def test_a_hostile_name_in_a_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hostile_model.py").write_text(
        "from torch import nn\n"
        "NAME = 'x\": print(1), \"y'\n"
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table = nn.Embedding(16, 8)\n"
        "        self.add_module(NAME, nn.Linear(8, 16))\n"
        "    def forward(self, ids):\n"
        "        return self._modules[NAME](self.table(ids))\n"
        "def build():\n    return Model()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = tmp_path / "plan.toml"
    plan.write_text(
        '[rules]\n"table" = { style = "rowwise", output = "replicate" }\n'
        '\'x*\' = { style = "colwise", output = "replicate" }\n'
    )
    message = refusal(str(plan), model="hostile_model:build")
    assert "is no dotted name of a module, which is all that enters code" in message


def test_code_is_opened_where_a_line_is_too_short_for_it() -> None:
    short = call("f", Raw("x"), key=Row((Raw("1"),)))
    assert written(short) == "f(x, key=(1,))"
    long = call("function", *(Raw("x" * 20) for _ in range(5)))
    assert written(long).splitlines()[1] == f"    {'x' * 20},"
    assert written(Table((("a", short),), (("a", "why"),)), 4) == '{\n    # why\n    "a": f(x, key=(1,)),\n}'


def test_files_are_written_over_only_where_export_made_them(tmp_path: Path) -> None:
    asked = ("export", "rowwise", "--as", "toml", "--out", str(tmp_path))
    for count in (1, 2):
        done = command(*asked)
        assert done.returncode == 0, (count, done.stderr)
    (tmp_path / "plan.toml").write_text("mine")
    done = command(*asked)
    assert done.returncode == 2
    assert "plan.toml is there, and shardwise export hasn't made it" in done.stderr
    assert (tmp_path / "plan.toml").read_text() == "mine"
