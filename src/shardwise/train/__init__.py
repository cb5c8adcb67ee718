"""A training run on real ranks: its checkpoints, and what goes on from them."""
