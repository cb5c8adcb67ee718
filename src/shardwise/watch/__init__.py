"""The sentinel of a real run: what ranks must hold alike is hashed as they train, and what differs is named.

digest.py hashes a tensor where it lies; alike.py says which tensors which ranks hold alike; groups.py which
ranks tell each other; sentinel.py does so every so many steps. Knows nothing of proofs.
"""
