"""Commands: the only place that parses arguments, prints and exits. One file per command."""
