"""Plan `hf` on real ranks: what transformers shards computes what the whole model does."""

from typing import Any

import msgspec
import pytest

from shardwise.launch import run_ranks

pytest.importorskip(
    "transformers",
    reason="transformers isn't installed, so plan hf is NOT compared with the whole model: pip install "
    "shardwise[hf]",
)


@pytest.fixture(scope="module")
def results() -> list[Any]:
    """Per rank: what each of the workers gave."""
    answers = run_ranks(
        "tests.distributed.hugging_face_workers:both", b"", world_size=2, device_type="cpu", timeout_s=120
    )
    return [msgspec.json.decode(answer) for answer in answers]


def test_plan_hf_gives_the_loss_and_every_gradient_of_the_whole_model(results: list[Any]) -> None:
    for answers, _ in results:
        assert len(answers) == 4
        for name, (whole, sharded), far, found in answers:
            assert sharded == pytest.approx(whole, rel=1e-6), name
            assert sorted(far) == found
            # transformers' norms and rotary tables are float32 whatever the weights are
            assert max(far.values()) < 1e-5, (name, far)


def test_plans_that_cannot_be_traced_do_not_run_on_real_ranks_either(results: list[Any]) -> None:
    for _, (doge, llama4, inkling, lfm2) in results:
        assert doge.startswith("RuntimeError: The size of tensor a (4) must match the size of tensor b (8)")
        assert llama4.startswith(
            "RuntimeError: Output 0 of _ToTorchTensor is a view and is being modified inplace."
        )
        assert inkling.startswith("AssertionError")
        assert lfm2.startswith("RuntimeError: aten.mm.default got mixed torch.Tensor and DTensor")
