"""Who carries a plan out: our own engine, PyTorch's ParallelStyles, or transformers under its own plan."""
