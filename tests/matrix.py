"""What `make test` leaves to `make test-all`: the rest of a matrix, where some of its cases show each
behaviour already."""

from collections.abc import Callable, Iterable

import pytest

FULL = pytest.mark.full


def thinned(cases: Iterable[object], is_telling: Callable[..., bool]) -> list[object]:
    """All cases as parameters; those that aren't telling run in `make test-all` only. A case of several
    parameters is a tuple."""
    parameters: list[object] = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        parameters.append(pytest.param(*values, marks=() if is_telling(*values) else FULL))
    return parameters
