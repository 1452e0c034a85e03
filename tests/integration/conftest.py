"""What several integration tests need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from program import MODULE, Program, program
from testbed.slurm import SlurmBed, require_slurm, slurm_bed


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """A scriptable engine, a real process."""
    with FakeEngine() as made:
        yield made


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Program]:
    """The command line in a state directory of its own; what it leaves running is ended."""
    with program(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmBed]:
    """A real Slurm of two nodes with four GPUs each (character devices), partitions low and high; for all tests."""
    require_slurm()
    with slurm_bed() as bed:
        yield bed


@pytest.fixture(scope="session")
def hub() -> Iterator[str]:
    """The URL of a hub."""
    script = MODULE.parent / "tests" / "testbed" / "hub.py"
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()
