"""Weights of a Hugging Face folder in one process: what is refused, in a line, and what is left as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardwise.core.errors import ModelError, RunError
from shardwise.core.training import Saved
from shardwise.models.hugging_face import HuggingFaceModel, find_hugging_face
from shardwise.train.checkpoints import Checkpoints
from shardwise.train.weights import read_weights, write_weights
from tests.matrix import thinned

pytest.importorskip("transformers")
SIZES = "hidden_size=16,intermediate_size=16,num_attention_heads=2,num_key_value_heads=2,vocab_size=32"
SOURCE = find_hugging_face(f"hf:llama?num_hidden_layers=1,{SIZES}")
BIASED = find_hugging_face(f"hf:qwen2?num_hidden_layers=1,{SIZES}")
TIED = find_hugging_face(f"hf:gemma?num_hidden_layers=1,head_dim=8,pad_token_id=0,{SIZES}")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(SOURCE, tmp_path / "weights")


def written(source: HuggingFaceModel, folder: Path) -> Path:
    torch.manual_seed(1)
    model: Any = source.build(dtype=torch.float32, device="cpu")
    del model.forward
    model.save_pretrained(folder, max_shard_size=4000)
    return folder


def _elsewhere(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../../../etc/passwd.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def _no_json(folder: Path) -> None:
    (folder / INDEX).write_text("{" * 10_000)


def _pickled(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _without_norm(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def _truncated(folder: Path) -> None:
    file = json.loads((folder / INDEX).read_text())["weight_map"]["model.norm.weight"]
    (folder / file).write_bytes((folder / file).read_bytes()[:-5])


def _without_file(folder: Path) -> None:
    file = json.loads((folder / INDEX).read_text())["weight_map"]["model.norm.weight"]
    (folder / file).unlink()


REFUSED: dict[Callable[[Path], None], str] = {
    _elsewhere: 'names the file "../../../etc/passwd.safetensors". Only files beside it are read.',
    _no_json: f"{INDEX} can't be read: ",
    _pickled: f"has neither {INDEX} nor model.safetensors. Give a folder of safetensors files, as "
    "save_pretrained() writes it; files that hold Python objects (.bin, .pt) aren't read.",
    _without_norm: "there is no model.norm.weight. Use the folder of a llama with the sizes of ",
    _truncated: " can't be read: ",
    _without_file: "can't be read: ",
}


@pytest.mark.parametrize("fault", REFUSED, ids=lambda fault: fault.__name__.strip("_"))
def test_a_folder_that_has_no_such_weights_is_refused_in_a_line(
    fault: Callable[[Path], None], folder: Path
) -> None:
    fault(folder)
    with pytest.raises(ModelError) as refused:
        read_weights(folder, SOURCE.build(dtype=torch.float32, device="cpu"), SOURCE)
    assert REFUSED[fault] in str(refused.value)
    assert str(refused.value).startswith(f"weights {folder}: ")
    assert "\n" not in str(refused.value)


def test_weights_of_other_sizes_are_refused_with_both(folder: Path) -> None:
    other = find_hugging_face(
        f"hf:llama?num_hidden_layers=1,{SIZES.replace('vocab_size=32', 'vocab_size=40')}"
    )
    with pytest.raises(ModelError, match=r"it is \[32, 16\], and the model's is \[40, 16\]"):
        read_weights(folder, other.build(dtype=torch.float32, device="cpu"), other)


def test_quantized_weights_are_refused_for_they_mean_nothing_without_their_scales(folder: Path) -> None:
    file = json.loads((folder / INDEX).read_text())["weight_map"]["model.norm.weight"]
    tensors = load_file(folder / file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight can't be read: it is of F8_E4M3, quantized"):
        read_weights(folder, SOURCE.build(dtype=torch.bfloat16, device="cpu"), SOURCE)


def test_what_the_model_lacks_is_refused_and_what_it_has_no_use_for_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no model\.layers\.0\.self_attn\.q_proj\.bias"):
        read_weights(folder, BIASED.build(dtype=torch.float32, device="cpu"), BIASED)
    without = find_hugging_face(f"hf:llama?num_hidden_layers=0,{SIZES}")
    unused = read_weights(folder, without.build(dtype=torch.float32, device="cpu"), without)
    assert len(unused) == 9
    assert all(name.startswith("model.layers.0.") for name in unused)


@pytest.mark.parametrize("source", [SOURCE, TIED], ids=["llama", "gemma, which is tied"])
def test_weights_are_read_in_the_dtype_of_the_model_and_written_in_it(
    source: HuggingFaceModel, tmp_path: Path
) -> None:
    model: Any = source.build(dtype=torch.bfloat16, device="cpu")
    assert read_weights(written(source, tmp_path / "in"), model, source) == ()
    torch.manual_seed(1)
    expected = source.build(dtype=torch.float32, device="cpu")
    for (name, value), before in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert value.dtype is torch.bfloat16
        assert torch.equal(value, before.bfloat16()), name
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    saved = Saved(1, 1, "", {}, {}, 1, 1)
    checkpoints.save(1, model, torch.optim.AdamW(model.parameters()), saved, wait=True)
    write_weights(checkpoints.newest(), source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    again: Any = source.build(dtype=torch.bfloat16, device="cpu")
    read_weights(tmp_path / "out", again, source)
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    with pytest.raises(RunError, match="is there already"):
        write_weights(checkpoints.newest(), source, tmp_path / "out")
    with pytest.raises(ModelError, match="is of another model than hf:qwen2"):
        write_weights(checkpoints.newest(), BIASED, tmp_path / "other")


@pytest.mark.parametrize(
    "kind",
    thinned(
        # of these files and the model hold experts, and more, in several ways
        [
            "qwen3_moe",
            "gpt_oss",
            "deepseek_v3",
            "olmoe",
            "phimoe",
            "jamba",
            "llama4_text",
            "glm4_moe",
            "gpt2",
        ],
        lambda kind: kind == "qwen3_moe",
    ),
)
def test_weights_of_any_type_come_back_as_transformers_has_them(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    large = find_hugging_face(f"hf:{kind}")
    source = large.small(2) or large
    written(source, tmp_path / "in")
    torch.manual_seed(2)
    model: Any = source.build(dtype=torch.float32, device="cpu")
    assert read_weights(tmp_path / "in", model, source) == ()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    checkpoints.save(1, model, optimizer, Saved(1, 1, "", {}, {}, 1, 1), wait=True)
    write_weights(checkpoints.newest(), source, tmp_path / "out", file_bytes=2_000_000)
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / way, dtype=torch.float32, local_files_only=True)
        for way in ("in", "out")
    )
    found = after.state_dict()
    for name, value in before.state_dict().items():
        assert torch.equal(found[name], value), name
