"""Models as plain nn.Modules, without a trace of parallelism, and the specs by which commands name them."""
