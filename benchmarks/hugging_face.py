"""Hugging Face transformers' own tensor parallelism as a side: the same shape, weights, batch, clipping and
optimizer; its own model and loss.

Its plan ("auto") cuts the projections, the embedding (by vocabulary) and the head, whose logits it gathers;
it has no sequence parallelism. The model is sharded by the two calls with which
`from_pretrained(distributed_config=...)` does it (5.23); from_pretrained itself also asks for accelerate, and
would only add the loading. transformers builds the device mesh itself, over the process group that is joined
already. Norm weights stay plain tensors there, and a fused optimizer takes no mixture, so they are a group of
their own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.models.init import initial_parameter
from shardwise.models.llama import Llama, LlamaConfig
from shardwise.step.clipping import clip_gradients
from shardwise.step.train import StepResult

# our modules' names -> transformers'; what isn't named here is called the same
_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}


class TransformersStep:
    """One optimizer step, called as a TrainStep is."""

    def __init__(
        self, config: LlamaConfig, tp: int, *, seed: int, learning_rate: float, max_norm: float
    ) -> None:
        self.model = _sharded_model(config, tp, seed)
        self._parameters: list[nn.Parameter] = list(self.model.parameters())
        sharded = [parameter for parameter in self._parameters if isinstance(parameter, DTensor)]
        plain = [parameter for parameter in self._parameters if not isinstance(parameter, DTensor)]
        groups: list[dict[str, Any]] = [{"params": sharded}, {"params": plain}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
        self._max_norm = max_norm

    def __call__(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> StepResult:
        ((ids_BS, labels_BS),) = micro_batches
        self.optimizer.zero_grad(set_to_none=True)
        # `labels` asks for the loss; `shift_labels` are those that it takes
        loss = self.model(ids_BS, labels=labels_BS, shift_labels=labels_BS, use_cache=False).loss
        loss.backward()
        norm = clip_gradients(self._parameters, self._max_norm)
        self.optimizer.step()
        return StepResult(loss.detach(), norm)


def _sharded_model(config: LlamaConfig, tp: int, seed: int) -> nn.Module:
    """The model of `config` with the initial weights of `seed`, sharded by transformers."""
    from transformers import LlamaForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(config).named_parameters()}
    model = LlamaForCausalLM(_config(config))
    cpu = torch.device("cpu")
    model.load_state_dict(
        {
            _name(name): initial_parameter(name, shape, seed=seed, dtype=torch.float32, device=cpu)
            for name, shape in shapes.items()
        }
    )
    distribution, _, mesh_manager = LlamaForCausalLM.prepare_distribute_model(
        DistributedConfig(tp_size=tp, tp_plan="auto")
    )
    sharded: nn.Module = LlamaForCausalLM.maybe_distribute_model(model, distribution, mesh_manager)
    return sharded.train()


def _config(config: LlamaConfig) -> Any:
    from transformers import LlamaConfig as TransformersConfig

    given: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied,
        "attn_implementation": "sdpa",
    }
    return TransformersConfig(**given)


def _name(name: str) -> str:
    return ".".join(_NAMES.get(part, part) for part in name.split("."))
