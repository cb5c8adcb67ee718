"""search as a function: options.py has what it asks for, looking.py looks. space.py says what is open,
pieces.py and tracing.py ask processes that have torch, proof.py has verify prove what was found."""

from shardwise.verbs.search.looking import search
from shardwise.verbs.search.options import SearchOptions

__all__ = ["SearchOptions", "search"]
