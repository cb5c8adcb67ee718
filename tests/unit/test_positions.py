"""Where a token stands, told: models take position_ids, and packed documents, each of which then gives what
it gives alone."""

import pytest
import torch
from torch import Tensor, nn

from shardwise.models.gpt import GPT, GPTConfig
from shardwise.models.llama import Llama, LlamaConfig
from shardwise.models.source import find_model

LENGTHS = (5, 4, 3)
TINY_QWEN = (
    "hf:qwen3?num_hidden_layers=2,hidden_size=32,intermediate_size=64,vocab_size=97,"
    "num_attention_heads=4,num_key_value_heads=2,head_dim=8"
)


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "llama": Llama(LlamaConfig(97, 32, 2, 4, 2, 48)),
        "gpt": GPT(GPTConfig(97, 32, 2, 4, 48, max_seq=16)),
        "hf:qwen3": find_model(TINY_QWEN).build(dtype=torch.float64, device="cpu"),
    }


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and documents of a sequence of several documents, [1, S] each."""
    ids = torch.randint(97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    documents = torch.cat([torch.full((length,), at) for at, length in enumerate(LENGTHS)])[None]
    return ids, positions, documents


@pytest.mark.parametrize("name", ["llama", "gpt", "hf:qwen3"])
def test_the_places_in_a_sequence_are_the_positions_of_one_text(name: str) -> None:
    model, (ids, _, _) = models()[name].double(), packed()
    at = torch.arange(ids.shape[1])[None]
    torch.testing.assert_close(model(ids, position_ids=at), model(ids), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["llama", "gpt", "hf:qwen3"])
def test_a_packed_document_gives_what_it_gives_alone(name: str) -> None:
    model, (ids, positions, documents) = models()[name].double(), packed()
    told = {} if name.startswith("hf:") else {"documents": documents}
    logits = model(ids, position_ids=positions, **told)
    alone = torch.cat([model(each) for each in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-12)
    assert (model(ids) - alone).abs().max() > 1e-4  # one text it isn't


def test_transformers_makes_no_mask_where_another_sees_to_it() -> None:
    """Positions that jump are then no documents: every attention asks for causal, grouped and unmasked."""
    model, (ids, positions, _) = models()["hf:qwen3"].double(), packed()
    torch.testing.assert_close(
        model(ids, position_ids=positions, makes_masks=False)[:, : LENGTHS[0]],
        model(ids)[:, : LENGTHS[0]],
        rtol=0,
        atol=1e-14,
    )
    assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
