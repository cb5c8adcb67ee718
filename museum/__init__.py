"""The museum: small rebuilds of public faults of sharded training, in plain PyTorch. README.md says how to
use it."""
