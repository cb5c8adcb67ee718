"""Models by name: specs, and the user's own factories. Hugging Face's are in test_hugging_face.py."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwise.core.errors import ModelError
from shardwise.core.shown import shown
from shardwise.models.factory import FactoryModel
from shardwise.models.frameworks import frameworks
from shardwise.models.source import find_model, vocab_size_of
from shardwise.models.specs import get_spec

OWN_MODELS = """
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 4)
            self.head = nn.Linear(4, 11)
        def forward(self, ids):
            return self.head(self.embedding(ids))

    def with_dtype(*, dtype):
        return Tiny().to(dtype)

    def with_mesh(dtype, mesh):
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
        return parallelize_module(Tiny(), mesh["tp"], {"head": ColwiseParallel()})

    def with_mesh_if_any(mesh=None):
        return Tiny() if mesh is None else with_mesh(None, mesh)

    def raises():
        raise ValueError("no such\\nsecond line")

    def raises_much():
        raise RuntimeError("</script>\\x1b[31m" + "x" * 10_000_000)

    def leaves():
        raise SystemExit(3)

    def empty():
        return None

    def needs(hidden, dtype):
        return Tiny()

    def only_by_place(dtype, /):
        return Tiny()

    an_instance = Tiny()
    a_number = 3

    class Group:
        tiny = Tiny
"""


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with modules of the user's own."""
    (tmp_path / "own_models.py").write_text(dedent(OWN_MODELS))
    (tmp_path / "own_broken.py").write_text("import own_models\n1 / 0\n")
    (tmp_path / "own_needy.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "own_leaver.py").write_text("import sys\nsys.exit('usage: ...')\n")
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


def built(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return find_model(name).build(dtype=dtype)


def refusal(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        built(name)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert len(message) < 700
    assert message.isprintable()
    return message


def test_a_llama_spec_is_found_by_its_name_and_built_on_meta() -> None:
    found = find_model("llama3-8b")
    model = found.build(dtype=torch.bfloat16)
    assert (found.name, found.vocab_size, found.notes) == ("llama3-8b", 128_256, ())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert vocab_size_of(model) == 128_256


def test_an_unknown_name_says_how_models_are_named() -> None:
    assert refusal("llama3-8B") == (
        'unknown model "llama3-8B". Did you mean "llama3-8b"? Known: llama3-debug, llama3-8b, llama3-70b, '
        "llama3.1-405b, gpt-debug, "
        "gpt3-1.3b, gpt3-6.7b, gpt3-175b, moe-debug, mixtral-8x7b, qwen3-30b-a3b, megatron-22b; "
        "NAME?KEY=VALUE,...; or hf:TYPE, hf:PATH of a config.json, "
        f"{''.join(f'{each.prefix}:..., ' for each in frameworks())}or package.module:factory."
    )


OTHER_SIZES = {
    "gpt3-175b?n_layers=4": {"n_layers": 4},
    # heads keep their width, the inner width its ratio to hidden
    "gpt3-175b?n_layers=4,hidden=1024": {"n_layers": 4, "hidden": 1024, "n_heads": 8, "ffn_hidden": 4096},
    "gpt3-175b?hidden=1024,n_heads=4,ffn_hidden=64": {"hidden": 1024, "n_heads": 4, "ffn_hidden": 64},
    "gpt-debug?tied=false,max_seq=64": {"tied": False, "max_seq": 64},
    "llama3-8b?n_layers=2, hidden=2048": {
        "n_layers": 2,
        "hidden": 2048,
        "n_heads": 16,
        "n_kv_heads": 4,
        "ffn_hidden": 7168,
    },
    "llama3-8b?rope_theta=10000": {"rope_theta": 10_000},
    "llama3.1-405b?vocab_size=1000": {"vocab_size": 1000},
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_numbers_behind_a_specs_name_replace_its_own(name: str) -> None:
    base = get_spec(name.partition("?")[0])
    config = replace(base.config, **OTHER_SIZES[name])  # type: ignore[arg-type]
    assert find_model(name) == replace(base, name=name, config=config)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", 'can\'t read "". Write KEY=VALUE with a number, true or false.'),
        ("n_layers", 'can\'t read "n_layers". Write KEY=VALUE with a number, true or false.'),
        ("n_layers=two", 'can\'t read "n_layers=two". Write KEY=VALUE with a number, true or false.'),
        (
            "layers=4",
            'gpt3-175b has no "layers". Did you mean "n_layers"? Known: vocab_size, hidden, n_layers, '
            "n_heads, ffn_hidden, max_seq, norm_eps, tied.",
        ),
        ("n_layers=0", "n_layers is 0. Use a whole number from 1 to 4,096."),
        ("n_layers=4097", "n_layers is 4097. Use a whole number from 1 to 4,096."),
        ("n_layers=true", "n_layers is true. Use a whole number from 1 to 4,096."),
        ("hidden=1e3", "hidden is 1000.0. Use a whole number from 1 to 10,000,000."),
        ("norm_eps=nan", "norm_eps is nan. Use a number above 0."),
        ("tied=1", "tied is 1. Use true or false."),
        (
            "hidden=1000",
            "n_heads is 96 where hidden is 12288, and can't keep that ratio where hidden is 1000. Name it "
            "too: n_heads=...",
        ),
        ("n_heads=7", "gpt: hidden 12288 is no multiple of 7 heads."),
    ],
)
def test_numbers_that_a_spec_can_t_take_are_one_line(query: str, message: str) -> None:
    assert refusal(f"gpt3-175b?{query}") == f'model "gpt3-175b?{query}": {message}'


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x" * 10_000_000,
        "</script>\x1b[31m\n\x00",
        "a:" + "b" * 10_000_000,
        "hf:" + "c" * 10_000_000,
        "gpt-debug?" + "n" * 10_000_000,
        "gpt-debug?\x1b=1",
    ],
)
def test_a_hostile_name_is_a_short_printable_line(name: str) -> None:
    refusal(name)


