"""predict: Program + Machine -> time and memory, term by term. No torch."""
