"""A script of torchrun's: a right step and a wrong one, held on its ranks."""

import os
import sys

import torch
import torch.distributed as dist

from shardwise.testing import assert_trains_like_one_rank
from tests.distributed import loops


def main(group: str) -> None:
    if group == "theirs":
        dist.init_process_group("gloo")
    before = torch.get_rng_state()
    step, model = loops.without_clipping, loops.by_torch
    assert_trains_like_one_rank(step, model, optimizer=loops.sgd, mesh="tp=2", steps=1)
    assert torch.equal(before, torch.get_rng_state()), "what ranks draw next has changed"
    try:
        assert_trains_like_one_rank(loops.summed_by_nobody, loops.copies, mesh="dp=2", steps=1)
    except AssertionError as error:
        line = "told" if "nothing sums them" in str(error) else str(error)
        os.write(1, f"{line}\n".encode())  # in one piece: two ranks write to one pipe
    assert dist.is_initialized() == (group == "theirs")
    if group == "theirs":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