def test_the_class_of_a_module_is_a_factory(own_folder: Path) -> None:
    found = find_model("own_models:Tiny")
    model = found.build(dtype=torch.float64)
    assert (found.name, found.about, found.vocab_size, found.notes) == (
        "own_models:Tiny",
        "your own model",
        None,
        (),
    )
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    assert vocab_size_of(model) == 11
    assert built("own_models:Group.tiny")(torch.zeros(1, 2, dtype=torch.long, device="meta")).shape == (
        1,
        2,
        11,
    )


def test_a_factory_is_told_the_dtype_if_it_asks(own_folder: Path) -> None:
    model = built("own_models:with_dtype", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() is torch.float32


def test_a_factory_that_takes_a_mesh_may_shard_its_model_itself(own_folder: Path) -> None:
    found, optional = find_model("own_models:with_mesh"), find_model("own_models:with_mesh_if_any")
    assert isinstance(found, FactoryModel)
    assert isinstance(optional, FactoryModel)
    assert found.takes_mesh
    assert optional.takes_mesh
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        for source in (found, optional):
            model: Any = source.build(dtype=torch.float32, mesh=mesh)
            weight = model.head.weight
            assert isinstance(weight, DTensor)
            assert weight.placements == (Shard(0),)
            assert weight.is_meta
    finally:
        dist.destroy_process_group()
    assert not isinstance(built("own_models:with_mesh_if_any").head.weight, DTensor)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "own_model:Tiny",
            'no module "own_model" in this folder or among the installed packages. Run it from the folder '
            "of your code, or install your "
            "package.",
        ),
        (
            "own_models.part:Tiny",
            'no module "own_models.part" in this folder or among the installed packages. Run it from the '
            "folder of your code, or install your "
            "package.",
        ),
        (
            "own_needy:Tiny",
            "importing own_needy raised ModuleNotFoundError: No module named "
            "'a_package_that_is_not_there'. Try: python -c \"import own_needy\".",
        ),
        (
            "own_broken:Tiny",
            'importing own_broken raised ZeroDivisionError: division by zero. Try: python -c "import '
            'own_broken".',
        ),
        (
            "own_leaver:Tiny",
            'importing own_leaver raised SystemExit: usage: ... Try: python -c "import own_leaver".',
        ),
        (
            "own_models:tiny",
            'own_models has no "tiny". Did you mean "Tiny"? Name a function that returns an nn.Module.',
        ),
        (
            "own_models:a_number",
            "a_number is of type int, which can't be called for a new model. Name a function.",
        ),
        (
            "own_models:an_instance",
            "an_instance is of type Tiny, which can't be called for a new model. Name a function.",
        ),
        ("own_models:empty", "the factory returned NoneType. Return an nn.Module."),
        (
            "own_models:raises",
            'the factory raised ValueError: no such... Call it by itself, under torch.device("meta"), to '
            "see where.",
        ),
        (
            "own_models:leaves",
            'the factory raised SystemExit: 3. Call it by itself, under torch.device("meta"), to see where.',
        ),
        (
            "own_models:needs",
            'the factory needs an argument "hidden". It may take dtype and mesh; give any other a default, '
            "or name a function that takes none.",
        ),
        (
            "own_models:only_by_place",
            'the factory needs an argument "dtype". It may take dtype and mesh; give any other a default, '
            "or name a function that takes none.",
        ),
        (
            "own_models:with_mesh",
            "the factory takes a mesh, and there is none. Give it a default: mesh=None.",
        ),
        ("own_models:", "not of the form package.module:factory, a module to import and a function in it."),
        (
            "C:\\own_models.py",
            "not of the form package.module:factory, a module to import and a function in it.",
        ),
    ],
)
def test_what_is_wrong_with_a_factory_is_one_line(own_folder: Path, name: str, message: str) -> None:
    assert refusal(name) == f'model "{shown(name)}": {message}'


def test_an_error_of_ten_megabytes_is_cut_and_shows_no_control_characters(own_folder: Path) -> None:
    message = refusal("own_models:raises_much")
    assert "RuntimeError: </script>\\x1b[31mxxx" in message


def test_a_model_without_an_embedding_must_say_its_vocabulary() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ModelError) as caught:
        vocab_size_of(model)
    assert (
        str(caught.value)
        == "Linear: no nn.Embedding tells the vocabulary. Give the model an attribute vocab_size."
    )
    model.vocab_size = 5  # type: ignore[assignment]
    assert vocab_size_of(model) == 5


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("  two\nlines", "two..."),
        ("tab\there", "tab\\there"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("x" * 100, "x" * 80 + "..."),
        ("", ""),
        ("ends\n\n", "ends"),
        (None, "None"),
    ],
)
def test_text_from_outside_is_shown_as_one_short_line(text: object, line: str) -> None:
    assert shown(text) == line
