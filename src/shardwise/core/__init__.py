"""The nouns that every verb shares: frozen, without I/O, standard library only."""
