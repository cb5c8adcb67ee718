"""A machine, drawn as it was measured."""
