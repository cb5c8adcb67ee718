"""Model specs: the names by which commands know models, and their shapes.

Published shapes: Dubey et al. 2024, table 3, and the params.json files that Meta published with the weights. `llama3-debug` is ours:
small enough for a laptop, with a vocabulary that is large for its width, so that embedding and head matter as they do in real models.
"""

from dataclasses import dataclass, replace

import torch

from shardwise.core.errors import ModelError
from shardwise.core.plan import suggest
from shardwise.models.dtype import default_dtype
from shardwise.models.llama import Llama, LlamaConfig, RopeScaling
from shardwise.models.small import Sizes


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A named model: what a command needs to know before it builds one."""

    name: str
    config: LlamaConfig
    about: str

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def build(self, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32) -> Llama:
        """The model with unfilled weights; on "meta" it holds none."""
        with torch.device(device), default_dtype(dtype):
            return Llama(self.config)

    def small(self, tp: int) -> "ModelSpec":
        """The same family at two layers, and sizes that divide by tp."""
        config, sizes = self.config, Sizes(tp)
        kv_heads = sizes.heads if config.n_kv_heads == config.n_heads else min(config.n_kv_heads, sizes.kv_heads)
        small = replace(
            config,
            vocab_size=sizes.vocab,
            hidden=sizes.hidden,
            n_layers=min(2, config.n_layers),
            n_heads=sizes.heads,
            n_kv_heads=kv_heads,
            ffn_hidden=sizes.width,
        )
        return replace(self, config=small)

    def with_layers(self, n_layers: int) -> "ModelSpec":
        """The same widths at another depth."""
        return replace(self, config=replace(self.config, n_layers=n_layers))


_SPECS = (
    ModelSpec("llama3-debug", LlamaConfig(32_000, 384, 6, 12, 4, 1024), "small, for laptops: 6 layers, 32 k vocabulary"),
    ModelSpec("llama3-8b", LlamaConfig(128_256, 4096, 32, 32, 8, 14_336), "Llama 3 8B"),
    ModelSpec("llama3-70b", LlamaConfig(128_256, 8192, 80, 64, 8, 28_672), "Llama 3 70B"),
    ModelSpec(
        "llama3.1-405b",
        LlamaConfig(128_256, 16_384, 126, 128, 8, 53_248, rope_scaling=RopeScaling()),
        "Llama 3.1 405B",
    ),
)
SPECS = {spec.name: spec for spec in _SPECS}


def get_spec(name: str) -> ModelSpec:
    """The spec of a name. Raises ModelError with the nearest name and all that are known."""
    if name not in SPECS:
        raise ModelError(f'unknown model "{name}".{suggest(name, SPECS)} Known: {", ".join(SPECS)}.')
    return SPECS[name]
