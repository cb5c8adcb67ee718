"""A RunProfile or a Difference, drawn."""
