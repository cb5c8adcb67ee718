"""dims/: which dims of which tensors a model's forward ties together, seen on meta tensors, before any
plan."""
