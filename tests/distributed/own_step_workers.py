"""What the ranks of test_own_step.py run: every loop of loops.py, held where ranks run already. All in one
launch: each ends in an AssertionError's text, or in none."""

import json
from typing import Any

import shardwise
from shardwise.core.errors import InputError
from shardwise.launch import RankContext
from shardwise.testing import assert_trains_like_one_rank
from tests.distributed import loops, verify_models

Case = tuple[Any, Any, Any, str, dict[str, Any]]

TWO: dict[str, Case] = {
    "a native plan": (loops.plain, loops.all_dtensors, loops.adamw, "tp=2", {}),
    "a plan for a plain factory": (
        loops.plain, loops.copies, loops.adamw, "tp=2", {"plan": shardwise.Plan.from_toml(loops.PLAN)},
    ),
    "PyTorch's styles": (loops.without_clipping, loops.by_torch, loops.adamw, "tp=2", {}),
    "micro-batches": (loops.accumulating, loops.by_torch, loops.sgd, "tp=2", {}),
    "a schedule": (loops.scheduled, loops.by_torch, loops.with_a_schedule, "tp=2", {}),
    "dropout": (loops.without_clipping, loops.dropping, loops.adamw, "tp=2", {}),
    "FSDP2": (loops.by_all_labels, loops.summing_fsdp, loops.adamw, "fsdp=2", {}),
    "DDP": (loops.by_all_labels_under_ddp, loops.by_ddp, loops.adamw, "dp=2", {}),
    "an axis of another name": (
        loops.by_all_labels, loops.summing_fsdp, loops.adamw, "workers=2", {"data": "workers"},
    ),
    "by hand": (loops.summed_by_hand, loops.copies, loops.sgd, "dp=2", {}),
    "divided by local tokens, FSDP2": (loops.plain, loops.by_fsdp, loops.adamw, "fsdp=2", {}),
    "divided by local tokens, DDP": (loops.plain, loops.by_ddp, loops.adamw, "dp=2", {}),
    "averaged once too often": (loops.by_all_labels, loops.by_fsdp, loops.adamw, "fsdp=2", {}),
    "summed by nobody": (loops.summed_by_nobody, loops.copies, loops.sgd, "dp=2", {}),
    "a loss of all ranks": (loops.scaled_by_the_ranks, loops.by_torch, loops.sgd, "tp=2", {}),
    "clipped by the local norm": (
        loops.clipped_by_the_local_norm, loops.all_dtensors, loops.sgd, "tp=2", {},
    ),
    "other ids": (loops.other_ids_on_each_rank, loops.by_torch, loops.sgd, "tp=2", {}),
    "decay of another group": (
        loops.without_clipping, loops.by_torch, loops.decaying_what_is_sharded, "tp=2", {},
    ),
    "an optimizer made early": (
        loops.without_clipping, loops.with_an_early_optimizer, loops.the_early_one, "tp=2", {},
    ),
    "a schedule on rank 0": (loops.scheduled_on_rank_0, loops.by_torch, loops.with_a_schedule, "tp=2", {}),
    "nothing zeroed": (loops.zeroing_nothing, loops.by_torch, loops.sgd, "tp=2", {}),
    "dropout seeded apart": (
        loops.without_clipping, loops.dropping_seeded_apart, loops.adamw, "tp=2", {},
    ),
    "a weight nudged on rank 1": (loops.nudged_on_rank_1, loops.by_torch, loops.sgd, "tp=2", {}),
    "a third of the loss": (loops.returning_part_of_the_loss, loops.by_torch, loops.sgd, "tp=2", {}),
    "a slope that nobody sums": (
        loops.without_clipping, verify_models.by_hand_slope_not_summed, loops.sgd, "tp=2", {},
    ),
    "a forward of other halves": (
        loops.without_clipping, verify_models.fused_halves, loops.sgd, "tp=2", {},
    ),
    "logits that nobody gathers": (
        loops.without_clipping, verify_models.by_hand_half_logits, loops.sgd, "tp=2", {},
    ),
    "tokens counted by each rank": (loops.summed_by_hand, loops.counting, loops.sgd, "dp=2", {}),
    "axes that nobody knows": (
        loops.plain, loops.by_torch, loops.sgd, "rows=1,columns=2", {},
    ),
    "nothing that shards": (loops.plain, loops.Net, loops.sgd, "tp=2", {}),
}  # fmt: skip
FOUR: dict[str, Case] = {
    "FSDP2 over tp": (loops.by_all_labels, loops.fsdp_over_tp, loops.adamw, "fsdp=2,tp=2", {}),
    "tp alone of two axes": (loops.without_clipping, loops.by_torch, loops.sgd, "dp=2,tp=2", {}),
}


def run(context: RankContext, payload: bytes) -> bytes:
    """Entry of every rank."""
    told = {}
    for name, (step, model, optimizer, mesh, more) in (TWO if context.world_size == 2 else FOUR).items():
        context.note(name)
        try:
            assert_trains_like_one_rank(step, model, optimizer=optimizer, mesh=mesh, **more)
            told[name] = ""
        except (AssertionError, InputError) as error:
            told[name] = str(error)
    return json.dumps(told).encode()
