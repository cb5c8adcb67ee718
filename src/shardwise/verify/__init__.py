"""Sharded == unsharded, on real ranks: the loss and every gradient, and what must be equal on all ranks."""
