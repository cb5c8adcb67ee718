"""A Comparison, drawn."""
