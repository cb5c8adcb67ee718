"""calibrate: times this machine's kernels, launches and collectives, and fits a machine file to them."""
