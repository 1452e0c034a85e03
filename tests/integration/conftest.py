"""What several integration tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """A scriptable engine, a real process."""
    with FakeEngine() as made:
        yield made
