"""Model specs: the names by which commands know models, and their shapes.

Published shapes: Llama 3: Dubey et al. 2024, table 3, and the params.json files that Meta published with the
weights. GPT-3: Brown et al. 2020, table 2.1, but that 1.3b has 16 heads of 128, since the table's 24 of 128
don't make its hidden 2048; the vocabulary is GPT-2's 50,257 padded to 51,200, as Megatron has it. Megatron
22B: Korthikanti et al. 2022, table 3. Mixtral 8x7B: Jiang et al. 2024, table 1. Qwen3-30B-A3B: Yang et al.
2025, table 2, and the config.json that Qwen published with the weights (an expert's width, theta, no tied
head). The debug models are ours: small enough for a laptop, with a vocabulary
that is large for their width, so that embedding and head matter as they do in real models.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch

from shardwise.core.errors import ModelError
from shardwise.core.plan import Family, suggest
from shardwise.core.shown import shown
from shardwise.models.changes import parse_changes
from shardwise.models.dtype import default_dtype
from shardwise.models.gpt import GPT, GPTConfig
from shardwise.models.llama import Llama, LlamaConfig, RopeScaling
from shardwise.models.moe import MoE, MoEConfig
from shardwise.models.small import Sizes

# beyond these, building takes long or overflows; the largest known models have a tenth of them
MOST_LAYERS_OR_HEADS = 4096
LARGEST_SIZE = 10_000_000
_FOLLOW_HIDDEN = ("n_heads", "n_kv_heads", "ffn_hidden")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A named model: what a command needs to know before it builds one."""

    name: str
    config: LlamaConfig | GPTConfig
    about: str

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def family(self) -> Family:
        match self.config:
            case GPTConfig():
                return Family.GPT
            case MoEConfig():
                return Family.MOE
            case LlamaConfig():
                return Family.LLAMA

    @property
    def max_seq(self) -> int | None:
        return self.config.max_seq if isinstance(self.config, GPTConfig) else None

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    @property
    def default_plan(self) -> str:
        return "rowwise"

    @property
    def initialises(self) -> bool:
        return False

    def build(self, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32) -> Llama | GPT:
        """The model with unfilled weights; on "meta" it holds none."""
        with torch.device(device), default_dtype(dtype):
            match self.config:
                case GPTConfig() as config:
                    return GPT(config)
                case MoEConfig() as config:
                    return MoE(config)
                case LlamaConfig() as config:
                    return Llama(config)

    def small(self, tp: int) -> "ModelSpec":
        """The same family at two layers, and sizes that divide by tp."""
        sizes = Sizes(tp)
        config: LlamaConfig | GPTConfig
        match self.config:
            case LlamaConfig(n_heads=heads, n_kv_heads=kv_heads):
                kv_heads = sizes.heads if kv_heads == heads else min(kv_heads, sizes.kv_heads)
                config = replace(self.config, hidden=sizes.hidden, n_heads=sizes.heads, n_kv_heads=kv_heads)
            case GPTConfig():
                config = replace(self.config, hidden=sizes.hidden, n_heads=sizes.heads)
        width = sizes.width
        if isinstance(config, MoEConfig):
            experts, width = min(config.n_experts, sizes.experts), sizes.expert_width
            head_width = config.head_width and sizes.of("head_dim")
            config = replace(
                config, n_experts=experts, top_k=min(config.top_k, experts), head_width=head_width
            )
        n_layers = min(2, config.n_layers)
        return replace(
            self, config=replace(config, vocab_size=sizes.vocab, n_layers=n_layers, ffn_hidden=width)
        )

    def with_layers(self, n_layers: int) -> "ModelSpec":
        """The same widths at another depth."""
        return replace(self, config=replace(self.config, n_layers=n_layers))

    @property
    def numbers(self) -> dict[str, int | float | bool]:
        """What of the configuration can be replaced."""
        return {key: value for key, value in asdict(self.config).items() if isinstance(value, int | float)}

    def changed(self, changes: Mapping[str, int | float | bool], name: str) -> "ModelSpec":
        """Under a new name, with some numbers of the configuration replaced. What follows `hidden` and isn't
        named keeps its ratio to it: heads (so their width stays) and ffn_hidden. Raises ModelError."""
        config, known = self.config, self.numbers
        for key, value in changes.items():
            if key not in known:
                raise ModelError(
                    f'model "{name}": {self.name} has no "{shown(key)}".{suggest(key[:80], known)} Known: '
                    f"{', '.join(known)}."
                )
            _check_number(key, value, type(known[key]), name)
        values = dict(changes)
        if "hidden" in values:
            for key in (key for key in _FOLLOW_HIDDEN if key in known and key not in values):
                followed, rest = divmod(known[key] * values["hidden"], config.hidden)
                if rest or not followed:
                    raise ModelError(
                        f'model "{name}": {key} is {known[key]} where hidden is {config.hidden}, and '
                        "can't keep that ratio where hidden is "
                        f"{values['hidden']}. Name it too: {key}=..."
                    )
                values[key] = followed
        try:
            # values are checked above
            return replace(self, name=name, config=replace(config, **values))  # type: ignore[arg-type]
        except ModelError as error:
            raise ModelError(f'model "{name}": {error}') from None


