"""A Prediction or a Sweep, drawn."""
