"""Your own model, your own loop: shard it with Shardwise, put FSDP2 on top, save and resume with
torch.distributed.checkpoint.

    python examples/train_your_model.py                                         one process, nothing sharded
    torchrun --nproc-per-node 2 examples/train_your_model.py                    tensor parallel over 2 ranks
    torchrun --nproc-per-node 4 examples/train_your_model.py --fsdp 2   FSDP2 over 2, tp over 2

All three print the same losses: sharding changes where the work is done, not what is learned. A run that was
saved with --save DIR goes on with --resume DIR, on any number of ranks.

Shapes: B batch, S sequence, H hidden, N heads, D head dim, V vocabulary.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import shardwise

BYTES = 256
IGNORED = -100  # a label that doesn't count

# One rule per kind of module; the names are this model's own. Between blocks each rank keeps its part of the
# sequence, so norms and residuals cost 1/tp of the work and memory. `gather_input` makes the sequence whole
# again where all positions meet.
PLAN = """
name = "writer"
[rules]
"words" = "rowwise"
"places" = "replicated"
"blocks.*.attention_norm" = "sequence_parallel"
"blocks.*.attention" = "gather_input"
"blocks.*.attention.query" = "colwise"
"blocks.*.attention.key" = "colwise"
"blocks.*.attention.value" = "colwise"
"blocks.*.attention.mix" = { style = "rowwise", output = "shard(1)" }
"blocks.*.mlp_norm" = "sequence_parallel"
"blocks.*.mlp" = "gather_input"
"blocks.*.mlp.up" = "colwise"
"blocks.*.mlp.down" = { style = "rowwise", output = "shard(1)" }
"norm" = "sequence_parallel"
"head" = { style = "colwise", input = "shard(1)", output = "shard(-1)" }
"""


class Attention(nn.Module):
    """Causal attention. It computes as many heads as its projections give: all of them, or this rank's."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.head_dim = (
            hidden // heads
        )  # under this name parallelize() finds it, and refuses a tp that would cut a head in two
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(
            hidden, hidden, bias=False
        )  # a bias would add the same to all scores of a query, and softmax drops that
        self.value = nn.Linear(hidden, hidden)
        self.mix = nn.Linear(hidden, hidden)

    def forward(self, x_BSH: Tensor) -> Tensor:
        q_BNSD, k_BNSD, v_BNSD = (
            projection(x_BSH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        out_BNSD = F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD, is_causal=True)
        return self.mix(out_BNSD.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSH)))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.mlp_norm = nn.LayerNorm(hidden)
        self.mlp = Mlp(hidden)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH))
        return x_BSH + self.mlp(self.mlp_norm(x_BSH))


class Writer(nn.Module):
    """ids [B, S] -> logits [B, S, V]. Nothing in here knows of ranks."""

    def __init__(
        self, vocabulary: int = BYTES, hidden: int = 64, heads: int = 4, n_blocks: int = 2, longest: int = 256
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, hidden)
        self.places = nn.Embedding(longest, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        places_1S = torch.arange(ids_BS.shape[1], device=ids_BS.device).unsqueeze(0)
        x_BSH = self.words(ids_BS) + self.places(places_1S)
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return self.head(self.norm(x_BSH))


def shard(model: Writer, plan: shardwise.Plan, mesh: DeviceMesh) -> None:
    """Tensor parallelism first, FSDP2 over what is left of each parameter after it. The optimizer comes last:
    both replace parameters."""
    shardwise.parallelize(model, plan, mesh)
    if mesh["fsdp"].size() > 1:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["fsdp"])
        fully_shard(model, mesh=mesh["fsdp"])
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # FSDP2 averages, as if each rank had as many labels as any other. Each divides by the whole
                # batch's number below, so gradients are summed; gloo can't scale while it sums.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


def batch_of(text: bytes, step: int, batch: int, seq: int) -> tuple[Tensor, Tensor]:
    """Ids [B, S] of one step's global batch, and the label of each: the byte that follows it; none for the
    line that a sequence's end cuts off, so that sequences have unequally many. The same on every rank."""
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, seq + 1, seq)
    chosen = windows[torch.arange(step * batch, (step + 1) * batch) % len(windows)]
    ids_BS, labels_BS = chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous()
    is_before_line_end_BS = (labels_BS == ord("\n")).flip(1).cumsum(1).flip(1) > 0
    return ids_BS, labels_BS.masked_fill(~is_before_line_end_BS, IGNORED)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Takes model and optimizer from a checkpoint, whatever ranks wrote it; returns the steps it has behind
    it."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "steps": torch.tensor(0)}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["steps"])


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Each rank writes its own shards; the files know whole tensors by name, so no rank count is in them."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save(
        {"model": model_state, "optimizer": optimizer_state, "steps": torch.tensor(steps)}, checkpoint_id=path
    )


