"""Program -> Explanation: each collective and copy, why it is there and what it costs in bytes; what a rank
holds; findings. No torch."""
