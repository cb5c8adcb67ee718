"""Rates of FlashAttention's generations on the GPUs that machine files are of, from published figures.

PyTorch's attention on Hopper was FlashAttention 2 before it was cuDNN's, and before that people ran
FlashAttention 1 (or its port to Triton). A GPU may run each of them.
"""

from dataclasses import dataclass

A100_PEAK = 312.0  # TFLOP/s, data sheet
FLASH_1_SHARES = (0.40, 0.30)
"""Forward and backward. Source: the FlashAttention-2 paper (arXiv 2307.08691), section 1: FlashAttention
reaches 30 to 50 % of an A100's peak in the forward and 25 to 35 % in the backward; the middles of both
ranges."""
FLASH_2_SHARES = (0.73, 0.63)
"""The same of FlashAttention 2: "up to 73 %" and "up to 63 %" there."""
PAPER = "FlashAttention-2 paper (arXiv 2307.08691)"
FIGURES = "FlashAttention-3 paper (arXiv 2407.08608), figures (hardware.csv)"
SECOND = 1  # in the FlashAttention-3 paper's figures, bars stand as Standard, FlashAttention-2, ...


@dataclass(frozen=True, slots=True)
class Generation:
    """One kernel on one GPU: TFLOP/s at long sequences, and the sequence at which half of that is reached."""

    name: str
    forward: float
    backward: float
    half_sequence: int
    source: str


def generations(figures: list[dict[str, str]], gpu: str) -> tuple[Generation, ...]:
    """Those known of "H100" or "A100". figures: hardware.csv's rows of attention on an H100, in their
    order."""
    forward, half = _long(_bars(figures, "attention fwd causal"))
    plain, _ = _long(_bars(figures, "attention fwd non-causal"))
    backward, _ = _long(_bars(figures, "attention bwd non-causal"))
    first = [A100_PEAK * share for share in FLASH_1_SHARES]
    if gpu == "A100":
        return (
            Generation(
                "flash-1",
                first[0],
                first[1],
                half,
                f"{PAPER}: the middle of 30 to 50 % and of 25 to 35 % of the peak; half_sequence: that of "
                "FlashAttention 2",
            ),
        )
    assert gpu == "H100", gpu
    gains = [
        rate / (A100_PEAK * share) for rate, share in zip((plain, backward), FLASH_2_SHARES, strict=True)
    ]
    return (
        Generation(
            "flash-1",
            first[0] * gains[0],
            first[1] * gains[1],
            half,
            f"the A100's, times what FlashAttention 2 gains from an A100 ({PAPER}) to an H100 ({FIGURES})",
        ),
        Generation(
            "flash-2",
            forward,
            backward,
            half,
            f"{FIGURES}: forward causal, backward not causal, head dim 128",
        ),
    )


def _bars(figures: list[dict[str, str]], op: str) -> dict[int, float]:
    """FlashAttention 2's TFLOP/s by sequence, head dim 128."""
    found: dict[int, list[float]] = {}
    for row in figures:
        words = row["shape_or_bytes"].split()
        if row["op"] == op and "hd128" in words:
            found.setdefault(int(words[0].removeprefix("s")), []).append(float(row["value"]))
    return {length: rates[SECOND] for length, rates in found.items() if length <= 8192}


def _long(rates: dict[int, float]) -> tuple[float, int]:
    """The rate at long sequences, and half_sequence: through the shortest and the longest bar."""
    (short, slow), (far, fast) = min(rates.items()), max(rates.items())
    half = (fast / slow - 1) / (1 / short - fast / slow / far)
    return fast * (1 + half / far), round(half)
