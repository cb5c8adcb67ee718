"""What the tests of pages share."""

from collections.abc import Iterator

import pytest

from tests.e2e.browser import BROWSERS, Browser, installed, started


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for all pages that this process looks at."""
    path = installed()
    if path is None:
        pytest.skip(
            f"THE PAGE WAS NOT SEEN BY A BROWSER: none of {', '.join(BROWSERS)} is installed (apt-get "
            "install chromium)"
        )
    with started(path, tmp_path_factory.mktemp("profile")) as running:
        yield running
