"""predict --look-up: the table of token ids alone, under each style."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from shardwise import api
from shardwise.core.errors import InputError, OptionError
from shardwise.core.look_up import LookUpPoint, LookUps
from shardwise.core.prediction import Term
from shardwise.report.common.room import room_of
from shardwise.report.predict.look_up_tables import assumed, verdict

V, H, S = 512, 64, 32
COUNT = 4  # bytes of AdamW's count of steps
OPTIONS = ("optimizer_shards", "precision", "spread_s")
PLANS = ("rowwise", "colwise", "routed", "replicated", "rowwise@dtensor")


def found(**keys: object) -> LookUps:
    degrees, batches = keys.pop("degrees", (4,)), keys.pop("batches", ())
    options = {name: keys.pop(name) for name in OPTIONS if name in keys}
    asked = {
        "model": f"llama3-debug?vocab_size={V},hidden={H},n_heads=2,n_kv_heads=2,ffn_hidden=64",
        "mesh": "tp=1",
        "batch": 2,
        "seq": S,
        "random_ids": True,
        "machine": "h100-sxm-80gb",
        "plans": PLANS,
        **keys,
    }
    case = api.case(**asked)
    return api.look_up(case, degrees=degrees, batches=batches, **options).answer  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def four() -> dict[str, LookUpPoint]:
    return {point.plan: point for point in found().points}


def test_colwise_sends_a_tp_th_of_what_rowwise_sends(four: dict[str, LookUpPoint]) -> None:
    whole = 2 * S * H * 4
    assert four["colwise"].sent_bytes / 2 == pytest.approx(whole / 4 * 3 / 4, rel=0.1)  # and a few ids
    assert four["rowwise"].sent_bytes / 2 == pytest.approx(whole * 3 / 4, rel=0.1)


def test_every_cut_table_takes_as_much_room_and_pytorch_s_rowwise_has_the_whole_gradient(
    four: dict[str, LookUpPoint],
) -> None:
    part = V * H * 4 // 4
    for plan in ("rowwise", "colwise", "routed"):
        assert four[plan].held_bytes == 4 * part + COUNT
    assert four["rowwise@dtensor"].held_bytes == 3 * part + 4 * part + COUNT
    assert four["replicated"].held_bytes == 16 * part + COUNT


def test_a_replicated_table_sends_its_gradient_and_all_of_it_is_clipped_and_stepped(
    four: dict[str, LookUpPoint],
) -> None:
    # the norm's weight is whole too, and its gradient goes along
    assert four["replicated"].sent_bytes == pytest.approx(2 * 3 / 4 * (V * H + H) * 4, rel=1e-3)
    whole, part = (dict(four[plan].terms)[Term.OPTIMIZER] for plan in ("replicated", "colwise"))
    assert whole > part


def test_a_table_s_share_of_the_optimizer_isn_t_the_head_s_too(four: dict[str, LookUpPoint]) -> None:
    """The head's part is of the same shape under rowwise, and of another under colwise."""
    rowwise, colwise = (dict(four[plan].terms)[Term.OPTIMIZER] for plan in ("rowwise", "colwise"))
    assert rowwise == pytest.approx(colwise, rel=1e-6)


def test_a_table_that_is_cut_by_hidden_is_cut_anew_for_a_head_that_is_the_same_matrix() -> None:
    """Under rowwise the head has its part of the vocabulary anyway; else its weights travel."""
    sent = {}
    for tied in ("true", "false"):
        model = f"llama3-debug?vocab_size={V},hidden={H},n_heads=2,n_kv_heads=2,ffn_hidden=64,tied={tied}"
        run = found(model=model, plans=("rowwise", "colwise"))
        sent[tied] = {point.plan: point.sent_bytes for point in run.points}
    more = {plan: sent["true"][plan] - sent["false"][plan] for plan in ("rowwise", "colwise")}
    assert more["colwise"] > more["rowwise"] > 0


def test_what_a_plan_cannot_be_is_left_out_with_its_reason() -> None:
    odd = f"llama3-debug?vocab_size={V},hidden=66,n_heads=1,n_kv_heads=1,ffn_hidden=64"
    run = found(model=odd, plans=("rowwise", "colwise"))
    assert [point.plan for point in run.points] == ["rowwise"]
    assert [(each.plan, "66" in each.reason) for each in run.refused] == [("colwise", True)]
    assert room_of(run).report(run).blocks