def train(options: argparse.Namespace, mesh: DeviceMesh | None, device: torch.device) -> None:
    torch.manual_seed(0)  # every rank builds the same whole model; parallelize() then keeps each rank's part
    model = Writer(longest=options.seq).to(device)
    if mesh is not None:
        shard(
            model,
            shardwise.Plan.from_toml(PLAN.replace('"words" = "rowwise"', f'"words" = "{options.embedding}"')),
            mesh,
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # The head leaves each rank its part of the vocabulary's logits; this loss knows how to read them, and
    # nothing gathers them.
    loss_function = shardwise.loss_of(model)

    if mesh is not None:
        # At the first step, and every 100, it compares what ranks must hold alike: weights and ids over tp.
        # Last: what it hooks onto must not be replaced.
        shardwise.watch(model)

    text = "\n".join(
        topics[name] for name in sorted(topics)
    ).encode()  # Python's own documentation, which needs no download
    n_parts, part = (mesh["fsdp"].size(), mesh["fsdp"].get_local_rank()) if mesh is not None else (1, 0)
    first = load(options.resume, model, optimizer) if options.resume else 0
    for step in range(first, first + options.steps):
        # Ranks of one tp group see the same ids, and groups beside each other on the fsdp axis see their own
        # part of the batch.
        whole_ids_BS, whole_labels_BS = batch_of(text, step, options.batch, options.seq)
        ids_BS, labels_BS = (each.chunk(n_parts)[part].to(device) for each in (whole_ids_BS, whole_labels_BS))
        # Parts have unequally many labels that count: each divides by those of the whole batch.
        count = int((whole_labels_BS != IGNORED).sum())
        loss = loss_function(model(ids_BS), labels_BS, valid=count)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

        loss = loss.detach()
        if mesh is not None and n_parts > 1:
            dist.all_reduce(loss, op=dist.ReduceOp.SUM, group=mesh.get_group("fsdp"))
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # on all ranks: it is a collective
        if mesh is None or mesh.get_rank() == 0:
            print(f"step {step:2}   loss {loss.item():.4f}   gradient norm {norm.item():.4f}", flush=True)
    if options.save:
        save(options.save, model, optimizer, first + options.steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Trains a small model of its own on Python's documentation, sharded by Shardwise."
    )
    parser.add_argument(
        "--fsdp",
        type=int,
        default=1,
        help="ranks over which FSDP2 shards; the rest are tensor parallel (default: 1)",
    )
    parser.add_argument(
        "--embedding",
        default="rowwise",
        choices=["rowwise", "colwise", "routed", "replicated"],
        help="how `words` is cut",
    )
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps (default: 6)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step over all ranks (default: 8)")
    parser.add_argument("--seq", type=int, default=64, help="bytes per sequence (default: 64)")
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="write a checkpoint of model and optimizer at the end"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on from a checkpoint, whatever ranks wrote it"
    )
    options = parser.parse_args()

    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if "WORLD_SIZE" not in os.environ:  # not under torchrun: the plain loop, without a process group
        if options.fsdp > 1:
            parser.error(
                "--fsdp needs ranks: torchrun --nproc-per-node N examples/train_your_model.py --fsdp M"
            )
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # dcp says so; it is meant
        train(options, None, device)
        return
    ranks = int(os.environ["WORLD_SIZE"])
    if options.fsdp < 1 or ranks % options.fsdp or options.batch % options.fsdp:
        parser.error(f"--fsdp {options.fsdp} must divide the {ranks} ranks and the batch of {options.batch}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (options.fsdp, ranks // options.fsdp), mesh_dim_names=("fsdp", "tp"))
    try:
        train(options, mesh, device)
    finally:
        dist.destroy_process_group()
    if device.type == "cpu":
        # DTensor keeps gloo's threads alive; one that lets go of a tensor while Python ends aborts the rank:
        # github.com/pytorch/pytorch/pull/179291
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
