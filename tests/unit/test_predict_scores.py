"""What unfused attention holds of its scores, beside the published formula of a layer's activations: s b h
(34 + 5 a s / h) bytes (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1)."""

from dataclasses import replace
from functools import cache

import pytest

from shardwise.core.case import StepSettings, TextSource
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.prediction import AttentionKernel, Setup
from shardwise.core.program import MemoryChange, MemoryKind, Program
from shardwise.core.search import Candidate
from shardwise.models.source import find_model
from shardwise.predict.machines import load_machine
from shardwise.predict.memory import forecast, of_stage
from shardwise.predict.scores import with_scores
from shardwise.predict.stage_memory import stage_parts
from shardwise.search.needs import Needs
from shardwise.verbs.programs import trace_program
from shardwise.verbs.progress import silent

MACHINE = load_machine("h100-sxm-80gb")
LAYERS, HEADS, SEQ, BATCH = 6, 12, 512, 2
MODEL = "gpt-debug?vocab_size=64"
OF_A_LAYER = 5 * HEADS * SEQ * SEQ * BATCH
UNFUSED = Setup(attention=AttentionKernel.UNFUSED)
SELECTIVE = replace(UNFUSED, recompute_attention=True)


@cache
def program(recompute: str = "none") -> Program:
    settings = StepSettings(BATCH, SEQ, dtype="bfloat16", recompute=recompute)
    source, mesh = find_model(MODEL), Mesh.parse("tp=1")
    return trace_program(
        source, TheirPlan.UNSHARDED, mesh, settings, TextSource(random_ids=True), "cuda", silent
    )


def activations(setup: Setup, recompute: str = "none") -> float:
    return of_stage(with_scores(program(recompute), setup), setup, None)[MemoryKind.ACTIVATION]


def most_kept(made: Program) -> int:
    """Of activations alone, whatever else there is at that moment."""
    live = most = 0
    for block in made.blocks:
        for item in block:
            if isinstance(item, MemoryChange) and item.kind is MemoryKind.ACTIVATION:
                live += item.n_bytes
                most = max(most, live)
    return most


def test_a_layer_keeps_5_a_s_s_b_bytes_more_than_with_a_fused_kernel() -> None:
    more = most_kept(with_scores(program(), UNFUSED)) - most_kept(program())
    assert more == LAYERS * OF_A_LAYER
    # at the peak of everything some of the last layer's own may be gone
    assert activations(UNFUSED) - activations(Setup()) == pytest.approx(more, rel=0.05)


def test_a_selective_recompute_keeps_the_scores_of_one_layer_at_most() -> None:
    kept = activations(SELECTIVE) - activations(Setup())
    assert 0 <= kept <= OF_A_LAYER
    of_one = (
        forecast(program(), MACHINE, SELECTIVE).active_bytes
        - forecast(program(), MACHINE, Setup()).active_bytes
    )
    assert 0 < of_one < 2 * OF_A_LAYER


def test_layers_that_run_again_as_a_whole_keep_none() -> None:
    more = activations(UNFUSED, "full") - activations(Setup(), "full")
    assert 0 <= more <= OF_A_LAYER


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_all_that_comes_goes(recompute: str) -> None:
    for setup in (UNFUSED, SELECTIVE)[: 2 if recompute == "none" else 1]:
        made = with_scores(program(recompute), setup)
        left: dict[tuple[str, str], int] = {}
        for block in made.blocks:
            for item in block:
                if "scores" in getattr(item, "maker", ""):
                    key = str(item.kind), item.maker  # type: ignore[union-attr]
                    left[key] = left.get(key, 0) + item.n_bytes  # type: ignore[union-attr]
        assert len(left) > 3
        assert set(left.values()) == {0}


def test_a_stage_holds_those_of_its_layers_for_each_micro_batch_in_flight() -> None:
    fused = Setup(Mesh.parse("pp=2"), 4)
    unfused = replace(fused, attention=AttentionKernel.UNFUSED)
    first, last = stage_parts(program(), fused)
    held = [
        of_stage(with_scores(program(), unfused), unfused, part)[MemoryKind.ACTIVATION]
        - of_stage(program(), fused, part)[MemoryKind.ACTIVATION]
        for part in (first, last)
    ]
    assert held == pytest.approx([2 * LAYERS / 2 * OF_A_LAYER, LAYERS / 2 * OF_A_LAYER], rel=0.1)


def test_what_the_allocator_reserves_has_room_for_them() -> None:
    fused, unfused = (forecast(program(), MACHINE, setup) for setup in (Setup(), UNFUSED))
    assert unfused.reserved_bytes - fused.reserved_bytes > 0.8 * LAYERS * OF_A_LAYER
    assert unfused.device_bytes - fused.device_bytes > 0.8 * LAYERS * OF_A_LAYER


def test_what_a_search_says_is_needed_at_least_counts_them_and_is_never_more_than_is_forecast() -> None:
    fused, unfused = (Needs(program(), MACHINE, setup) for setup in (Setup(), UNFUSED))
    for axes, micro_batches in (((("tp", 1),), 1), ((("pp", 2), ("tp", 1)), 4)):
        candidate = Candidate(axes, (), BATCH, micro_batches)
        least = unfused.device_bytes(candidate)
        assert least - fused.device_bytes(candidate) == pytest.approx(LAYERS * OF_A_LAYER, rel=0.1)
        setup = replace(UNFUSED, mesh=candidate.mesh, micro_batches=micro_batches)
        assert least <= forecast(program(), MACHINE, setup, replays=False).device_bytes
    assert unfused.freed_bytes("full") - fused.freed_bytes("full") == OF_A_LAYER
