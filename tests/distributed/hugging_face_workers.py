"""What ranks do in test_hugging_face.py."""

from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwise.core.mesh import Mesh
from shardwise.launch import RankContext
from shardwise.models.source import find_model
from shardwise.parallel.apply import loss_of
from shardwise.parallel.engines.hugging_face import parallelize_hugging_face
from shardwise.step.build import device_mesh

SIZES = (
    "vocab_size=65,hidden_size=32,intermediate_size=48,num_attention_heads=4,num_key_value_heads=2,"
    "num_hidden_layers=2"
)
MODELS = (
    f"hf:llama?{SIZES}",
    f"hf:qwen3?{SIZES},tie_word_embeddings=true",
    f"hf:gemma2?{SIZES},head_dim=8,query_pre_attn_scalar=8",
    f"hf:mixtral?{SIZES},num_local_experts=4",
)
REFUSED_BY_ITSELF = (
    "hf:doge?num_hidden_layers=1,vocab_size=65",
    f"hf:llama4_text?{SIZES},head_dim=8,intermediate_size_mlp=48,num_local_experts=4",
    "hf:inkling_text?num_hidden_layers=1,vocab_size=65,hidden_size=64,moe_intermediate_size=48,"
    "n_routed_experts=8",
    f"hf:lfm2?{SIZES}",
)


def both(context: RankContext, payload: bytes) -> bytes:
    """What against_unsharded and own_failures give, in one launch."""
    return msgspec.json.encode([against_unsharded(context), own_failures(context)])


def against_unsharded(context: RankContext) -> list[tuple[str, list[float], dict[str, float], list[str]]]:
    """Per model: how far loss and gradients under plan `hf` are from the unsharded model's (relative, the
    largest), and names of both."""
    mesh = device_mesh(Mesh.parse("tp=2"), context.device.type)
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(0, 65, (2, 12), generator=generator)
    labels_BS = torch.randint(0, 65, (2, 12), generator=generator)
    answers = []
    for name in MODELS:
        whole, sharded = _model(name), _model(name)
        parallelize_hugging_face(sharded, mesh)
        losses = [loss_of(model)(model(ids_BS), labels_BS) for model in (whole, sharded)]
        for loss in losses:
            loss.backward()
        expected, found = _gradients(whole), _gradients(sharded)
        far = {key: ((found[key] - grad).norm() / grad.norm()).item() for key, grad in expected.items()}
        answers.append((name, [loss.item() for loss in losses], far, sorted(found)))
    return answers


def _model(name: str) -> Any:
    """In float64, with the same weights on every rank."""
    model: Any = find_model(name).build(dtype=torch.float64)
    model.to_empty(device="cpu")
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(0, 0.1, generator=generator)
    return model


def _gradients(model: Any) -> dict[str, Tensor]:
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def own_failures(context: RankContext) -> list[str]:
    """What a step under plan `hf` raises with real weights on real ranks, per type."""
    mesh = device_mesh(Mesh.parse("tp=2"), context.device.type)
    ids_BS = torch.arange(8).view(1, 8) + 3
    raised = []
    for name in REFUSED_BY_ITSELF:
        model: Any = find_model(name).build(dtype=torch.float32)
        model.to_empty(device="cpu")
        model.init_weights()
        parallelize_hugging_face(model, mesh)
        try:
            loss_of(model)(model(ids_BS), ids_BS).backward()
            raised.append("")
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}")
    return raised
