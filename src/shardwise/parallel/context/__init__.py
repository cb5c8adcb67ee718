"""Context parallelism: each rank has its part of every sequence through the whole model, and attention alone
brings keys and values of the others to its queries.

A sequence is cut into head-tail pairs: of 2n chunks rank r has r and 2n-1-r, one behind the other. So under a
causal mask each rank's queries see half of all keys, and each block of work is one call of a fused kernel:

    keys of      queries      keys they see
    itself       all          causal: its own square
    a rank < r   all          its head: it lies before both chunks, its tail behind both
    a rank > r   the tail     all: both its chunks lie between rank r's

Sources: Dubey et al. 2024, 3.3.2 (Llama 3: head-tail pairs, all-gather), Liu et al. 2023 (ring attention),
Brandon et al. 2023 (striped attention: the same balance, token by token).
"""
