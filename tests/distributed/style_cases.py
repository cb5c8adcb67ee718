"""The cases of test_styles.py as data: a model, a plan, ids and what is expected. The same list in the test
and on the ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.core.placement import Replicate, Shard
from shardwise.core.plan import Family, Ownership, Plan, ReduceScatter, Rule, Style, StyleName
from shardwise.models.gpt import GPT, GPTConfig
from shardwise.models.llama import Llama, LlamaConfig
from shardwise.parallel.builtin import builtin_plan

BATCH, SEQ = 2, 24
WITH_SEQUENCE_PARALLEL = ("rowwise", "colwise", "routed", "routed-interleaved", "replicated")
WITHOUT = ("rowwise", "colwise", "replicated")
# per number of ranks, the meshes on which training steps are compared
MESHES = {
    1: ("tp=1",),
    2: ("tp=2", "dp=2", "fsdp=2", "ep=2"),
    3: ("tp=3",),
    4: ("tp=4", "dp=2,tp=2", "fsdp=2,tp=2", "ep=2,tp=2", "dp=2,fsdp=2", "dp=2,ep=2", "fsdp=2,ep=2"),
}
# per number of ranks, how the names of the cases begin that show every behaviour: tables that the ranks
# divide, don't divide, or can't all have a row of; the rest of the matrix runs in `make test-all` only, four
# ranks too: steps on two axes are compared in test_user_loop.py
TELLING = {
    1: ("llama V=257 untied padding=None",),
    2: (
        # with sequence parallelism: as a backward that runs twice
        *(f"llama V=257 untied padding=None: {name} (no" for name in WITHOUT),
        "llama V=5 tied padding=3",
        *(f"llama {ids} ids: {name}" for ids in ("hot", "few") for name in ("rowwise", "routed")),
        "llama reduce_scatter=backend: rowwise",  # pairwise is what gloo has
        "llama backward twice untied",
        "llama V=32000 tied: routed-interleaved",
        "llama V=257 4 KV heads padding=None: rowwise",
        "llama V=257 12 KV heads padding=3: rowwise",
        "mlp:",
        "mlp backward twice",
        *(f"mlp tied: {plan}" for plan in ("colwise takes", "colwise gives", "replicate", "head gives")),
        "gpt tied: rowwise",
        "gpt untied: rowwise@dtensor",
    ),
    3: (
        "llama V=257 untied padding=3: rowwise",
        "llama V=257 untied padding=3: routed",
        "llama V=4 tied padding=None",
        "llama 4 KV heads",
        "mlp:",
    ),
    4: (),
}


class Ids(StrEnum):
    """RANDOM: over the whole vocabulary. HOT: one id only, so all fall on one rank. FEW: ids of which the
    last rank owns none."""

    RANDOM = "random"
    HOT = "hot"
    FEW = "few"


@dataclass(frozen=True, slots=True)
class MlpConfig:
    """A user's own model: biases, LayerNorms, widths that don't divide."""

    vocab_size: int = 29
    hidden: int = 24
    inner: int = 40
    n_blocks: int = 2
    tied: bool = False


Config = LlamaConfig | GPTConfig | MlpConfig


def is_telling(part: str, world_size: int) -> bool:
    """Whether `make test` runs a part of what the ranks do on this many of them. Where a dim doesn't divide,
    three ranks tell more than four."""
    return world_size in {
        "laws": (2, 3),
        "clip": (1, 2),
        "recorded": (2,),
        "state_dict": (2, 3),
        "ranks": (2, 3),
        "steps fsdp=2": (),  # and ep=2: beside another axis test_meshes.py has them
        "steps ep=2": (),
    }.get(part, (1, 2, 3))


@dataclass(frozen=True, slots=True)
class Case:
    """`refused`: the error that parallelize() must raise. `backwards`: how often gradients are added up.
    is_telling: whether `make test` runs it too."""

    name: str
    config: Config
    plan: Plan
    ids: Ids = Ids.RANDOM
    backwards: int = 1
    refused: str | None = None
    is_telling: bool = True

    def model(self) -> nn.Module:
        match self.config:
            case LlamaConfig():
                return Llama(self.config)
            case GPTConfig():
                return GPT(self.config)
            case MlpConfig():
                return Mlp(self.config)


class Ffn(nn.Module):
    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden, config.inner)
        self.down = nn.Linear(config.inner, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class MlpBlock(nn.Module):
    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden)
        self.ffn = Ffn(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """ids [B, S] -> logits [B, S, V], token by token."""

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.blocks = nn.ModuleList(MlpBlock(config) for _ in range(config.n_blocks))
        self.norm = nn.LayerNorm(config.hidden, bias=False)
        self.head = nn.Linear(config.hidden, config.vocab_size)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids_BS: Tensor) -> Tensor:
        x = self.embedding(ids_BS)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def llama(
    vocab_size: int = 257,
    *,
    n_kv_heads: int = 12,
    n_layers: int = 2,
    tied: bool = False,
    padding_idx: int | None = None,
) -> LlamaConfig:
    return LlamaConfig(vocab_size, 96, n_layers, 12, n_kv_heads, 160, tied=tied, padding_idx=padding_idx)


def gpt(vocab_size: int = 257, *, tied: bool = False) -> GPTConfig:
    """More positions than a sequence has tokens."""
    return GPTConfig(vocab_size, 96, 2, 12, 160, SEQ + 7, tied=tied)


def llama_plans() -> Iterator[Plan]:
    return plans_of(Family.LLAMA)


def plans_of(family: Family) -> Iterator[Plan]:
    """All built-in plans of the native engine."""
    for name in WITH_SEQUENCE_PARALLEL:
        yield builtin_plan(name, family=family)
    for name in WITHOUT:
        yield builtin_plan(name, sequence_parallel=False, family=family)


ROWWISE, COLWISE = Style(StyleName.ROWWISE), Style(StyleName.COLWISE)
REPLICATE, SEQUENCE_PARALLEL = Style(StyleName.REPLICATE), Style(StyleName.SEQUENCE_PARALLEL)


def _mlp_plan(
    name: str, embedding: Style, norm: Style, up: Style, down: Style, head: Style, ffn: Style | None = None
) -> Plan:
    styles = {
        "embedding": embedding,
        "blocks.*.norm": norm,
        "blocks.*.ffn": ffn,
        "**.up": up,
        "**.down": down,
        "norm": norm,
        "head": head,
    }
    return Plan(name, tuple(Rule(pattern, style) for pattern, style in styles.items() if style is not None))


def mlp_plans() -> dict[str, Plan]:
    """Every input and output that a linear style takes, at least once."""
    cut_1 = replace(COLWISE, input=Shard(1))
    to_1 = replace(ROWWISE, output=Shard(1))
    whole = replace(ROWWISE, output=Replicate())
    gather = Style(StyleName.GATHER_INPUT, input=Shard(1))
    head_1 = replace(COLWISE, input=Shard(1), output=Shard(-1))
    plans = (
        _mlp_plan(
            "colwise takes shard(1), rowwise gives it", ROWWISE, SEQUENCE_PARALLEL, cut_1, to_1, head_1
        ),
        _mlp_plan("gather_input from shard(1)", COLWISE, SEQUENCE_PARALLEL, COLWISE, to_1, head_1, gather),
        _mlp_plan(
            "colwise says replicate below a gather_input",
            ROWWISE,
            SEQUENCE_PARALLEL,
            replace(COLWISE, input=Replicate()),
            to_1,
            head_1,
            gather,
        ),
        _mlp_plan(
            "gather_input from replicate",
            whole,
            REPLICATE,
            COLWISE,
            whole,
            COLWISE,
            Style(StyleName.GATHER_INPUT, input=Replicate()),
        ),
        _mlp_plan("colwise and rowwise by default", whole, REPLICATE, COLWISE, ROWWISE, COLWISE),
        _mlp_plan(
            "colwise gives replicate, rowwise takes it",
            whole,
            REPLICATE,
            replace(COLWISE, output=Replicate()),
            replace(ROWWISE, input=Replicate()),
            replace(COLWISE, output=Replicate()),
        ),
        _mlp_plan(
            "rowwise takes what replicate gives",
            whole,
            REPLICATE,
            REPLICATE,
            replace(ROWWISE, input=Replicate()),
            replace(COLWISE, output=Replicate()),
        ),
        _mlp_plan(
            "replicate", replace(COLWISE, output=Replicate()), REPLICATE, REPLICATE, REPLICATE, REPLICATE
        ),
        _mlp_plan(
            "colwise alone, on the own tokens",
            ROWWISE,
            SEQUENCE_PARALLEL,
            replace(cut_1, output=Shard(1)),
            replace(cut_1, output=Shard(1)),
            head_1,
        ),
        _mlp_plan(
            "head gives replicate",
            Style(StyleName.REPLICATED),
            SEQUENCE_PARALLEL,
            cut_1,
            to_1,
            replace(COLWISE, input=Shard(1), output=Replicate()),
        ),
        _mlp_plan(
            "routed interleaved",
            Style(StyleName.ROUTED, ownership=Ownership.INTERLEAVED),
            SEQUENCE_PARALLEL,
            cut_1,
            to_1,
            head_1,
        ),
    )
    return {plan.name: plan for plan in plans}


def cases(world_size: int) -> tuple[Case, ...]:
    """All cases for a number of ranks; each has a name of its own."""
    found = [
        *_llama_cases(world_size),
        *_kv_cases(world_size),
        *_ids_cases(),
        *_reduce_scatter_cases(),
        *_accumulation_cases(),
        *_mlp_cases(),
        *_gpt_cases(),
    ]
    if world_size in (2, 4):
        found += _large_cases()
    if world_size == 2:
        found += _dtensor_cases()
    assert len({case.name for case in found}) == len(found)
    return tuple(replace(case, is_telling=case.name.startswith(TELLING[world_size])) for case in found)


def _llama_cases(world_size: int) -> Iterator[Case]:
    few = 4 if world_size == 3 else 5  # on three ranks and on four, the last has none of so few rows
    for vocab_size in (few, 257):
        for tied in (False, True):
            for padding_idx in (None, 3):
                about = f"llama V={vocab_size} {'tied' if tied else 'untied'} padding={padding_idx}"
                for plan in llama_plans():
                    yield Case(
                        f"{about}: {plan.name}", llama(vocab_size, tied=tied, padding_idx=padding_idx), plan
                    )


def _kv_cases(world_size: int) -> Iterator[Case]:
    for plan in llama_plans():
        refused = (
            f'plan "{plan.name}": rule "layers.*.attention.wk" (colwise) splits 4 KV heads of '
            f"layers.0.attention over tp=3. Use tp in {{1, 2, 4}}."
            if world_size == 3
            else None
        )
        yield Case(f"llama 4 KV heads: {plan.name}", llama(n_kv_heads=4), plan, refused=refused)


def _ids_cases() -> Iterator[Case]:
    for ids in (Ids.HOT, Ids.FEW):
        for plan in (
            *map(builtin_plan, WITH_SEQUENCE_PARALLEL),
            builtin_plan("rowwise", sequence_parallel=False),
        ):
            yield Case(f"llama {ids} ids: {plan.name}", llama(), plan, ids=ids)


def _reduce_scatter_cases() -> Iterator[Case]:
    for mode in (ReduceScatter.BACKEND, ReduceScatter.PAIRWISE):
        for name in ("rowwise", "colwise", "replicated"):
            yield Case(
                f"llama reduce_scatter={mode}: {name}",
                llama(),
                replace(builtin_plan(name), reduce_scatter=mode),
            )


def _accumulation_cases() -> Iterator[Case]:
    for tied, names in ((False, WITH_SEQUENCE_PARALLEL), (True, ("colwise", "replicated"))):
        for plan in map(builtin_plan, names):
            yield Case(
                f"llama backward twice {'tied' if tied else 'untied'}: {plan.name}",
                llama(tied=tied),
                plan,
                backwards=2,
            )


def _mlp_cases() -> Iterator[Case]:
    for name, plan in mlp_plans().items():
        yield Case(f"mlp: {name}", MlpConfig(), plan)
        if name != "routed interleaved":
            tieable = (
                next(rule for rule in plan.rules if rule.pattern == "head").style.name is StyleName.COLWISE
            )
            refused = (
                f'plan "{name}": rule "head" (replicate): head is tied to the embedding. Allowed for a '
                "tied head: colwise."
            )
            yield Case(f"mlp tied: {name}", MlpConfig(tied=True), plan, refused=None if tieable else refused)
    yield Case(
        "mlp backward twice",
        MlpConfig(),
        mlp_plans()["colwise takes shard(1), rowwise gives it"],
        backwards=2,
    )


def _gpt_cases() -> Iterator[Case]:
    for tied in (False, True):
        for plan in plans_of(Family.GPT):
            yield Case(f"gpt {'tied' if tied else 'untied'}: {plan.name}", gpt(tied=tied), plan)
    yield Case("gpt V=5 tied: routed", gpt(5, tied=True), builtin_plan("routed", family=Family.GPT))
    yield Case(
        "gpt backward twice tied: rowwise",
        gpt(tied=True),
        builtin_plan("rowwise", family=Family.GPT),
        backwards=2,
    )


def _large_cases() -> Iterator[Case]:
    for tied, name in (
        (False, "rowwise"),
        (False, "colwise"),
        (False, "routed"),
        (True, "routed-interleaved"),
        (True, "colwise"),
    ):
        config = llama(32_000, n_layers=1, tied=tied)
        yield Case(f"llama V=32000 {'tied' if tied else 'untied'}: {name}", config, builtin_plan(name))


def _dtensor_cases() -> Iterator[Case]:
    for name in ("rowwise@dtensor", "colwise@dtensor"):
        for sequence_parallel in (True, False):
            plan = builtin_plan(name, sequence_parallel=sequence_parallel)
            for config in (llama(5), llama(padding_idx=3), llama(n_kv_heads=4)):
                about = f"V={config.vocab_size} {config.n_kv_heads} KV heads padding={config.padding_idx}"
                yield Case(f"llama {about}: {plan.name}", config, plan)
            of_gpt = builtin_plan(name, sequence_parallel=sequence_parallel, family=Family.GPT)
            yield Case(f"gpt untied: {plan.name}", gpt(), of_gpt)
            refused = (
                f'plan "{plan.name}": tok_embeddings.weight and output.weight are tied, and PyTorch\'s own '
                "styles would untie them. "
                'Use engine = "native".'
            )
            yield Case(f"gpt tied: {plan.name}", gpt(tied=True), of_gpt, refused=refused)
