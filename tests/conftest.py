"""What every test runs under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A state directory for the tests: they neither know nor fill that of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SATUNE_STATE", str(tmp_path_factory.mktemp("state")))
        yield
