"""Plans on real ranks: rounds, clocks, memory, bytes, statistics -> Measurement."""
