"""Every verb that needs ranks takes every model: a Hugging Face one, and a user's own."""

from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import msgspec
import pytest

from shardwise.core.case import Case
from shardwise.core.measurement import Comparison
from shardwise.files.run_folder import RunFolder
from shardwise.launch import run_ranks
from shardwise.parallel.any_plan import name_of
from shardwise.verbs.compare import CompareOptions, compare
from tests.distributed.any_model_workers import CASES, FACTORY, HUGGING_FACE, PLAN, Trained
from tests.matrix import FULL


@cache
def trained() -> list[tuple[Trained, Trained]]:
    worker = "tests.distributed.any_model_workers:train"
    (first, *_) = run_ranks(worker, b"", world_size=2, device_type="cpu", timeout_s=120)
    return msgspec.json.decode(first, type=list[tuple[Trained, Trained]])


@pytest.mark.parametrize(
    "number",
    range(len(CASES)),
    ids=[
        f"{model.partition('?')[0].rpartition(':')[2]} under {name_of(plan)} on {mesh}"
        for model, plan, mesh in CASES
    ],
)
def test_a_step_of_any_model_under_any_plan_trains_the_unsharded_one(number: int) -> None:
    whole, sharded = trained()[number]
    assert sharded.losses == pytest.approx(whole.losses, rel=1e-6)
    assert sharded.norms == pytest.approx(whole.norms, rel=1e-5)
    assert sharded.gap < 1e-5
    assert whole.norms[0] > 0.5
    assert whole.losses[-1] < whole.losses[0]


def compared(tmp_path: Path, *plans: str, **keys: object) -> Comparison:
    case = Case.of(mesh="tp=2", plans=plans, batch=2, seq=16, device="cpu", **keys)
    profile = "text" in keys
    options = CompareOptions(rounds=1, warmup=0, repeat=False, profile=profile)
    now = datetime.now(UTC)
    done = compare(case, options, open_folder=lambda: RunFolder(tmp_path / "run", "compare", now))
    assert done.answer is not None
    return done.answer


@FULL
def test_compare_proves_and_times_a_hugging_face_model_on_text_under_its_own_plan(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 200)
    found = compared(tmp_path, model=HUGGING_FACE, text=[str(text)])
    (measured,) = found.measurements
    assert (measured.label, measured.engine) == ("hf", "transformers")
    assert "#   model.layers.*.self_attn.q_proj: colwise\n" in measured.plan_toml
    assert measured.agreement is not None
    assert measured.agreement.agrees
    assert measured.agreement.layers == 2
    assert measured.module_times is not None
    assert measured.module_times.module == "model.embed_tokens"
    assert found.text.source == str(text)
    assert found.notes[-1].startswith("The text's ids end at")
    (profile,) = found.profiles
    assert profile.label == "hf"


def test_compare_takes_a_user_s_model_and_says_why_its_ids_are_random(tmp_path: Path) -> None:
    plan = tmp_path / "mine.toml"
    plan.write_text(PLAN.to_toml())
    few = FACTORY.replace("blocks", "few_words")
    found = compared(tmp_path, str(plan), model=few, dtype="bfloat16", recompute="full")
    (measured,) = found.measurements
    assert measured.agreement is not None
    assert measured.agreement.agrees
    assert measured.agreement.layers == 3
    assert found.text.tokenizer == "none"
    assert found.notes == ("Token ids are random: a tokenizer of bytes needs 256 ids, and the model has 40.",)


@FULL
def test_compare_finds_what_is_wrong_with_a_user_s_plan(tmp_path: Path) -> None:
    plan = tmp_path / "norms-summed.toml"
    right = '"body.*.norm" = "replicate"'
    assert right in PLAN.to_toml()
    plan.write_text(PLAN.to_toml().replace(right, '"body.*.norm" = "sequence_parallel"'))
    found = compared(tmp_path, str(plan), model=FACTORY)
    assert not found.measurements
    assert found.verdict[0].startswith('mine: body.0.norm.weight, rule "body.*.norm" (')
