"""What docs/search.md says of searches is made of their results file: figures, and the terms by which the
best plan beats the guess."""

from dataclasses import replace
from pathlib import Path

from benchmarks.search_examples_results import Answer, Example, Run, blocks, newest_blocks, told

BEST = Answer(
    "fsdp=8, no layer is cut", 1.0, 1000.0, 40 * 2.0**30, (("matmul", 0.6), ("pipeline bubble", 0.4)), True,
    "right", "", 448, 44, 12.0,
)  # fmt: skip
GUESS = replace(BEST, label="tp=8, all cut", step_s=1.2, terms=(("matmul", 0.7), ("pipeline bubble", 0.5)))
EXAMPLE = Example(
    "a tied head", "About it.", "shardwise search --model x", "tp over a node", BEST, GUESS, "", (), ()
)


def test_an_example_names_the_terms_by_which_the_best_beats_the_guess() -> None:
    said = told(EXAMPLE)
    assert (
        "1.20 s, 20.0 % longer (100 ms more matmul, 100 ms more pipeline bubble), with 40.0 GiB a device."
        in said
    )
    assert "proved to be the best of its space, verified on ranks: right." in said


def test_a_guess_that_is_right_or_that_does_not_fit_says_so() -> None:
    assert "the guess is the best" in told(replace(EXAMPLE, guessed=BEST))
    assert "can't be: no plan fits" in told(replace(EXAMPLE, guessed=None, why_not="no plan fits"))


def test_what_was_not_proved_or_not_verified_says_so() -> None:
    unproved = replace(BEST, is_proved=False, verdict="", why="--no-verify")
    said = told(replace(EXAMPLE, best=unproved))
    assert "not proved to be the best of its space, not verified: --no-verify." in said


def test_the_block_has_a_row_for_each_example_and_its_file_is_read_back(tmp_path: Path) -> None:
    run = Run("python -m it", "2026-01-01T00:00:00", "gpu-x", (("torch", "2.13"),), (EXAMPLE, EXAMPLE))
    (text,) = blocks(run).values()
    assert text.count("| a tied head |") == 2
    run.write(tmp_path)
    assert newest_blocks(tmp_path) == blocks(run)
    assert newest_blocks(tmp_path / "none") == {}
