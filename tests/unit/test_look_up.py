"""predict --look-up: the table of token ids alone, under each style."""

from dataclasses import replace

import pytest

from shardwise import api
from shardwise.core.errors import InputError
from shardwise.core.look_up import LookUpPoint, LookUps
from shardwise.core.prediction import Term
from shardwise.report.common.room import room_of
from shardwise.report.predict.look_up_tables import verdict

V, H, S = 512, 64, 32
COUNT = 4  # bytes of AdamW's count of steps
PLANS = ("rowwise", "colwise", "routed", "replicated", "rowwise@dtensor")


def found(**keys: object) -> LookUps:
    degrees = keys.pop("degrees", (4,))
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
    return api.look_up(api.case(**asked), degrees=degrees).answer  # type: ignore[arg-type]


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
    ],
)
def test_what_cannot_be_asked_is_one_line(keys: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        found(**keys)
    assert str(refused.value).startswith(message)
