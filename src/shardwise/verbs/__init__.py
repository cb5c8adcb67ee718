"""Each verb as a function: a Case, or files, to a noun. What the commands, shardwise.testing and notebooks
call. Prints nothing."""
