"""The best plan for a model on a machine: what is tried, what it costs, and when the best is proved. No
torch."""
