"""Real text -> tokens -> batches, the same for every rank and every verb. Knows nothing of ranks, models or
plans."""