def _check_number(key: str, value: object, kind: type, name: str) -> None:
    largest = MOST_LAYERS_OR_HEADS if key.startswith("n_") else LARGEST_SIZE
    if kind is bool:
        is_right, allowed = isinstance(value, bool), "true or false"
    elif kind is int:
        is_right, allowed = (
            type(value) is int and 1 <= value <= largest,
            f"a whole number from 1 to {largest:,}",
        )
    else:
        is_right = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
        allowed = "a number above 0"
    if not is_right:
        raise ModelError(f'model "{name}": {key} is {str(value).lower()}. Use {allowed}.')


_SPECS = (
    ModelSpec(
        "llama3-debug",
        LlamaConfig(32_000, 384, 6, 12, 4, 1024),
        "small, for laptops: 6 layers, 32 k vocabulary",
    ),
    ModelSpec("llama3-8b", LlamaConfig(128_256, 4096, 32, 32, 8, 14_336), "Llama 3 8B"),
    ModelSpec("llama3-70b", LlamaConfig(128_256, 8192, 80, 64, 8, 28_672), "Llama 3 70B"),
    ModelSpec(
        "llama3.1-405b",
        LlamaConfig(128_256, 16_384, 126, 128, 8, 53_248, rope_scaling=RopeScaling()),
        "Llama 3.1 405B",
    ),
    ModelSpec(
        "gpt-debug",
        GPTConfig(32_000, 384, 6, 12, 1536, 1024),
        "small, for laptops: 6 layers, 32 k vocabulary, tied",
    ),
    ModelSpec("gpt3-1.3b", GPTConfig(51_200, 2048, 24, 16, 8192, 2048), "GPT-3 XL"),
    ModelSpec("gpt3-6.7b", GPTConfig(51_200, 4096, 32, 32, 16_384, 2048), "GPT-3 6.7B"),
    ModelSpec("gpt3-175b", GPTConfig(51_200, 12_288, 96, 96, 49_152, 2048), "GPT-3 175B"),
    ModelSpec(
        "moe-debug",
        MoEConfig(32_000, 384, 6, 12, 4, 512, n_experts=8, top_k=2, qk_norm=True),
        "small, for laptops: 6 layers, 8 experts, 2 for each token",
    ),
    ModelSpec(
        "mixtral-8x7b",
        MoEConfig(32_000, 4096, 32, 32, 8, 14_336, rope_theta=1e6, n_experts=8, top_k=2),
        "Mixtral 8x7B",
    ),
    ModelSpec(
        "qwen3-30b-a3b",
        MoEConfig(
            151_936, 2048, 48, 32, 4, 768, 1e-6, 1e6, n_experts=128, top_k=8, head_width=128, qk_norm=True
        ),
        "Qwen3-30B-A3B",
    ),
    ModelSpec("megatron-22b", GPTConfig(51_200, 6144, 48, 64, 24_576, 2048), "Megatron 22B"),
)
SPECS = {spec.name: spec for spec in _SPECS}


def get_spec(text: str) -> ModelSpec:
    """The spec of NAME or NAME?KEY=VALUE,... Raises ModelError with the nearest name and all that are
    known."""
    name, has_query, query = text.partition("?")
    if name not in SPECS:
        raise ModelError(
            f'unknown model "{shown(name)}".{suggest(name[:80], SPECS)} Known: {", ".join(SPECS)}.'
        )
    return SPECS[name].changed(parse_changes(query, shown(text)), shown(text)) if has_query else SPECS[name]
