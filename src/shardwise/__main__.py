"""`python -m shardwise`: the same as the installed command; what torchrun's -m starts."""

from shardwise.cli.main import run

if __name__ == "__main__":
    run()
