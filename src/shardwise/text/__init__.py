"""Real text -> tokens -> batches, the same for every rank and verb. Knows no ranks, models or plans."""