def test_what_a_rank_holds_is_in_the_setup_s_shards_and_precision(four: dict[str, LookUpPoint]) -> None:
    """Each of optimizer_shards has so much less of the state; master weights make 2 bytes of a parameter 18
    (predict/memory.py)."""
    part = V * H * 4 // 4
    (shared,) = found(plans=("colwise",), optimizer_shards=4).points
    assert four["colwise"].held_bytes - shared.held_bytes == pytest.approx(2 * part * 3 / 4, abs=COUNT)
    assert shared.held_bytes <= shared.peak_bytes
    (master,) = found(plans=("colwise",), dtype="bfloat16", precision="master").points
    assert master.held_bytes == 9 * part // 2
    assert master.held_bytes <= master.peak_bytes


def test_the_assumptions_say_how_far_apart_ranks_come_where_waiting_is_counted() -> None:
    """On the terminal and on the page."""
    for spread, said in ((0.1, "by a standard deviation of 100 ms"), (0.0, "collectives at once.")):
        run = found(plans=("rowwise",), spread_s=spread)
        assert any(said in line for line in assumed(run))
        assert said in room_of(run).page(run)


def test_what_is_named_twice_is_looked_up_once() -> None:
    run = found(plans=("rowwise", "rowwise"), degrees=(2, 2), batches=(1, 1))
    assert [(each.plan, each.tp, each.batch) for each in run.points] == [("rowwise", 2, 1)]
    assert list(verdict(run)) == ["Fastest for 32 tokens: tp 2: rowwise."]


def test_a_machine_of_one_device_a_node_wants_degrees(tmp_path: Path) -> None:
    text = (files("shardwise") / "machines" / "h100-sxm-80gb.toml").read_text("utf-8")
    alone = tmp_path / "alone.toml"
    alone.write_text(text.replace("devices_per_node = 8", "devices_per_node = 1"), "utf-8")
    with pytest.raises(InputError, match=r"one device a node.* Give --degrees, of 2 to 1024 ranks\."):
        found(machine=str(alone), degrees=())


@pytest.mark.parametrize("plans", [("rowwise",), ("routed",)], ids=["drawn ids", "ids of the text"])
def test_a_step_of_more_ids_than_a_trace_meets_is_refused_by_predict_too(plans: tuple[str, ...]) -> None:
    asked = api.case(model="llama3-debug", mesh="tp=2", batch=999_999, seq=8192, plans=plans)
    with pytest.raises(OptionError, match=r"^999,999 sequences of 8,192 tokens at a time: .* Use a smaller"):
        api.predict(asked)


def point(plan: str, tp: int, step_s: float) -> LookUpPoint:
    return LookUpPoint(plan, tp, 1, step_s, ((Term.TENSOR, step_s),), 1.0, 1, 1.0)


def test_the_verdict_says_from_how_many_ranks_on_which_is_the_fastest() -> None:
    run = replace(
        found(plans=("colwise",), degrees=(2,)),
        points=(
            *(point("colwise", tp, 1.0) for tp in (2, 4, 8)),
            *(point("routed", tp, seconds) for tp, seconds in ((2, 2.0), (4, 1.5), (8, 1.02))),
        ),
    )
    assert list(verdict(run)) == ["Fastest for 32 tokens: tp 2 to 4: colwise; tp 8: colwise or routed."]
    page = room_of(run).page(run)
    assert "tp 2 to 4: colwise" in page


def test_names_from_files_are_text_on_the_page() -> None:
    run = replace(found(plans=("colwise",), degrees=(2,)), model="<script>alert(1)</script>")
    assert "<script>alert" not in room_of(run).page(run)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mesh": "fsdp=2,tp=2"}, "--mesh fsdp=2,tp=2: --look-up is over tp alone."),
        ({"degrees": (1,)}, "--degrees: 1 ranks. Use 2 to 1024."),
        ({"plans": ("mine.toml",)}, '--look-up: "mine.toml" is no built-in plan'),
        ({"degrees": tuple(range(2, 202))}, "--look-up: 1,000 points; at most 500."),
        ({"batches": (1, 9_999_999)}, "9,999,999 sequences of 32 tokens at a time: a traced step meets at"),
        ({"precision": "master"}, "--precision master: keeps float32 beside parameters in half precision"),
    ],
)
def test_what_cannot_be_asked_is_one_line(keys: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        found(**keys)
    assert str(refused.value).startswith(message)
