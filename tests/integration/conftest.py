"""What several integration tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine
from testbed.slurm import SlurmBed, missing_programs, slurm_bed


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """A scriptable engine, a real process."""
    with FakeEngine() as made:
        yield made


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmBed]:
    """A real Slurm of two nodes with four GPUs each (character devices), partitions low and high; for all tests."""
    if missing := missing_programs():
        pytest.skip(f"a real Slurm needs {', '.join(missing)} (tests/run.sh installs what is missing)")
    with slurm_bed() as bed:
        yield bed
