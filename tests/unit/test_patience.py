"""A rank of torchrun's that hangs ends itself, and says where."""

import subprocess
import sys

HANGS = """
import time
from shardwise.launch.patience import Patience
with Patience(3, 0.5) as patience:
    for part in range(4):
        time.sleep(0.2)
        patience.heard(f"step 7: part {part}")
    patience.heard()
    time.sleep(60)
"""
ENDS = """
import time
from shardwise.launch.patience import Patience
with Patience(3, 0.2) as patience:
    patience.heard("step 8")
time.sleep(0.6)
print(patience.note)
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_a_rank_that_hangs_ends_itself_and_says_where() -> None:
    ended = run(HANGS)
    assert ended.returncode == 3
    assert ended.stderr == (
        "shardwise: rank 3 hung: nothing moved in it for 0.5 s, so it ended itself "
        '(last at "step 7: part 3"). If the work needs longer, raise the timeout.\n'
    )


def test_a_rank_whose_work_is_done_is_left_alone() -> None:
    ended = run(ENDS)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "step 8\n", "")
